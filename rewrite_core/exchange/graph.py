"""Edited generators as graphs that run without this library: ONNX."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import RewriteCoreError
from ..files import atomic_write
from ..layers.latents import for_generator
from ..modes import evaluating
from ..rewrites.change import Rewrite


def save_onnx(
    changes: Sequence[Rewrite],
    generator: nn.Module,
    latents: Tensor,
    path: str | os.PathLike,
    strength: float = 1.0,
    force: bool = False,
) -> None:
    """Write the generator with rewrites on as ONNX: input "latents" [N, ...], output "images", N free.

    Needs onnx and onnxscript (``pip install rewrite_core[export]``). The generator is left as it was.

    Args:
        latents: [N, ...], what the generator is traced with; two rows or more.
        force: apply rewrites also where the weight is not the one that they were fitted to.

    Raises RewriteCoreError where the exporter is missing, or cannot export this generator.
    """
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ModuleNotFoundError as error:
        raise RewriteCoreError(
            f"ONNX export needs {error.name}: install it with `pip install rewrite_core[export]`."
        ) from None
    rows = for_generator(latents[:2], generator)
    with contextlib.ExitStack() as applied:
        for change in changes:
            change.apply(generator, strength=strength, force=force)
            applied.callback(change.revert, generator)
        with evaluating(generator), torch.no_grad():
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            try:
                program = torch.onnx.export(
                    generator,
                    (rows,),
                    input_names=["latents"],
                    output_names=["images"],
                    dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                    dynamo=True,
                    verbose=False,
                )
            except Exception as error:  # whatever the exporter raises
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise RewriteCoreError(f"torch.onnx cannot export this generator: {first}") from error
            assert program is not None  # with dynamo=True it returns the program
            with atomic_write(path) as partial:  # here: the program shares the generator's weights
                program.save(str(partial))
