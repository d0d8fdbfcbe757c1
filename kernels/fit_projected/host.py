"""From a problem to its launch: configurations, padding to whole tiles, and scratch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...ops.fit_projected_op.problem import BETA1, BETA2, FitProjectedProblem
from ..launching import launch_kernel
from ..tuning import choose
from .fit import fit_kernel
from .steps import RANKS
from .structs import scratch_size


@dataclass(frozen=True)
class FitProjectedConfig:
    """How the kernel is compiled and spread.

    channels  of a program; 512 of them are 64 programs of 8
    rows      weights of a tile
    pixels    of a tile at most
    warps, stages
    """

    channels: int
    rows: int
    pixels: int
    warps: int
    stages: int


CANDIDATES = (
    FitProjectedConfig(8, 32, 128, 8, 1),
    FitProjectedConfig(4, 32, 128, 8, 1),
    FitProjectedConfig(8, 16, 128, 8, 1),
    FitProjectedConfig(8, 16, 128, 4, 1),
)
MEASURED_STEPS = 12  # of a descent that chooses among configurations
PRECISION = "tf32x3"


def _whole(count: int, tile: int) -> int:
    return triton.cdiv(count, tile) * tile


def _prepare(problem: FitProjectedProblem) -> dict[str, Any]:
    """What a launch reads, whatever its configuration."""
    operator, directions, base = problem.operator, problem.directions, problem.base
    wide: dict[str, Any] = {"dtype": torch.float64, "device": operator.device}
    operator = operator.flatten(3).flatten(1, 2)
    count = torch.arange(1, problem.steps + 1, **wide)
    return {
        "maps": operator.transpose(0, 1),
        "base": base.flatten(1).contiguous(),
        "target": problem.target.flatten(1).contiguous(),
        "value": problem.value.flatten(1).contiguous(),
        "shift": None if problem.shift is None else problem.shift.flatten(1),
        "weight": None if problem.weight is None else problem.weight.flatten(2).permute(2, 1, 0),
        "square": None if problem.style is None else problem.style.square(),
        "basis": torch.einsum("ri,itp->trp", directions, operator) if len(directions) else None,
        "rates": torch.stack([problem.lr / (1 - BETA1**count), (1 - BETA2**count).rsqrt()], 1).float(),
    }


def _padded(part: Tensor | None, *more: int) -> Tensor | None:
    """With so many zeros behind each axis, the last first."""
    return None if part is None else F.pad(part, [each for one in more for each in (0, one)]).contiguous()


def _descend(
    problem: FitProjectedProblem, shared: dict[str, Any], config: FitProjectedConfig, steps: int
) -> tuple[Tensor, Tensor]:
    """Launch the kernel for so many steps: coefficients [channels, taps, directions or padded inputs], losses."""
    taps, inputs, pixels = shared["maps"].shape
    channels, rank = len(problem.base), len(problem.directions)
    tile = min(config.pixels, max(16, triton.next_power_of_2(pixels)))
    width, padded, ranks = _whole(pixels, tile), _whole(inputs, config.rows), _whole(max(rank, 1), RANKS)
    more, beyond, beside = padded - inputs, width - pixels, ranks - rank
    programs = triton.cdiv(channels, config.channels)
    stride = scratch_size(taps, padded, ranks, width, config.channels)
    scratch = torch.empty(programs, stride, dtype=torch.float32, device=problem.base.device)
    losses = torch.empty(programs, steps, dtype=torch.float64, device=problem.base.device)
    coefficients = problem.base.new_empty(channels, taps, ranks if rank else padded)
    shift = shared["shift"]
    launch_kernel(
        "fit_projected",
        fit_kernel,
        (programs,),
        _padded(shared["maps"], beyond, more),
        shared["base"],
        shared["target"],
        shared["value"],
        shift,
        _padded(shared["weight"], 0, more),
        _padded(shared["square"], more),
        _padded(problem.directions, more, beside) if rank else None,
        _padded(shared["basis"], beyond, beside),
        shared["rates"],
        scratch,
        losses,
        coefficients,
        channels,
        padded,
        taps,
        ranks,
        pixels,
        width,
        *((0, 0) if shift is None else shift.stride()),
        steps,
        problem.project_every,
        stride,
        1 / problem.base.numel(),
        float(problem.eps),
        float(problem.slope),
        float(problem.gain),
        ABSOLUTE=problem.loss == "l1",
        DEMODULATED=problem.weight is not None,
        SHIFT=shift is not None,
        PROJECTS=rank > 0,
        PROJECTS_GRADIENT=problem.project_gradient,
        ONE_TILE=width == tile,
        CHANNELS=config.channels,
        ROWS=config.rows,
        PIXELS=tile,
        PRECISION=PRECISION,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # a value and the goal that is equal to it must leave nothing
    )
    return coefficients, losses


def _configuration(
    problem: FitProjectedProblem, descend: Callable[[FitProjectedConfig, int], object]
) -> FitProjectedConfig:
    """The configuration for such problems on their GPU: measured once per kind of GPU and class of shapes."""
    inputs, *kernel, height, width = problem.operator.shape
    sizes = (len(problem.base), inputs * kernel[0] * kernel[1], height * width)
    name = "-".join(str(triton.next_power_of_2(size)) for size in sizes)
    few = min(problem.steps, MEASURED_STEPS)
    return choose(problem.base.device, "fit_projected", name, CANDIDATES, lambda config: descend(config, few))


def launch(
    problem: FitProjectedProblem, progress: Callable | None = None, config: FitProjectedConfig | None = None
) -> tuple[Tensor, Tensor]:
    """What ops.fit_projected returns, for float32. Nothing here waits for the GPU.

    config  in place of the one that was found the fastest
    """
    inputs, *kernel = problem.operator.shape[:3]
    channels, rank = len(problem.base), len(problem.directions)
    if not channels:
        losses = (
            torch.zeros(problem.steps, dtype=torch.float64, device=problem.base.device) / 0.0
        )  # a mean over nothing
        return problem.base.new_empty(0, rank or inputs, *kernel), losses
    shared = functools.cache(lambda: _prepare(problem))

    def descend(config: FitProjectedConfig, steps: int) -> tuple[Tensor, Tensor]:
        return _descend(problem, shared(), config, steps)

    with torch.cuda.device_of(problem.base):  # Triton launches on the current device
        config = config or _configuration(problem, descend)
        for _ in [None] if progress is None else progress(iter([(0, 1)]), 1):
            coefficients, losses = descend(config, problem.steps)
    coefficients = coefficients[..., : rank or inputs].transpose(1, 2)
    return coefficients.reshape(channels, rank or inputs, *kernel), losses.sum(0) / problem.base.numel()
