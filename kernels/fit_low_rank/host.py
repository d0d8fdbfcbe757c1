"""From a problem to its launch: configurations, what the channels of an edit share, and scratch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...ops.fit_low_rank_op.problem import (
    SLOW_SHARE,
    SMOOTHING_FAST,
    SMOOTHING_RATE,
    SMOOTHING_SLOW,
    FitLowRankProblem,
    Outputs,
    empty_outputs,
)
from ..launching import launch_kernel
from ..tuning import choose, multiprocessors_of
from .exact import exact_kernel
from .fit import fit_kernel
from .structs import scratch_size


@dataclass(frozen=True)
class FitLowRankConfig:
    """How a kernel is compiled and spread.

    block     unknowns, and rows of the linear systems' tiles
    tile      pixels of one product for the normal equations; divides `pixels`
    pixels    of the other passes
    warps
    resident  programs per multiprocessor
    """

    block: int
    tile: int
    pixels: int
    warps: int
    resident: int


# By the order of the linear systems. All of them use every register and spill some: what lives through the whole loop
# is 25 pointers and as many numbers, and the addresses that the compiler computes ahead. One warp needs no barriers
# between its lanes, more hide each other's waits; the first is used where nothing was measured.
SMALL = (FitLowRankConfig(16, 32, 128, 2, 8), FitLowRankConfig(16, 16, 128, 1, 8), FitLowRankConfig(16, 32, 128, 4, 4))
LARGE = (FitLowRankConfig(32, 32, 128, 4, 4), FitLowRankConfig(32, 32, 256, 8, 2))
CANDIDATES = (*SMALL, *LARGE)
SCRATCH = 1 << 27  # float64 numbers of all programs together (1 GiB)
MEASURED_STEPS = 4  # of a fit that chooses among configurations


def candidates(order: int) -> tuple[FitLowRankConfig, ...]:
    return SMALL if order <= 16 else LARGE


def plan(problem: FitLowRankProblem) -> tuple[bool, int]:
    """Whether the linear systems are over pixels (dual form), and their order."""
    _, unknowns, pixels = problem.basis.shape
    dual_form = not problem.exact and problem.penalty is None and pixels < unknowns
    return dual_form, pixels if dual_form else unknowns


def _prepare(problem: FitLowRankProblem) -> dict[str, Any]:
    """What the channels of an edit share."""
    basis = problem.basis
    wide: dict[str, Any] = {"dtype": torch.float64, "device": basis.device}
    edits, unknowns, pixels = basis.shape
    dual_form, order = plan(problem)
    if problem.pixel_weights is None:
        weights = torch.full((1, pixels), 1 / pixels, **wide)
    else:
        weights = problem.pixel_weights
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    size = torch.empty(edits, unknowns, **wide)
    gram = torch.empty(edits, order, order, **wide) if dual_form or problem.exact else None
    some = max(1, (1 << 25) // (unknowns * pixels))  # edits at a time: float64 copies of all might fill the GPU
    for first in range(0, edits, some):
        part = slice(first, first + some)
        rows, weight = basis[part].double(), (weights[part] if len(weights) > 1 else weights)[:, None]
        size[part] = (weight * rows.square()).sum(-1).sqrt()
        size[part] = torch.where(size[part] > 0, size[part], 1.0)  # also of NaN
        if gram is None:
            continue
        rows = rows / size[part][..., None]
        if dual_form:
            torch.bmm(rows.mT, rows, out=gram[part])
        else:
            torch.bmm(problem.gain**2 * weight * rows, rows.mT, out=gram[part])
    square = size[:, :, None] * size[:, None, :]
    constant, penalty_scale = problem.constant, problem.penalty_scale
    if (
        constant is not None and problem.quadratic is not None
    ):  # without a change the quadratic form does not count, unless it is not finite
        constant = constant + 0.0 * problem.quadratic.sum((1, 2))[:, None]
    return {
        "constant": constant,
        "weights": weights.contiguous(),
        "inverse_size": 1 / size,
        "gram": gram,
        "quadratic": None if problem.quadratic is None else problem.quadratic / square,
        "penalty": None if problem.penalty is None else problem.penalty / square,
        "penalty_scale": None if penalty_scale is None else penalty_scale.contiguous(),
    }


def _paces(problem: FitLowRankProblem) -> tuple[float, float, float]:
    """slow_rate, slow_rate_well, fast_rate_well: by what the smoothing is multiplied."""
    if problem.slope == 1.0 and problem.linear is None:  # convex
        return (SMOOTHING_RATE,) * 3
    slow_rate = SMOOTHING_SLOW ** (1 / (SLOW_SHARE * problem.max_iterations))
    return slow_rate, slow_rate**2, SMOOTHING_FAST


def _fit(
    problem: FitLowRankProblem, shared: dict[str, Any], outputs: Outputs, config: FitLowRankConfig, steps: int
) -> None:
    """Launch the kernel that fits, with up to so many steps."""
    edits, unknowns, pixels = problem.basis.shape
    tasks = edits * problem.base.shape[1]
    dual_form, order = plan(problem)
    device = problem.base.device
    stride = scratch_size(unknowns, pixels, order, config.block, config.pixels)
    programs = min(tasks, multiprocessors_of(device) * config.resident, max(1, SCRATCH // stride))
    scratch = torch.empty(programs, stride, dtype=torch.float64, device=device)
    inverse_size = torch.nn.functional.pad(shared["inverse_size"], (0, -unknowns % config.block))
    maps = [part.contiguous() for part in (problem.basis, problem.base, problem.target)]
    demodulation = []
    if not problem.exact:
        linear = None if problem.linear is None else problem.linear.contiguous()
        demodulation = [shared["constant"], linear, shared["quadratic"]]
    numbers, flags = [problem.gain], {}
    if not problem.exact:
        numbers = [problem.slope, problem.gain, problem.tolerance, *_paces(problem), steps]
        flags = {
            "ABSOLUTE": problem.loss == "l1",
            "ROUNDED": problem.slope != 1.0,
            "DEMODULATED": problem.linear is not None,
        }
    launch_kernel(
        "fit_low_rank",
        exact_kernel if problem.exact else fit_kernel,
        (programs,),
        *maps,
        problem.shift,
        *demodulation,
        shared["weights"],
        shared["penalty"],
        shared["penalty_scale"],
        inverse_size,
        shared["gram"],
        scratch,
        *outputs,
        tasks,
        problem.base.shape[1],
        unknowns,
        pixels,
        pixels if len(shared["weights"]) > 1 else 0,
        *((0, 0, 0) if problem.shift is None else problem.shift.stride()),
        *numbers,
        stride,
        **flags,
        PENALISED=problem.penalty is not None,
        SHIFT=problem.shift is not None,
        **({} if problem.exact else {"DUAL_FORM": dual_form}),
        BLOCK=config.block,
        TILE=config.tile,
        PIXELS=config.pixels,
        num_warps=config.warps,
        num_stages=1,
        enable_fp_fusion=False,  # fused across a butterfly, the copies of one sum would differ, and part at a branch
    )


def _configuration(problem: FitLowRankProblem, fit: Callable[[FitLowRankConfig, int], None]) -> FitLowRankConfig:
    """The configuration for such problems on their GPU: measured once per kind of GPU and class of shapes."""
    dual_form, order = plan(problem)
    edits, channels, pixels = problem.base.shape
    kind = "exact" if problem.exact else "pixels" if dual_form else "unknowns"
    name = f"{kind}-{triton.next_power_of_2(order)}-{triton.next_power_of_2(pixels)}"
    name += f"-{min(triton.next_power_of_2(edits * channels), 1 << 14)}"
    steps = min(problem.max_iterations, MEASURED_STEPS)
    return choose(problem.base.device, "fit_low_rank", name, candidates(order), lambda config: fit(config, steps))


def launch(problem: FitLowRankProblem, config: FitLowRankConfig | None = None) -> Outputs:
    """The outputs of ops.fit_low_rank's custom op. Nothing here waits for the GPU.

    config  in place of the one that was found the fastest
    """
    outputs = empty_outputs(problem.basis, problem.base)
    if not problem.base.shape[0] or not problem.base.shape[1]:
        return outputs
    shared = functools.cache(lambda: _prepare(problem))

    def fit(config: FitLowRankConfig, steps: int) -> None:
        _fit(problem, shared(), outputs, config, steps)

    with torch.cuda.device_of(problem.base):  # Triton launches on the current device
        config = config or _configuration(problem, fit)
        fit(config, problem.max_iterations)
    return outputs
