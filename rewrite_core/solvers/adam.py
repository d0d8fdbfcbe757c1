"""``adam``: Adam on Lambda through autograd; works for any layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from .objective import Objective
from .problem import LayerProblem, LayerSolution
from .stepwise import Best, Scaled, finite_loss


@dataclasses.dataclass(frozen=True)
class Adam(Scaled):
    """Adam on Lambda alone, from zero (the reference's "linear insert"), through autograd: for any layer.

    Args:
        steps: at least 1.
        lr: learning rate, above 0, in parts of the root mean square of the weight's rows over the input channels. (The
            reference's is 0.05 whatever the weight.)
        keep: "best" returns the step where the loss, with the preserve term, was lowest, "last" the last one.
    """

    lr: float = 0.01
    name: ClassVar[str] = "adam"
    preserves: ClassVar[bool] = True
    beyond: ClassVar[bool] = True

    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """One problem after the other; no kernel runs it, whatever the `backend`."""
        return [self._solve(problem, progress) for problem in problems]

    def _solve(self, problem: LayerProblem, progress: bool) -> LayerSolution:
        objective, best = Objective(problem), Best()
        coefficients = objective.zero().requires_grad_()
        optimiser = torch.optim.Adam([coefficients], lr=self.rate(objective.weight, objective.weight.shape[1]))
        losses = []
        for _ in self.counted(progress):
            with torch.enable_grad():
                total, distance = objective(coefficients)
            losses.append(finite_loss(distance.detach()))
            best.see(finite_loss(total.detach()), coefficients)
            (coefficients.grad,) = torch.autograd.grad(total, coefficients)
            optimiser.step()
        with torch.no_grad():
            total, distance = objective(coefficients)
            best.see(total.item(), coefficients)
            final = coefficients.detach() if self.keep == "last" or best.kept is None else best.kept
            final_loss = objective(final)[1].item()
        return LayerSolution(final, losses, self.name, final_loss, iterations=self.steps, last_loss=distance.item())
