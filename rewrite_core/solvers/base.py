"""What all solvers have in common: a name, and a way to run."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from .problem import LayerProblem, LayerSolution


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """One way to find the coefficients Lambda, with its own options, which are checked as it is made."""

    name: ClassVar[str]
    preserves: ClassVar[bool] = False  # whether it has the preserve term
    beyond: ClassVar[bool] = False  # whether it takes goals beyond the layer (pictures, activations)
    reduced: ClassVar[bool] = True  # whether it goes along directions; else along every input channel

    @abc.abstractmethod
    def solve(
        self, problems: Sequence[LayerProblem], *, progress: bool = False, backend: str = "auto"
    ) -> list[LayerSolution]:
        """The solutions of problems of one layer, with the same loss and rank."""
