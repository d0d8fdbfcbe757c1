"""What the solvers that go step by step have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from torch import Tensor

from ..errors import NonFiniteError, SolverError, choice, number, whole_number
from ..progress import progress_bar
from .base import Solver

KEEPS = ("best", "last")  # which step's weight is the solution


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


@dataclasses.dataclass(frozen=True)
class Scaled(Stepwise):
    """Steps as long as the weight is large, and the best of them.

    Args:
        steps: how many, at least 1.
        lr: Adam's learning rate in parts of the weight, above 0.
        keep: "best", the step with the lowest loss, or "last".
    """

    keep: str = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("keep", choice("keep", self.keep, KEEPS))

    def rate(self, weight: Tensor, inputs: int = 1) -> float:
        """The learning rate for a weight [O, I, *kernel]: `lr` times its root mean square, and for coefficients of
        directions, each of which moves so many `inputs` at once, times the root of their number.

        Raises SolverError where the weight is zero, so that steps have no length.
        """
        scale = weight.detach().double().square().mean().sqrt().item() * math.sqrt(inputs)
        if not scale:
            raise SolverError(
                "The weight is zero everywhere, which gives steps no length; use solver='lm'.", advice={"solver": "lm"}
            )
        return self.lr * scale


class Best:
    """The lowest of the losses seen, and a copy of what had it."""

    def __init__(self) -> None:
        self.loss = math.inf
        self.kept: Tensor | None = None

    def see(self, loss: float, tensor: Tensor) -> None:
        """Keep a copy of `tensor` where no loss was lower."""
        if loss < self.loss:
            self.loss, self.kept = loss, tensor.detach().clone()


def finite_loss(loss: Tensor) -> float:
    """A loss as a number. Raises NonFiniteError."""
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(
            "The loss became NaN or infinite; check the generator's activations, or lower the learning rate."
        )
    return value
