"""Edited generators as graphs that run without this library: ONNX, and programs of torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RewriteCoreError
from ..files import atomic_write
from ..layers.latents import for_generator
from ..modes import evaluating
from ..rewrites.change import Rewrite


@contextlib.contextmanager
def _edited(changes: Sequence[Rewrite], generator: nn.Module, strength: float, force: bool) -> Iterator[None]:
    """With the changes on, in eval mode, without gradients; the generator is as it was afterwards."""
    with contextlib.ExitStack() as applied:
        for change in changes:
            change.apply(generator, strength=strength, force=force)
            applied.callback(change.revert, generator)
        with evaluating(generator), torch.no_grad():
            yield


@contextlib.contextmanager
def _sentences(exporter: str) -> Iterator[None]:
    """What an exporter raises, which may be anything, in one sentence."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RewriteCoreError(f"{exporter} cannot export this generator: {first}") from error


@contextlib.contextmanager
def _file(path: str | os.PathLike) -> Iterator[Path]:
    """:func:`.files.atomic_write`, whose errors name the file."""
    try:
        with atomic_write(path) as partial:
            yield partial
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise


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
    with _edited(changes, generator, strength, force):
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with _sentences("torch.onnx"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the exporter's, of its own code
            program = torch.onnx.export(
                generator,
                (rows,),
                input_names=["latents"],
                output_names=["images"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None  # with dynamo=True it returns the program
        with _file(path) as partial:  # here: the program shares the generator's weights
            program.save(str(partial))


def save_program(
    changes: Sequence[Rewrite],
    generator: nn.Module,
    latents: Tensor,
    path: str | os.PathLike,
    strength: float = 1.0,
    force: bool = False,
) -> None:
    """Write the generator with rewrites on as a program of torch.export, images = program(latents), with N free:
    ``torch.export.load(path).module()`` runs it, on the device that the generator is on here.

    The rest, and what is raised, as :func:`save_onnx`; nothing needs to be installed.
    """
    rows = for_generator(latents[:2], generator)
    with _edited(changes, generator, strength, force):
        with _sentences("torch.export"):
            program = torch.export.export(generator, (rows,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        packed = io.BytesIO()  # where the disk is full torch's writer ends the process
        torch.export.save(program, packed)
    with _file(path) as partial:
        partial.write_bytes(packed.getbuffer())
