"""Solvers that step on all of W.

``projected``      the reference implementation's: Adam on W, projected back to D every few steps
``unconstrained``  Adam on W, no directions: the baseline

Fused (ops.fit_projected) where a kernel can take the problem and what follows the layer is known per channel; else
through autograd, which makes the same steps but for rounding. The status says which. `backend`: "triton" and "cpp"
insist on the one, "reference" on the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..backends import select
from ..errors import SolverError, flag, whole_number
from ..progress import progress_bar
from .problem import LayerProblem, LayerSolution, after, combine, is_known
from .stepwise import Best, Scaled, Stepwise, finite_loss


@dataclasses.dataclass(frozen=True)
class Projected(Stepwise):
    """The reference implementation's algorithm: Adam on W, and after steps 0, 10, 20, ... and the last one W is
    replaced by its original part orthogonal to D plus its own projection on D.

    Its last step is the change, as it is the reference's, and may be worse than an earlier one, or than none.

    Args:
        steps: at least 1.
        lr: learning rate, above 0; whatever the weight's scale, as in the reference.
        project_every: so many steps lie between projections, at least 1.
        project_gradient: project every gradient on D, too.
    """

    project_every: int = 10
    project_gradient: bool = False
    name: ClassVar[str] = "projected"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("project_every", whole_number("project_every", self.project_every))
        self._set("project_gradient", flag("project_gradient", self.project_gradient))

    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """One problem after the other."""
        return [self._solve(problem, progress, backend) for problem in problems]

    def _solve(self, problem: LayerProblem, progress: bool, backend: str) -> LayerSolution:
        original = problem.weight
        directions = problem.directions.to(original.dtype)
        if _fuses(problem, backend):
            options = {"project_every": self.project_every, "project_gradient": self.project_gradient}
            fit, losses = _fused(
                problem, self.steps, self.lr, self.name, progress, backend, directions=directions, **options
            )
            change = combine(fit, directions)
            with torch.no_grad():
                final_loss = problem.distance(original + change).item()
            status = {"fused": len(original)}
            return LayerSolution(fit, losses, self.name, final_loss, status, self.steps, final_loss)
        orthogonal = original - _project(original, directions)

        def project(step: int, weight: Tensor) -> None:
            if step % self.project_every == 0 or step == self.steps - 1:
                weight.copy_(orthogonal + _project(weight, directions))

        change_gradient = (lambda gradient: _project(gradient, directions)) if self.project_gradient else None
        weight, losses, final_loss = _descend(problem, self, self.lr, progress, project, change_gradient)
        coefficients = torch.einsum("oi...,ri->or...", (weight - original).double(), directions.double())
        status = {"autograd": len(original)}
        return LayerSolution(
            coefficients.to(original.dtype), losses, self.name, final_loss, status, self.steps, final_loss
        )


@dataclasses.dataclass(frozen=True)
class Unconstrained(Scaled):
    """Adam on all of W: the baseline. Its directions are the identity, its coefficients the whole change.

    Args:
        steps: at least 1.
        lr: learning rate in parts of the weight's root mean square, above 0. (The reference's is 0.05 whatever the
            weight.)
        keep: "best" returns the step with the lowest loss, "last" the last one. Fused, the steps to the best one are
            made twice.
    """

    lr: float = 0.002
    name: ClassVar[str] = "unconstrained"
    reduced: ClassVar[bool] = False

    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """One problem after the other."""
        return [self._solve(problem, progress, backend) for problem in problems]

    def _solve(self, problem: LayerProblem, progress: bool, backend: str) -> LayerSolution:
        original = problem.weight
        rate = self.rate(original)

        def loss_of(change: Tensor) -> float:
            with torch.no_grad():
                return problem.distance(original + change).item()

        if not _fuses(problem, backend):
            best = Best()
            last, losses, last_loss = _descend(problem, self, rate, progress, best=best)
            kept = last if self.keep == "last" or best.kept is None else best.kept
            change, status = kept - original, {"autograd": len(original)}
        else:
            change, losses = _fused(problem, self.steps, rate, self.name, progress, backend)
            last_loss, status = loss_of(change), {"fused": len(original)}
            steps = min(range(len(losses)), key=losses.__getitem__)  # losses[n]: after n steps
            if self.keep == "best" and losses[steps] < last_loss:
                change = torch.zeros_like(change)
                if steps:
                    change, _ = _fused(problem, steps, rate, self.name, progress, backend)
        return LayerSolution(change, losses, self.name, loss_of(change), status, self.steps, last_loss)


def _project(weight: Tensor, directions: Tensor) -> Tensor:
    return combine(torch.einsum("oi...,ri->or...", weight, directions), directions)


def _fuses(problem: LayerProblem, backend: str) -> bool:
    """Whether ops.fit_projected has a kernel for this problem, by `backend`."""
    layer, regions = problem.layer, problem.regions
    if len(layer.kernel_size) != 2 or layer.groups != 1:  # the kernel is for dense 2-D convolutions
        if backend not in ("auto", "reference"):
            raise SolverError(f"{layer.name!r} is no dense 2-D convolution: use backend='auto'.")
        return False
    first = regions[0][1]
    places = first.shape[2:] if len(regions) == 1 else (1, sum(math.prod(goal.shape[2:]) for _, goal in regions))
    shape = layer.in_channels, *layer.kernel_size, *places
    chosen = select("fit_projected", backend, first.new_empty(()).expand(shape)).name
    reason = None
    if not is_known(problem):
        reason = f"What follows {layer.name!r} is not known per channel"
    else:
        styles = [style for capture, _ in regions if (style := after(problem, capture).style) is not None]
        if not all(torch.equal(style, styles[0]) for style in styles):
            reason = "The pastes are on pictures of different styles, and the kernel knows one demodulation"
    if chosen != "reference" and backend != "auto" and reason:
        raise SolverError(f"{reason}: use backend='auto'.")
    return chosen != "reference" and not reason


def _maps(problem: LayerProblem) -> dict[str, Tensor]:
    """What ops.fit_projected takes of each region; of several, their pixels side by side in one row."""
    layer, weight, taps = problem.layer, problem.weight, math.prod(problem.layer.kernel_size)
    maps: dict[str, list[Tensor]] = {name: [] for name in ("operator", "base", "target", "value", "shift")}
    kernels = torch.eye(taps, dtype=weight.dtype, device=weight.device).reshape(taps, 1, *layer.kernel_size)
    for capture, target in problem.regions:
        operator = layer.linear(capture.key.transpose(0, 1), kernels)  # of each input map by itself
        shift = after(problem, capture).shift
        shift = weight.new_zeros(()) if shift is None else shift.to(weight)
        maps["operator"].append(operator.reshape(len(operator), *layer.kernel_size, *operator.shape[2:]))
        maps["base"].append(layer.linear(capture.key, weight)[0])
        maps["target"].append(target[0])
        maps["value"].append(layer.value(capture, weight)[0])
        maps["shift"].append(shift.expand(target.shape)[0])
    if len(problem.regions) == 1:
        return {name: parts[0] for name, parts in maps.items()}
    return {name: torch.cat([part.flatten(-2)[..., None, :] for part in parts], -1) for name, parts in maps.items()}


def _fused(
    problem: LayerProblem, steps: int, lr: float, label: str, progress: bool, backend: str, **options: Any
) -> tuple[Tensor, list[float]]:
    """All steps in one kernel call: the coefficients (without directions the change), and the loss before each step."""
    weight, operation = problem.weight, after(problem, problem.regions[0][0])

    def bar(ranges: Iterable[Any], count: int) -> Iterable[Any]:
        return progress_bar(ranges, total=count, label=label, unit="part")

    with torch.no_grad():
        maps: dict[str, Any] = {**_maps(problem)}
        if operation.shift is None:
            del maps["shift"]
        style = None if operation.style is None else operation.style[0].to(weight)
        fit = ops.fit_projected(
            **maps,
            demodulation=None if style is None else (weight, style, operation.eps),
            slope=operation.slope,
            gain=operation.gain,
            loss=problem.loss,
            steps=steps,
            lr=lr,
            backend=backend,
            progress=bar if progress else None,
            **options,
        )
        return fit.coefficients, [finite_loss(loss) for loss in fit.losses.cpu()]


def _descend(
    problem: LayerProblem,
    solver: Stepwise,
    lr: float,
    progress: bool,
    project: Callable[[int, Tensor], None] | None = None,
    change_gradient: Callable[[Tensor], Tensor] | None = None,
    best: Best | None = None,
) -> tuple[Tensor, list[float], float]:
    """The steps through autograd: the weight, the losses, and the loss at the end; `best` is shown every step."""
    weight = problem.weight.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([weight], lr=lr)
    losses = []
    with torch.enable_grad():
        for step in solver.counted(progress):
            loss = problem.distance(weight)
            losses.append(finite_loss(loss.detach()))
            if best is not None:
                best.see(losses[-1], weight)
            optimiser.zero_grad()
            loss.backward()
            assert weight.grad is not None
            if change_gradient is not None:
                weight.grad.copy_(change_gradient(weight.grad))
            optimiser.step()
            if project is not None:
                with torch.no_grad():
                    project(step, weight)
    with torch.no_grad():
        last_loss = problem.distance(weight).item()
        if best is not None:
            best.see(last_loss, weight)
    return weight.detach(), losses, last_loss
