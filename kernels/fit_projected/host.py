"""From a problem to its launches: configurations, padding to whole tiles, and arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ...ops.fit_projected_op.problem import FitProjectedProblem, rates_of
from ..launching import on_device_of, repeated
from ..tuning import choose, multiprocessors_of
from .directions import lean_kernel, project_kernel
from .fit import compare_kernel, update_kernel
from .steps import RANKS


@dataclass(frozen=True)
class FitProjectedConfig:
    """How update_kernel is compiled and spread.

    channels  of a program at most
    rows      weights of a tile
    pixels    of a tile at most
    programs  for each multiprocessor, about
    warps, stages
    """

    channels: int
    rows: int
    pixels: int
    programs: int
    warps: int
    stages: int


CANDIDATES = (
    FitProjectedConfig(64, 16, 128, 2, 4, 3),
    FitProjectedConfig(64, 16, 128, 2, 4, 1),
    FitProjectedConfig(64, 32, 128, 1, 8, 2),
    FitProjectedConfig(32, 32, 128, 1, 8, 1),
)
MEASURED_STEPS = 12  # of a descent that chooses among configurations
PRECISION = "tf32x3"
FEW = 32  # pixels of a tile of the gradient
COMPARED = 4  # channels of a program that compares
TURNED = 16  # channels of a program that multiplies with directions
TURNED_INPUTS = 64  # of a tile there, at most
WARPS = 4  # of these two


def _whole(count: int, tile: int) -> int:
    return triton.cdiv(count, tile) * tile


def _prepare(problem: FitProjectedProblem) -> dict[str, Any]:
    """What a launch reads, whatever its configuration."""
    operator, directions, base = problem.operator, problem.directions, problem.base
    operator = operator.flatten(3).flatten(1, 2)
    return {
        "maps": operator.transpose(0, 1),
        "base": base.flatten(1).contiguous(),
        "target": problem.target.flatten(1).contiguous(),
        "value": problem.value.flatten(1).contiguous(),
        "shift": None if problem.shift is None else problem.shift.flatten(1),
        "weight": None if problem.weight is None else problem.weight.flatten(2).mT,
        "square": None if problem.style is None else problem.style.square(),
        "basis": torch.einsum("ri,itp->trp", directions, operator) if problem.project_gradient else None,
        "rates": rates_of(problem),
    }


def _padded(part: Tensor | None, *more: int) -> Tensor | None:
    """With so many zeros behind each axis, the last first."""
    return None if part is None else F.pad(part, [each for one in more for each in (0, one)]).contiguous()


class _Descent:
    """The arrays of a descent, and its launches."""

    def __init__(self, problem: FitProjectedProblem, shared: dict[str, Any], config: FitProjectedConfig, steps: int):
        self.problem, self.shared, self.config, self.steps = problem, shared, config, steps
        self.taps, inputs, self.pixels = shared["maps"].shape
        channels, rank = len(problem.base), len(problem.directions)
        self.group = min(config.channels, max(16, triton.next_power_of_2(channels)))
        self.tile = min(config.pixels, max(16, triton.next_power_of_2(self.pixels)))
        self.channels, self.width = _whole(channels, self.group), _whole(self.pixels, self.tile)
        self.inputs, self.ranks = _whole(inputs, config.rows), _whole(max(rank, 1), RANKS)
        self.weights = self.taps * self.inputs
        self.span = self._span()
        self.slices = triton.cdiv(self.weights, self.span)
        self.unknowns = self._arrays(inputs, rank)

    def _span(self) -> int:
        """Weights of a slice: whole tiles, so many that there are about as many programs as wanted."""
        device, config = self.problem.base.device, self.config
        wanted = config.programs * multiprocessors_of(device) * self.group // self.channels
        return triton.cdiv(self.weights // config.rows, max(wanted, 1)) * config.rows

    def _arrays(self, inputs: int, rank: int) -> dict[str, Tensor | None]:
        """By name, with zeros to whole tiles."""
        shared, base = self.shared, self.problem.base
        more, beyond, beside = self.inputs - inputs, self.width - self.pixels, self.ranks - rank
        below = self.channels - len(base)
        turned = base.new_empty(2, self.channels, self.taps, self.ranks)
        change, mean, power = base.new_zeros(3, self.channels, self.taps, self.inputs)
        return {
            "maps": _padded(shared["maps"], beyond, more),
            "change": change,
            "mean": mean,
            "power": power,
            "slopes": base.new_zeros(self.channels, self.width),
            "bend": base.new_zeros(self.channels),
            "weight": _padded(shared["weight"], more, 0, below),
            "square": _padded(shared["square"], more),
            "directions": _padded(self.problem.directions, more, beside) if rank else None,
            "combined": turned[0],
            "leaning": turned[1],
            "basis": _padded(shared["basis"], beyond, beside),
            "partial": base.new_empty(self.slices, self.channels, self.width),
            "norms": base.new_empty(self.slices, self.channels),
            "goal": base.new_empty(self.channels, self.width),
            "losses": base.new_empty(self.channels // COMPARED, self.steps, dtype=torch.float64),
        }

    def _of(self, *names: str) -> list[Tensor | None]:
        return [self.unknowns[name] for name in names]

    def _update(self) -> Callable[..., None]:
        return repeated(
            "fit_projected",
            update_kernel,
            (self.channels // self.group, self.slices, 1),
            *self._of("maps", "change", "mean", "power", "slopes", "bend", "weight", "square", "directions", "leaning"),
            self.shared["rates"],
            *self._of("partial", "norms"),
            self.weights,
            self.inputs,
            self.ranks,
            self.width,
            self.span,
            DEMODULATED=self.problem.weight is not None,
            PROJECTS_GRADIENT=self.problem.project_gradient,
            ONE_TILE=self.width == self.tile,
            CHANNELS=self.group,
            ROWS=self.config.rows,
            PIXELS=self.tile,
            FEW=min(FEW, self.tile),
            PRECISION=PRECISION,
            num_warps=self.config.warps,
            num_stages=self.config.stages,
            enable_fp_fusion=False,
        )

    def _compare(self) -> Callable[..., None]:
        problem, shift = self.problem, self.shared["shift"]
        return repeated(
            "fit_projected",
            compare_kernel,
            (self.channels // COMPARED, 1, 1),
            *self._of("partial", "norms"),
            self.shared["base"],
            self.shared["target"],
            self.shared["value"],
            shift,
            *self._of("goal", "slopes", "bend", "losses"),
            self.slices,
            len(problem.base),
            self.channels,
            self.pixels,
            self.width,
            *((0, 0) if shift is None else shift.stride()),
            self.steps,
            1 / problem.base.numel(),
            float(problem.eps),
            float(problem.slope),
            float(problem.gain),
            ABSOLUTE=problem.loss == "l1",
            DEMODULATED=problem.weight is not None,
            SHIFT=shift is not None,
            CHANNELS=COMPARED,
            PIXELS=self.tile,
            num_warps=WARPS,
            enable_fp_fusion=False,  # a value and the goal that is equal to it must leave nothing
        )

    def _project(self) -> Callable[..., None]:
        return repeated(
            "fit_projected",
            project_kernel,
            (self.channels // TURNED, self.taps, 1),
            *self._of("change", "directions", "combined"),
            self.weights,
            self.inputs,
            self.ranks,
            CHANNELS=TURNED,
            ROWS=math.gcd(self.inputs, TURNED_INPUTS),
            PRECISION=PRECISION,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )

    def _lean(self) -> Callable[..., None]:
        return repeated(
            "fit_projected",
            lean_kernel,
            (self.channels // TURNED, self.taps, 1),
            *self._of("slopes", "bend", "change", "weight", "square", "directions", "basis", "leaning"),
            self.weights,
            self.inputs,
            self.ranks,
            self.width,
            DEMODULATED=self.problem.weight is not None,
            CHANNELS=TURNED,
            ROWS=math.gcd(self.inputs, TURNED_INPUTS),
            PIXELS=min(FEW, self.tile),
            PRECISION=PRECISION,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )

    def run(self) -> tuple[Tensor, Tensor]:
        """Coefficients [channels, taps, directions or inputs], padded behind; sums of losses [programs, steps]."""
        update, compare, project, lean = self._update(), self._compare(), self._project(), self._lean()
        projects, every = len(self.problem.directions) > 0, self.problem.project_every
        update(0)  # demodulation's norm of the layer's own weights, as at all steps
        compare(0)
        for step in range(1, self.steps + 1):
            if self.problem.project_gradient:
                lean()
            update(step)
            if projects and ((step - 1) % every == 0 or step == self.steps):
                project()
                if step < self.steps:
                    update(0)
            if step < self.steps:
                compare(step)
        found, losses = self._of("combined" if projects else "change", "losses")
        assert found is not None and losses is not None
        return found[: len(self.problem.base)], losses


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
        return _Descent(problem, shared(), config, steps).run()

    with on_device_of(problem.base):
        config = config or _configuration(problem, descend)
        for _ in [None] if progress is None else progress(iter([(0, 1)]), 1):
            coefficients, losses = descend(config, problem.steps)
    coefficients = coefficients[..., : rank or inputs].transpose(1, 2)
    return coefficients.reshape(channels, rank or inputs, *kernel), losses.sum(0) / problem.base.numel()
