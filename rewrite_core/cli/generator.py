"""The generator that a command works on, and its latents, made from what the command line says."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import pictures
from ..demo import LATENT_SIZE, chapels
from ..errors import RewriteCoreError, warn
from ..generators.loading import load_generator, load_into
from ..layers.latents import sample_latents
from ..statistics.distributed import rows_together
from ..statistics.shards import Shard
from .allocator import keep_freed_memory
from .command import UsageError
from .messages import brief
from .options import CHAPELS, PICKLED

_BATCH = 16  # pictures that are painted at a time


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a command works on.

    name       what --generator says
    generator  in eval mode, on the device
    latents    float32 [count, *size], on the CPU: the rows that selections index
    seed       of the latents
    span       what the generator's images lie in
    progress   whether long work shows a bar
    shape      of one picture, [C, H, W]
    shard      this process's, where those of torchrun paint together
    """

    name: str
    generator: nn.Module
    latents: Tensor
    seed: int
    span: tuple[float, float]
    progress: bool
    shape: tuple[int, ...] = ()
    shard: Shard | None = None

    def paint(self, latents: Tensor, progress: bool | None = None) -> Tensor:
        """Pictures [N, C, H, W] of latents [N, *size], float32 in 0..1 on the CPU."""
        _check_memory(f"{len(latents)} pictures", 2 * len(latents) * math.prod(self.shape))  # and what is made of them
        show = self.progress if progress is None else progress

        def paint(rows: Tensor, progress: bool = False) -> Tensor:
            return pictures.paint(self.generator, rows, batch_size=_BATCH, span=self.span, progress=progress)

        if self.shard is None or len(latents) <= _BATCH:
            painted = paint(latents, show)
        else:
            painted = rows_together(latents, self.shard, _BATCH, paint)
        broken = len(painted) - int(torch.isfinite(painted.sum((1, 2, 3))).sum())
        if broken:
            warn(f"{broken} of {len(painted)} pictures hold NaN or infinity; where they do they are drawn black.")
        return painted


def subject(options: argparse.Namespace, count: int) -> Subject:
    """The generator that the options name, with `count` latents, tried out on two of them."""
    keep_freed_memory()
    made = Subject(
        name=options.generator,
        generator=_load(options.generator, options.checkpoint, usable_device(options.device)),
        latents=_latents(options, count),
        seed=options.seed,
        span=options.range,
        progress=not options.quiet,
        shard=getattr(options, "process", None),
    )
    first = made.latents[:2]
    try:
        images = made.paint(first, progress=False)
    except Exception as error:  # a user's own code raises anything
        raise UsageError(
            f"{made.name} fails on latents {list(first.shape)}; check --latent-size (512, or 100x1x1 "
            f"where latents are maps) and --checkpoint: {brief(error)}."
        ) from error
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(f"{made.name} makes outputs {list(images.shape)}, not images [N, 3, H, W].")
    if made.name != CHAPELS and not options.checkpoint:
        warn(f"Without --checkpoint the weights are those that {made.name} starts from.")
    return dataclasses.replace(made, shape=tuple(images.shape[1:]))


def _check_memory(what: str, numbers: int) -> None:
    """Raises UsageError where so many float32 numbers are more than the machine's memory, before any is made."""
    needed, there = 4 * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UsageError(
            f"{what} take {needed / 1e9:.3g} GB, and this machine has {there / 1e9:.3g} GB; ask for fewer or smaller "
            "ones."
        )


def usable_device(name: str) -> torch.device:
    """The device of that name; raises UsageError where this machine or this torch has none."""
    try:
        device = torch.device(name)
        (torch.ones(1, device=device) + 1).cpu()
    except Exception as error:  # each kind of device has its own errors: modules that are missing, assertions
        reason = f"{error}".partition("\n")[0].rstrip(".") or type(error).__name__
        raise UsageError(f"Device {name!r} cannot be used here ({reason:.200}); try --device cpu.") from error
    return device


def _latents(options: argparse.Namespace, count: int) -> Tensor:
    size = options.latent_size
    if size is None:
        if options.generator != CHAPELS:
            raise UsageError("Say what latents your generator takes with --latent-size, such as 512 or 100x1x1.")
        size = (LATENT_SIZE,)
    _check_memory(f"{count} latents", 3 * count * math.prod(size))  # drawn in float64, kept in float32
    return sample_latents(size, count, options.seed, options.distribution)


def _load(spec: str, checkpoint: str | None, device: torch.device) -> nn.Module:
    if spec == PICKLED:
        if not checkpoint:
            raise UsageError("--allow-pickle needs the pickled network, --checkpoint FILE.")
        _import_from_here()  # the network's code
        return load_generator(checkpoint, allow_pickle=True).to(device)
    if spec != CHAPELS:
        return _made_by(spec, checkpoint).to(device).eval()
    if checkpoint:
        raise UsageError("The embedded generator has its own weights; name yours with --generator module:function.")
    return chapels().to(device)


def _made_by(spec: str, checkpoint: str | None) -> nn.Module:
    function = _import_function(spec)
    required = _required(function)
    if len(required) > 1:
        raise UsageError(f"{spec} needs {', '.join(required)}; name a function of nothing, or of a checkpoint's path.")
    if required and not checkpoint:
        raise UsageError(f"{spec} takes a checkpoint; name it with --checkpoint.")
    try:
        generator = function(checkpoint) if required else function()
    except (RewriteCoreError, OSError):  # a sentence already
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec} made no generator; call it in Python to see why: {brief(error)}.") from error
    if not isinstance(generator, nn.Module):
        raise UsageError(f"{spec} returned a {type(generator).__name__}, not a torch.nn.Module.")
    if next(generator.parameters(), None) is None:
        raise UsageError(f"{spec} returned a module without parameters, which has nothing to rewrite.")
    if checkpoint and not required:
        load_into(generator, checkpoint)
    return generator


def _import_from_here() -> None:
    """As python -m does: a script beside you is a module."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _import_function(spec: str) -> Callable:
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"--generator takes {CHAPELS!r} or module:function, not {spec!r}.")
    if os.sep in module_name or module_name.endswith(".py"):
        file = Path(module_name)
        right = f"{file.stem}:{attribute}"
        raise UsageError(f"--generator takes a module and not a file: use {right}, and run from {file.parent}{os.sep}.")
    _import_from_here()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's own code raises anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UsageError(f"There is no module {missing!r} to import {spec!r} from; run from its folder.") from error
        raise UsageError(
            f"Module {module_name!r} cannot be imported; mend it, or install what it needs: {brief(error)}."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"Module {module_name!r} has no function {attribute!r}.")
    return function


def _required(function: Callable) -> list[str]:
    """The names of the arguments that a call must give."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
