"""What a case is, how it is checked, and how its contenders are timed: interleaved, medians, one process.

A suite ``bench_<op>.py`` declares ``OP`` and ``cases(quick)``; the runner and conftest.py do the rest.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewrite_core.backends import BackendUnavailable, select

QUANTILES = (20, 50, 80)


class Refused(Exception):
    """Speed is not reported; the message is one sentence that says why."""


def _nothing() -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do a case's job.

    run      does it once, and is timed
    prepare  runs before each call, not timed (zeroes an accumulator)
    rounds   run it so many times at most (for contenders of many seconds), or None
    part     the share of the case's job that it does, for contenders that would take minutes: 0.001 of the keys, say.
             Its times are recorded as measured; its rate and its ratios are of the part. The best of stock is one of
             the whole job, where there is one
    aside    timed for comparison, and no candidate for the best of stock: what does less than the job, such as a part
             of ours
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = _nothing
    rounds: int | None = None
    part: float = 1.0
    aside: bool = False


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """Something whose rate is the measure of others', timed in every round too: ``operations`` done by ``run``."""

    name: str
    run: Callable[[], Any]
    operations: float


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with its data made.

    operations, traffic  the floors of the job in floating-point operations and bytes (README.md): the same
                         numbers for every contender, whatever it really does
    error                of a contender's result against float64: ours must be <= tolerance to be timed, stock
                         to count as the best
    details              more numbers for the record
    stages               seconds of each part of ours, medians; printed with their shares
    yardstick            for the shares of its rate
    made                 how many of what one run makes, such as (64, "edits"); their number a second is recorded
    """

    ours: Contender
    stock: Sequence[Contender]
    shapes: dict[str, list[int]]
    dtype: str
    operations: float
    traffic: float
    error: Callable[[Any], float]
    error_kind: str
    tolerance: float
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    yardstick: Yardstick | None = None
    made: tuple[int, str] | None = None

    @property
    def contenders(self) -> list[Contender]:
        return [self.ours, *self.stock]


@dataclasses.dataclass(frozen=True)
class Case:
    """A named case; ``make(backend)`` makes its data, with ours bound to that backend by name. Mean ratios are of the
    cases of one group."""

    name: str
    make: Callable[[str], Problem]
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A case whose result was found right, every contender's error, and how the op's own tests went."""

    case: Case
    problem: Problem
    backend: str
    tests: str
    errors: dict[str, float]


def chosen_backend(op: str) -> str:
    """The backend "auto" picks on this CPU. Cases ask for it by name, so a record cannot name another."""
    example = importlib.import_module(f"rewrite_core.ops.{op}_op.register").example("cpu")
    try:
        return select(op, "auto", *example).name
    except (BackendUnavailable, ValueError) as error:  # REWRITE_CORE_BACKEND names one that cannot
        raise Refused(f"{op} has no speed to report: {error}") from error


def check(op: str, case: Case, tests: str, kernel: str) -> Checked:
    """Run every contender once and compare with float64; raises Refused where ours is wrong.

    kernel  the op whose backend is asked for: `op` itself, where that is one of ``rewrite_core.ops``
    """
    backend = chosen_backend(kernel)
    try:
        problem = case.make(backend)
        errors = {}
        for contender in problem.contenders:
            contender.prepare()
            errors[contender.name] = problem.error(contender.run())
    except Exception as failure:
        why = f"case {case.name!r}, {type(failure).__name__}: {failure}"
        raise Refused(f"{op} does not run, so there is no speed to report ({why}).") from failure
    error = errors[problem.ours.name]
    if not error <= problem.tolerance:  # also NaN
        raise Refused(
            f"{op} is wrong here, so its speed is not reported: in case {case.name!r} the "
            f"{problem.error_kind} of backend {backend!r} is {error:.2e}, above {problem.tolerance:.0e}."
        )
    return Checked(case, problem, backend, tests, errors)


class Race:
    """Times the contenders in turns, one call each per round, so that a slower machine is slower for all.

    A round is ``others()`` then ``ours()``: pytest-benchmark can own the loop with the first as its set-up.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.times: dict[str, list[float]] = {contender.name: [] for contender in problem.contenders}
        self.yardstick_times: list[float] = []
        self._round = 0

    def plan(self, quick: bool) -> int:
        """Warms up (not recorded) and says how many rounds to run: a few seconds' worth."""
        start = time.perf_counter()
        for contender in self.problem.contenders:
            if contender.rounds is None:
                contender.prepare()
                contender.run()
        seconds = max(time.perf_counter() - start, 1e-6)
        budget, least, most = (0.2, 3, 21) if quick else (4.0, 11, 201)
        return min(max(math.ceil(budget / seconds), least), most)

    def others(self) -> None:
        # first, as it leaves the cache to the one that follows, and ours always comes last
        if self.problem.yardstick is not None:
            start = time.perf_counter()
            self.problem.yardstick.run()
            self.yardstick_times.append(time.perf_counter() - start)
        stock = list(self.problem.stock)
        turn = self._round % max(len(stock), 1)  # nobody always follows the same one
        for contender in stock[turn:] + stock[:turn]:
            if contender.rounds is None or self._round < contender.rounds:
                self._time(contender)
        self._round += 1
        self.problem.ours.prepare()

    def ours(self) -> None:
        self._time(self.problem.ours, prepared=True)

    def run(self, quick: bool) -> None:
        for _ in range(self.plan(quick)):
            self.others()
            self.ours()

    def _time(self, contender: Contender, prepared: bool = False) -> None:
        if not prepared:
            contender.prepare()
        start = time.perf_counter()
        contender.run()
        self.times[contender.name].append(time.perf_counter() - start)


def rivals(problem: Problem) -> list[Contender]:
    """Whom ours is compared with: those that do the whole job, or, where nobody does, a part of it."""
    candidates = [contender for contender in problem.stock if not contender.aside]
    return [contender for contender in candidates if contender.part == 1.0] or candidates


def measurement(op: str, checked: Checked, race: Race, quick: bool) -> dict[str, Any]:
    """The record of one case, without what is the same for the whole run."""
    problem = checked.problem
    yardstick = None
    if problem.yardstick is not None:
        rate = problem.yardstick.operations / float(np.median(race.yardstick_times)) / 1e9
        yardstick = {"name": problem.yardstick.name, "gflops": rate}
    contenders = {}
    for contender in problem.contenders:
        times, part = race.times[contender.name], contender.part
        p20, p50, p80 = (float(value) for value in np.percentile(times, QUANTILES))
        own = race.times[problem.ours.name]
        contenders[contender.name] = {
            "p20": p20,
            "p50": p50,
            "p80": p80,
            "rounds": len(times),
            "part": part,
            "aside": contender.aside,
            "gflops": part * problem.operations / p50 / 1e9,
            "error": checked.errors[contender.name],
            "paired": float(np.median([time / part / ours for time, ours in zip(times, own)])),
        }
    ours = contenders[problem.ours.name]
    per_second = None
    if problem.made is not None:
        number, what = problem.made
        rates = {name: number * each["part"] / each["p50"] for name, each in contenders.items()}
        per_second = {"what": what, "together": number, **rates}
    others = [contender.name for contender in rivals(problem)]
    able = [name for name in others if checked.errors[name] <= problem.tolerance]  # those that do the job

    def time_of(name: str) -> float:
        return contenders[name]["p50"] / contenders[name]["part"]

    best = min(able or others, key=time_of)
    return {
        "op": op,
        "case": checked.case.name,
        "group": checked.case.group,
        "quick": quick,
        "backend": checked.backend,
        "shapes": problem.shapes,
        "dtype": problem.dtype,
        "details": problem.details,
        "stages": problem.stages,
        **ours,
        "gbytes_per_second": problem.traffic / ours["p50"] / 1e9,
        "operations": problem.operations,
        "bytes": problem.traffic,
        "error_kind": problem.error_kind,
        "tolerance": problem.tolerance,
        "tests": checked.tests,
        "best_stock": best,
        "ratio": time_of(best) / ours["p50"],
        "yardstick": yardstick,
        "per_second": per_second,
        "contenders": contenders,
    }
