"""``lbfgs``: the quasi-Newton method on Lambda, through whatever follows the layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import NonFiniteError, whole_number
from ..progress import progress_bar
from .base import Solver
from .objective import Objective
from .problem import LayerProblem, LayerSolution

_SEARCH = 25  # evaluations of one line search at most


@dataclasses.dataclass(frozen=True)
class LBFGS(Solver):
    """L-BFGS (Nocedal 1980) with a line search for the strong Wolfe conditions, on Lambda from zero, through autograd:
    for any layer, and for goals beyond it (``objective="pictures"`` and ``"activation"``), where one evaluation is a
    pass from the layer to the pictures and back. The best Lambda that it met is the solution.

    Args:
        iterations: at most so many, at least 1; it ends before where it converges.
        memory: how many steps it remembers, at least 1.
    """

    iterations: int = 40
    memory: int = 10
    name: ClassVar[str] = "lbfgs"
    preserves: ClassVar[bool] = True
    beyond: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("iterations", "memory"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))

    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """One problem after the other; no kernel runs it, whatever the `backend`."""
        return [self._solve(problem, progress) for problem in problems]

    def _solve(self, problem: LayerProblem, progress: bool) -> LayerSolution:
        met = _Met(Objective(problem))
        optimiser = torch.optim.LBFGS(
            [met.coefficients],
            max_iter=1,
            max_eval=_SEARCH,
            history_size=self.memory,
            line_search_fn="strong_wolfe",
        )
        losses = [met.objective.start]
        with progress_bar(total=self.iterations, label=self.name, unit="step", show=progress) as bar:
            for _ in range(self.iterations):
                before = met.coefficients.detach().clone()
                optimiser.step(met.evaluate)
                losses.append(met.best.distance)
                bar.update(1)
                if torch.equal(before, met.coefficients):  # converged
                    break
        return LayerSolution(met.best.coefficients, losses, self.name, met.best.distance, iterations=len(losses) - 1)


@dataclasses.dataclass(frozen=True)
class _Place:
    """One evaluation."""

    coefficients: Tensor
    total: Tensor
    gradient: Tensor
    distance: float


class _Met:
    """The objective at all the places that were met, from Lambda = 0 on."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.coefficients = objective.zero().requires_grad_()
        self.best = self._look()
        self._last = [self.best]
        if not math.isfinite(self.best.total.item()) or not self.best.gradient.isfinite().all():
            raise NonFiniteError(
                "The objective or its gradient is NaN or infinite where nothing is changed; check the generator's "
                "activations."
            )

    def evaluate(self) -> Tensor:
        """The objective now, its gradient set. Torch begins each step with the place that the last one ended at."""
        known = [place for place in self._last if torch.equal(place.coefficients, self.coefficients)]
        place = known[0] if known else self._look()
        self._last = [*self._last[-_SEARCH:], place]
        if place.total < self.best.total:  # never so where it is NaN
            self.best = place
        self.coefficients.grad = place.gradient.clone(memory_format=torch.contiguous_format)
        return place.total

    def _look(self) -> _Place:
        with torch.enable_grad():
            total, distance = self.objective(self.coefficients)
            (gradient,) = torch.autograd.grad(total, self.coefficients)
        return _Place(self.coefficients.detach().clone(), total.detach(), gradient, distance.item())
