"""What the solvers that go step by step have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from torch import Tensor

from ..errors import NonFiniteError, number, whole_number
from ..progress import progress_bar
from .base import Solver


@dataclasses.dataclass(frozen=True)
class Stepwise(Solver):
    """A solver of so many steps of Adam.

    Args:
        steps: how many, at least 1 (2001 are the reference implementation's).
        lr: Adam's learning rate, above 0.

    Raises:
        RewriteCoreError: an option is of another type or out of range.
    """

    steps: int = 2001
    lr: float = 0.05

    def __post_init__(self) -> None:
        self._set("steps", whole_number("steps", self.steps))
        self._set("lr", number("lr", self.lr, above=0))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: only as it is made

    def counted(self, progress: bool) -> Iterable[int]:
        """The steps, with a progress bar where wanted."""
        return progress_bar(range(self.steps), label=self.name, unit="step", show=progress)


def finite_loss(loss: Tensor) -> float:
    """A loss as a number. Raises NonFiniteError."""
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(
            "The loss became NaN or infinite; check the generator's activations, or lower the learning rate."
        )
    return value
