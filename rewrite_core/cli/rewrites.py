"""Pictures without and with the rewrites that a command names."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..exchange.lora import is_peft, load_peft
from ..rewrites.change import Rewrite
from .command import UsageError
from .generator import Subject


def load_rewrites(files: Sequence[str], generator: nn.Module) -> list[Rewrite]:
    """The rewrites of a generator in these files; a LoRA folder of peft's is one for each of its layers.

    Raises UsageError where two are one: --strength 2 says that.
    """
    changes: list[tuple[str, Rewrite]] = []
    for file in files:
        for change in load_peft(file, generator) if is_peft(file) else [Rewrite.load(file)]:
            for name, other in changes:
                if _equal(change, other):
                    raise UsageError(
                        f"{name} and {file} hold one rewrite, which counts once; for more of it use --strength."
                    )
            changes.append((file, change))
    return [change for _, change in changes]


def _equal(one: Rewrite, two: Rewrite) -> bool:
    return (
        one.layer == two.layer
        and torch.equal(one.directions, two.directions)
        and torch.equal(one.coefficients, two.coefficients)
    )


def before_after(
    on: Subject, latents: Tensor, files: Sequence[str], strength: float, force: bool
) -> tuple[Tensor, Tensor]:
    """Pictures [N, C, H, W] without and with the rewrites, in this order; the generator is left as it was."""
    changes = load_rewrites(files, on.generator)
    with contextlib.ExitStack() as applied:
        for change in changes:
            change.apply(on.generator, strength, force=force)
            applied.callback(change.revert, on.generator)
        after = on.paint(latents)
    return on.paint(latents), after
