"""From a problem to its launch: configurations, what the channels of an edit share, and scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...backends import triton_interpreted
from ...ops.fit_low_rank_op.problem import (
    SLOW_SHARE,
    SMOOTHING_FAST,
    SMOOTHING_RATE,
    SMOOTHING_SLOW,
    FitLowRankProblem,
    Outputs,
    empty_outputs,
)
from ..launching import keep_plan, launch_kernel, on_device_of, plan_of, power_of_2
from ..tuning import choose, multiprocessors_of
from .exact import exact_kernel
from .fit import fit_kernel
from .shared import scale_kernel, share_kernel
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
CHUNK = 1024  # numbers that a program of scale_kernel looks at in one go
SCRATCH = 1 << 27  # float64 numbers of all programs together (1 GiB)
MEASURED_STEPS = 4  # of a fit that chooses among configurations


def candidates(order: int) -> tuple[FitLowRankConfig, ...]:
    return SMALL if order <= 16 else LARGE


def plan(problem: FitLowRankProblem) -> tuple[bool, int]:
    """Whether the linear systems are over pixels (dual form), and their order."""
    _, unknowns, pixels = problem.basis.shape
    dual_form = not problem.exact and problem.penalty is None and pixels < unknowns
    return dual_form, pixels if dual_form else unknowns


def _gram(problem: FitLowRankProblem, shared: Shared) -> Tensor | None:
    """The products of basis rows that all channels of an edit start from: in dual form, and for the closed form."""
    dual_form, order = plan(problem)
    if not (dual_form or problem.exact):
        return None
    basis = problem.basis
    edits, unknowns, pixels = basis.shape
    gram = torch.empty(edits, order, order, dtype=torch.float64, device=basis.device)
    some = max(1, (1 << 25) // (unknowns * pixels))  # edits at a time: float64 copies of all might fill the GPU
    for first in range(0, edits, some):
        part = slice(first, first + some)
        weights = shared.weights[part] if len(shared.weights) > 1 else shared.weights
        rows = basis[part].double() * shared.inverse_size[part, :unknowns, None]
        if dual_form:
            torch.bmm(rows.mT, rows, out=gram[part])
        else:
            torch.bmm(problem.gain**2 * weights[:, None] * rows, rows.mT, out=gram[part])
    return gram


def _paces(problem: FitLowRankProblem) -> tuple[float, float, float]:
    """slow_rate, slow_rate_well, fast_rate_well: by what the smoothing is multiplied."""
    if problem.slope == 1.0 and problem.linear is None:  # convex
        return (SMOOTHING_RATE,) * 3
    slow_rate = SMOOTHING_SLOW ** (1 / (SLOW_SHARE * problem.max_iterations))
    return slow_rate, slow_rate**2, SMOOTHING_FAST


class Shared(NamedTuple):
    """What the channels of an edit share, as structs.Given has it."""

    weights: Tensor
    inverse_size: Tensor
    quadratic: Tensor | None
    penalty: Tensor | None
    constant: Tensor | None

    @classmethod
    def empty(cls, problem: FitLowRankProblem, config: FitLowRankConfig) -> Shared:
        edits, unknowns, pixels = problem.basis.shape

        def empty(*shape: int) -> Tensor:
            return problem.basis.new_empty(shape, dtype=torch.float64)

        def like(given: Tensor | None) -> Tensor | None:
            return None if given is None else empty(*given.shape)

        weights = empty(1 if problem.pixel_weights is None else edits, pixels)
        size = empty(edits, triton.cdiv(unknowns, config.block) * config.block)
        return cls(weights, size, like(problem.quadratic), like(problem.penalty), like(problem.constant))


@dataclass(frozen=True)
class _Plan:
    """A call's launches, each a function of tensors, and the shape of its scratch."""

    config: FitLowRankConfig
    scratch: tuple[int, int]
    share: Callable[..., None]
    scale: Callable[..., None] | None
    fit: Callable[..., None]

    def run(self, problem: FitLowRankProblem, outputs: Outputs) -> None:
        shared = Shared.empty(problem, self.config)
        self.share(*_sharing(problem, shared))
        if self.scale is not None:
            self.scale(*_scaling(problem, shared))
        scratch = problem.base.new_empty(self.scratch, dtype=torch.float64)
        self.fit(*_fitting(problem, shared, scratch, outputs))


def _sharing(problem: FitLowRankProblem, shared: Shared) -> tuple[Tensor | None, ...]:
    return problem.basis, problem.pixel_weights, shared.weights, shared.inverse_size


def _scaling(problem: FitLowRankProblem, shared: Shared) -> tuple[Tensor | None, ...]:
    given = (problem.quadratic, problem.penalty, problem.constant)
    return *given, shared.inverse_size, shared.quadratic, shared.penalty, shared.constant


def _fitting(
    problem: FitLowRankProblem, shared: Shared, scratch: Tensor, outputs: Outputs
) -> tuple[Tensor | None, ...]:
    demodulation = () if problem.exact else (shared.constant, problem.linear, shared.quadratic)
    return (
        problem.basis,
        problem.base,
        problem.target,
        problem.shift,
        *demodulation,
        shared.weights,
        shared.penalty,
        problem.penalty_scale,
        shared.inverse_size,
        _gram(problem, shared),
        scratch,
        *outputs,
    )


def _first(problem: FitLowRankProblem, outputs: Outputs, config: FitLowRankConfig, steps: int) -> _Plan:
    """Launch the kernels that fit, with up to so many steps; the plan of launches like these."""
    edits, unknowns, pixels = problem.basis.shape
    tasks = edits * problem.base.shape[1]
    dual_form, order = plan(problem)
    device = problem.base.device
    shared = Shared.empty(problem, config)
    blocks = triton.cdiv(unknowns, config.block)
    fixed = {"num_stages": 1, "enable_fp_fusion": False}  # see below
    share = launch_kernel(
        "fit_low_rank",
        share_kernel,
        (edits, blocks),
        *_sharing(problem, shared),
        unknowns,
        pixels,
        WEIGHTED=problem.pixel_weights is not None,
        BLOCK=config.block,
        PIXELS=config.pixels,
        num_warps=max(4, config.warps),
        **fixed,
    )
    scale = None
    if problem.quadratic is not None or problem.penalty is not None:
        scale = launch_kernel(
            "fit_low_rank",
            scale_kernel,
            (edits, blocks + 1),
            *_scaling(problem, shared),
            unknowns,
            problem.base.shape[1],
            DEMODULATED=problem.quadratic is not None,
            PENALISED=problem.penalty is not None,
            BLOCK=config.block,
            CHUNK=CHUNK,
            num_warps=max(4, config.warps),
            **fixed,
        )
    stride = scratch_size(unknowns, pixels, order, config.block, config.pixels)
    programs = min(tasks, multiprocessors_of(device) * config.resident, max(1, SCRATCH // stride))
    scratch = torch.empty(programs, stride, dtype=torch.float64, device=device)
    numbers, flags = [problem.gain], {}
    if not problem.exact:
        numbers = [problem.slope, problem.gain, problem.tolerance, *_paces(problem), steps]
        flags = {
            "ABSOLUTE": problem.loss == "l1",
            "ROUNDED": problem.slope != 1.0,
            "DEMODULATED": problem.linear is not None,
        }
    fit = launch_kernel(
        "fit_low_rank",
        exact_kernel if problem.exact else fit_kernel,
        (programs,),
        *_fitting(problem, shared, scratch, outputs),
        tasks,
        problem.base.shape[1],
        unknowns,
        pixels,
        pixels if problem.pixel_weights is not None else 0,
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
        **fixed,  # fused across a butterfly, the copies of one sum would differ, and part at a branch
    )
    return _Plan(config, (programs, stride), share, scale, fit)


def _configuration(problem: FitLowRankProblem, fit: Callable[[FitLowRankConfig, int], object]) -> FitLowRankConfig:
    """The configuration for such problems on their GPU: measured once per kind of GPU and class of shapes."""
    dual_form, order = plan(problem)
    edits, channels, pixels = problem.base.shape
    kind = "exact" if problem.exact else "pixels" if dual_form else "unknowns"
    name = f"{kind}-{power_of_2(order)}-{power_of_2(pixels)}"
    name += f"-{min(power_of_2(edits * channels), 1 << 14)}"
    steps = min(problem.max_iterations, MEASURED_STEPS)
    return choose(problem.base.device, "fit_low_rank", name, candidates(order), lambda config: fit(config, steps))


def launch(problem: FitLowRankProblem, config: FitLowRankConfig | None = None) -> Outputs:
    """The outputs of ops.fit_low_rank's custom op. Nothing here waits for the GPU.

    config  in place of the one that was found the fastest
    """
    outputs = empty_outputs(problem.basis, problem.base)
    if not problem.base.shape[0] or not problem.base.shape[1]:
        return outputs
    contiguous: dict[str, Any] = {name: part.contiguous() for name, part in _read(problem) if name != "shift"}
    problem = problem._replace(**contiguous)
    kinds = [(name, part.shape, part.stride(), part.data_ptr() % 16) for name, part in _read(problem)]
    options = tuple(value for value in problem if not isinstance(value, Tensor))  # None where there is no tensor
    key = ("fit_low_rank", problem.base.device, problem.base.dtype, *kinds, options, config, triton_interpreted())
    with on_device_of(problem.base):
        found = plan_of(key)
        if found is not None:
            found.run(problem, outputs)
            return outputs

        def fit(config: FitLowRankConfig, steps: int) -> _Plan:
            return _first(problem, outputs, config, steps)

        keep_plan(key, fit(config or _configuration(problem, fit), problem.max_iterations))
    return outputs


def _read(problem: FitLowRankProblem) -> list[tuple[str, Tensor]]:
    """The tensors that there are, by name."""
    return [(name, part) for name, part in zip(problem._fields, problem) if isinstance(part, Tensor)]
