"""``zero``: no fit, but the change that takes the weight's projection on the directions away."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from .base import Solver
from .problem import LayerProblem, LayerSolution


@dataclasses.dataclass(frozen=True)
class Removal(Solver):
    """``Lambda = (amount - W0) D^T``: the projection of W0 on D goes, and `amount` times that of an all-ones weight
    comes in its place, as in the reference. It needs no region."""

    amount: float = 0.0
    name: ClassVar[str] = "zero"

    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """In float64; at once, so without `progress`, and with no kernel to choose by `backend`."""
        return [self._solve(problem) for problem in problems]

    def _solve(self, problem: LayerProblem) -> LayerSolution:
        weight, rows, groups = problem.layer.weight.double(), problem.directions, problem.layer.groups
        change = self.amount * torch.ones_like(weight) - weight
        parts = zip(change.chunk(groups), rows.chunk(groups, 1))
        coefficients = torch.cat(
            [  # a group has its own part of the directions, orthonormal where it is all of them
                torch.einsum("oi...,ir->or...", part.unflatten(1, (groups, -1))[:, j], torch.linalg.pinv(own))
                for j, (part, own) in enumerate(parts)
            ]
        )
        return LayerSolution(coefficients, [], self.name, None)
