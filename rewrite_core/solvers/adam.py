"""``adam``: Adam on Lambda through autograd; works for any layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from .objective import Objective
from .problem import LayerProblem, LayerSolution
from .stepwise import Stepwise, finite_loss


@dataclasses.dataclass(frozen=True)
class Adam(Stepwise):
    """Adam on Lambda alone, from zero (the reference's "linear insert"), through autograd: for any layer.

    Args:
        steps: at least 1.
        lr: learning rate, above 0.
    """

    name: ClassVar[str] = "adam"
    preserves: ClassVar[bool] = True
    beyond: ClassVar[bool] = True

    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """One problem after the other; no kernel runs it, whatever the `backend`."""
        return [self._solve(problem, progress) for problem in problems]

    def _solve(self, problem: LayerProblem, progress: bool) -> LayerSolution:
        objective = Objective(problem)
        coefficients = objective.zero().requires_grad_()
        optimiser = torch.optim.Adam([coefficients], lr=self.lr)
        losses = []
        for _ in self.counted(progress):
            with torch.enable_grad():
                total, distance = objective(coefficients)
            (coefficients.grad,) = torch.autograd.grad(total, coefficients)
            optimiser.step()
            losses.append(finite_loss(distance.detach()))
        final = coefficients.detach()
        with torch.no_grad():
            final_loss = objective(final)[1].item()
        return LayerSolution(final, losses, self.name, final_loss, iterations=self.steps)
