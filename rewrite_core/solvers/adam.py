"""``adam``: Adam on Lambda through autograd; works for any layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from ..errors import SolverError
from .lm import all_fit_inputs
from .problem import LayerProblem, LayerSolution, combine, is_known
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

    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """One problem after the other; no kernel runs it, whatever the `backend`."""
        return [self._solve(problem, progress) for problem in problems]

    def _solve(self, problem: LayerProblem, progress: bool) -> LayerSolution:
        weight = problem.weight
        directions = problem.directions.to(weight.dtype)
        shape = problem.coefficient_shape
        coefficients = torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        scale = None
        if problem.preserve:
            if not is_known(problem):
                raise SolverError(
                    f"What follows {problem.layer.name!r} is not known per channel: use preserve=0.",
                    advice={"preserve": 0},
                )
            inputs = all_fit_inputs(problem)
            penalty = torch.stack([part["penalty"] for part in inputs]).to(weight.dtype)
            scale = torch.cat([part["penalty_scale"] for part in inputs]).to(weight.dtype)
        optimiser = torch.optim.Adam([coefficients], lr=self.lr)
        losses = []
        with torch.enable_grad():
            for _ in self.counted(progress):
                distance = problem.distance(weight + combine(coefficients, directions))
                objective = distance
                if scale is not None:
                    flat = coefficients.flatten(1).unflatten(0, (len(penalty), -1))
                    bent = torch.einsum("goj,gjk,gok->go", flat, penalty, flat).flatten()
                    objective = distance + (scale * bent).mean()
                optimiser.zero_grad()
                objective.backward()
                optimiser.step()
                losses.append(finite_loss(distance.detach()))
        final = coefficients.detach()
        with torch.no_grad():
            final_loss = problem.distance(weight + combine(final, directions)).item()
        return LayerSolution(final, losses, self.name, final_loss, iterations=self.steps)
