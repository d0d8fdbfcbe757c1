"""Pictures without and with the rewrites that a command names."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import Tensor

from ..rewrites.change import Rewrite
from .generator import Subject


def before_after(on: Subject, latents: Tensor, files: Sequence[str], force: bool) -> tuple[Tensor, Tensor]:
    """Pictures [N, C, H, W] without and with the rewrites, in this order; the generator is left as it was."""
    changes = [Rewrite.load(path) for path in files]
    with contextlib.ExitStack() as applied:
        for change in changes:
            change.apply(on.generator, force=force)
            applied.callback(change.revert)
        after = on.paint(latents)
    return on.paint(latents), after
