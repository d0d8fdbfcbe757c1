"""The trust bound: a change that is too large on ordinary keys ruins other pictures, so it is fitted again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import TrustWarning, warn
from ..layers.bound import BoundLayer
from ..solvers.base import Solver
from ..solvers.lm import LM
from ..solvers.problem import LayerProblem, LayerSolution, combine, is_known
from ..statistics.second_moment import SecondMoment
from ..waits import unlikely
from .sizes import energy_of_factors, energy_of_weight

TRUST = 0.16  # above it changes of other people's generators ruined pictures, below it none did (docs/results.md)
_WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of preserve, where a fit takes milliseconds
_FEW = (1.0, 3.0, 10.0)  # where it takes seconds

Fit = Callable[[Sequence[LayerProblem]], list[LayerSolution]]
Weighted = Callable[[int, LayerProblem, float], LayerProblem]  # problem number i with that weight of preserve


@dataclasses.dataclass(frozen=True)
class Limited:
    """What the trust bound did to a change.

    Attributes:
        size: of the first fit, the change of the layer's output on ordinary keys as a share of that output.
        preserve: the weight that it was fitted with again; None where it was not.
        strength: what its coefficients were multiplied by in the end; 1: nothing.
    """

    size: float
    preserve: float | None = None
    strength: float = 1.0


def sizes_of(layer: BoundLayer, moment: SecondMoment) -> Callable[[LayerProblem, Tensor], Tensor]:
    """A function of a problem and its coefficients: the square of the change's size on keys, on the layer's device."""
    whole = energy_of_weight(layer, moment)
    return lambda problem, coefficients: energy_of_factors(layer, moment, problem.directions, coefficients) / whole


class Bound:
    """The first look at the sizes of some fits, which "lm" calls before it reads anything: on a GPU the answer then
    comes with the fit's own. `passed`: whether any was beyond `trust`; None where nobody looked."""

    def __init__(self, layer: BoundLayer, moment: SecondMoment, trust: float):
        self._size, self.trust = sizes_of(layer, moment), trust
        self.passed: bool | None = None

    def look(self, problem: LayerProblem, coefficients: Tensor) -> None:
        large = unlikely(self._size(problem, coefficients) > self.trust**2)
        self.passed = bool(self.passed) or large


def hold_back(
    layer: BoundLayer,
    moment: SecondMoment,
    solver: Solver,
    problems: list[LayerProblem],
    solutions: list[LayerSolution],
    trust: float,
    fit: Fit,
    weighted: Weighted,
) -> list[Limited | None]:
    """Bring the solutions whose size on keys passes `trust` within it, in place; what was done to each.

    They are fitted again with more and more weight on leaving ordinary keys or pictures alone, until they are within
    it. What still is not, and what has no such term, is scaled back.
    """
    square = sizes_of(layer, moment)
    limits: list[Limited | None] = [None] * len(problems)

    def share(i: int) -> Tensor:
        return square(problems[i], solutions[i].coefficients)

    shares = torch.stack([share(i) for i in range(len(problems))])
    if not unlikely((shares > trust**2).any()):
        return limits

    def size(i: int) -> float:
        return math.sqrt(share(i).item())

    sizes = [math.sqrt(each) for each in shares.tolist()]
    large = [i for i, own in enumerate(sizes) if trust < own < math.inf]  # a weight that is zero has no size
    for i in large:
        limits[i] = Limited(sizes[i])
    for weight in _WEIGHTS if isinstance(solver, LM) else _FEW:
        again = [i for i in large if weight > problems[i].preserve and _has_term(problems[i])]
        for i in again:
            problems[i] = weighted(i, problems[i], weight)
            limits[i] = Limited(sizes[i], weight)
        for i, solution in zip(again, fit([problems[i] for i in again]) if again else [], strict=True):
            solutions[i] = solution
        large = [i for i in large if i not in again or size(i) > trust]
    for i in large:
        limits[i], solutions[i] = _scaled(problems[i], solutions[i], limits[i], trust / size(i))
    for i, limit in enumerate(limits):
        if limit is not None:
            _tell(limit, trust, size(i))
    return limits


def _has_term(problem: LayerProblem) -> bool:
    """Whether leaving other things alone can be asked of its fit."""
    return problem.beyond is not None or is_known(problem)


def _scaled(
    problem: LayerProblem, solution: LayerSolution, limit: Limited | None, strength: float
) -> tuple[Limited, LayerSolution]:
    assert limit is not None
    coefficients = strength * solution.coefficients
    own = problem.own_weight
    weight = own + combine(coefficients, problem.directions.to(coefficients), problem.layer.groups).to(own)
    if problem.beyond is None:
        loss = problem.distance(weight).item()
    else:
        loss = problem.beyond.distance(problem.layer, weight, problem.loss).item()
    scaled = dataclasses.replace(solution, coefficients=coefficients, final_loss=loss)
    return dataclasses.replace(limit, strength=strength), scaled


def _tell(limit: Limited, trust: float, size: float) -> None:
    done = [] if limit.preserve is None else [f"fitted again with preserve={limit.preserve:g}"]
    done += [] if limit.strength == 1 else [f"scaled by {limit.strength:.2g}"]
    warn(
        f"The fit changed the layer's output on ordinary keys by {limit.size:.2g} of itself, which ruins other "
        f"pictures (trust={trust:g}). It was {' and '.join(done)}, and is {size:.2g} now. Fit more of the map, mark "
        "more context or lower the rank; trust=None takes the first fit.",
        TrustWarning,
        advice={"trust": None},
    )
