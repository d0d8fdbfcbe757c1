"""What solvers that go by gradients make small: the distance to the goal, and what stands beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError, SolverError
from .lm import all_fit_inputs
from .problem import LayerProblem, combine, is_known


class Objective:
    """A problem as a function of Lambda [O, R, *kernel], differentiable.

    Where values are compared it is the distance, and the preserve term as it is. Where what follows the layer is
    compared it is ``distance + value_weight * value distance + preserve * change of ordinary pictures``: the first two
    each divided by what it is at Lambda = 0, the third by what the first is.

    Raises SolverError where there is a preserve term and it is not known what follows the layer per channel;
    NonFiniteError where the distance at Lambda = 0 is not finite.
    """

    def __init__(self, problem: LayerProblem):
        self.problem = problem
        self.weight = problem.own_weight
        self.directions = problem.directions.to(self.weight)
        self._penalty = _penalty(problem) if problem.preserve and problem.beyond is None else None
        with torch.no_grad():
            self.start = self._distance(self.weight).item()
            value = problem.distance(self.weight).item() if problem.value_weight else 1.0
        if not torch.isfinite(torch.tensor([self.start, value])).all():
            raise NonFiniteError(
                "The loss is NaN or infinite before the first step; check the goal and the generator's activations."
            )
        self._scale, self._value_scale = self.start or 1.0, value or 1.0

    def zero(self) -> Tensor:
        """Lambda = 0."""
        return torch.zeros(self.problem.coefficient_shape, dtype=self.weight.dtype, device=self.weight.device)

    def __call__(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """The objective, and the distance to the goal in it, as it is."""
        problem = self.problem
        weight = self.weight + combine(coefficients, self.directions, problem.layer.groups)
        distance = self._distance(weight)
        if problem.beyond is None:
            return (distance if self._penalty is None else distance + self._bent(coefficients)), distance
        total = distance / self._scale
        if problem.value_weight:
            total = total + problem.value_weight * problem.distance(weight) / self._value_scale
        if problem.ordinary is not None:
            changed = problem.ordinary.distance(problem.layer, weight, problem.loss)
            total = total + problem.preserve * changed / self._scale
        return total, distance

    def _distance(self, weight: Tensor) -> Tensor:
        problem = self.problem
        if problem.beyond is None:
            return problem.distance(weight)
        return problem.beyond.distance(problem.layer, weight, problem.loss)

    def _bent(self, coefficients: Tensor) -> Tensor:
        assert self._penalty is not None
        penalty, scale = self._penalty
        flat = coefficients.flatten(1).unflatten(0, (len(penalty), -1))
        return (scale * torch.einsum("goj,gjk,gok->go", flat, penalty, flat).flatten()).mean()


def _penalty(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """The preserve term's quadratic form of each group, [groups, J, J], and its scale for each output channel [O]."""
    if not is_known(problem):
        raise SolverError(
            f"What follows {problem.layer.name!r} is not known per channel: use preserve=0.", advice={"preserve": 0}
        )
    inputs = all_fit_inputs(problem)
    return inputs["penalty"].to(problem.dtype), inputs["penalty_scale"].flatten().to(problem.dtype)
