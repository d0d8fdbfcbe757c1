"""Which solver: an object that holds its options, or the name of one with its defaults."""

from __future__ import annotations

from ..errors import ArgumentError, SolverError
from .adam import Adam
from .base import Solver
from .lbfgs import LBFGS
from .lm import LM
from .projected import Projected, Unconstrained

SOLVERS: dict[str, type[Solver]] = {kind.name: kind for kind in (LM, LBFGS, Projected, Adam, Unconstrained)}


def solver_of(given: str | Solver) -> Solver:
    """The solver that `given` is or names.

    Raises:
        SolverError: no solver has that name. ArgumentError: it is neither.
    """
    if isinstance(given, Solver):
        return given
    if isinstance(given, str):
        if given not in SOLVERS:
            raise SolverError(f"There is no solver {given!r}; choose from {list(SOLVERS)}.")
        return SOLVERS[given]()
    options = ", ".join(f"rc.{kind.__name__}(...)" for kind in SOLVERS.values())
    what = given.__name__ if isinstance(given, type) else type(given).__name__
    raise ArgumentError(f"solver is one of {list(SOLVERS)} or of {options}, not {what}.")
