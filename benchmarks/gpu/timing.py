"""Times of work on a GPU: by replays of a CUDA graph, by events, by the wall clock; and what else only a GPU can tell.

Without a GPU (in a rehearsal, in tests) the wall clock stands for all of them, and what is missing says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..harness import QUANTILES, Contender, Problem, Race
from .worker import why

NO_GPU = "there is no GPU here"
BUDGET = 0.6  # seconds of a case for each of the two ways of timing
REPLAY = 2e-3  # seconds that a graph's replay should last, so that its start does not count
MOST_CALLS, LEAST_ROUNDS, MOST_ROUNDS = 32, 5, 51


def there() -> bool:
    return torch.cuda.is_available()


def synchronize() -> None:
    if there():
        torch.cuda.synchronize()


def sound() -> bool:
    """Whether the GPU still answers: after an illegal access no call of this process succeeds any more."""
    try:
        synchronize()
        if there():
            torch.cuda.empty_cache()  # of a case that ran out of memory
    except RuntimeError:
        return False
    return True


def wall_seconds(run: Callable[[], object]) -> float:
    """Of one call, from an idle GPU to its end, launches included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def event_seconds(run: Callable[[], object]) -> float:
    """Of one call by the GPU's own clock, from its first launch to the end of the last kernel."""
    if not there():
        return wall_seconds(run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """Replays a CUDA graph of so many calls. Raises RuntimeError where a call cannot go into a graph."""
    if not there():
        raise RuntimeError(NO_GPU)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is made at the first call on a stream is made here
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            run()
    return graph.replay


class DeviceRace(Race):
    """Times every contender in two ways, in turns: one call by the wall clock, and replays of a graph of calls.

    times  seconds a call by replays; by events where a contender cannot be captured
    walls  seconds of a call by the wall clock
    by     how `times` were taken, and why not by a graph

    uncaptured  contenders that are not tried to be captured, with the reason
    """

    def __init__(self, problem: Problem, uncaptured: Mapping[str, str] | None = None, budget: float = BUDGET) -> None:
        super().__init__(problem)
        self.walls: dict[str, list[float]] = {contender.name: [] for contender in problem.contenders}
        self.by: dict[str, str] = {}
        self._uncaptured = dict(uncaptured or {})
        self._budget = budget

    def run(self, quick: bool) -> None:
        contenders = self.problem.contenders
        once = {}
        for contender in contenders:
            contender.prepare()
            contender.run()  # compiles and chooses
            contender.prepare()
            once[contender.name] = max(wall_seconds(contender.run), 1e-6)
        for number in range(_rounds(self._budget, sum(once.values()))):
            for contender in self._in_turn(number):
                if contender.rounds is None or number < contender.rounds:
                    contender.prepare()
                    self.walls[contender.name].append(wall_seconds(contender.run))
        ways = {contender.name: self._way(contender, once[contender.name]) for contender in contenders}
        cost = sum(once[name] * calls for name, (_, calls) in ways.items())
        for number in range(_rounds(self._budget, cost)):
            for contender in self._in_turn(number):
                if contender.name in ways and (contender.rounds is None or number < contender.rounds):
                    self._replay(contender, ways)

    def _replay(self, contender: Contender, ways: dict[str, tuple[Callable[[], object], int]]) -> None:
        """One more time. Where a contender does not run any more, as a failed capture may leave a library, its times by
        the wall clock stand for all."""
        call, calls = ways[contender.name]
        try:
            contender.prepare()
            self.times[contender.name].append(event_seconds(call) / calls)
        except Exception as error:
            if not sound():
                raise
            del ways[contender.name]
            self.times[contender.name] = list(self.walls[contender.name])
            self.by[contender.name] = f"the wall clock: {why(error)}"

    def _in_turn(self, number: int) -> list[Contender]:
        """Nobody always follows the same one."""
        contenders = list(self.problem.contenders)
        turn = number % len(contenders)
        return contenders[turn:] + contenders[:turn]

    def _way(self, contender: Contender, once: float) -> tuple[Callable[[], object], int]:
        calls = int(min(max(REPLAY / once, 1), MOST_CALLS))
        reason = self._uncaptured.get(contender.name)
        if reason is None:
            try:
                contender.prepare()
                replay = captured(contender.run, calls)
                self.by[contender.name] = f"replays of a graph of {calls} calls"
                return replay, calls
            except Exception as error:  # whatever a library raises for it
                reason = why(error)
                synchronize()
        self.by[contender.name] = f"events; no graph: {reason}"
        return contender.run, 1

    def more(self, record: dict[str, Any]) -> dict[str, Any]:
        """Adds to harness.measurement's record how each contender was timed, and its times by the wall clock."""
        for name, times in record["contenders"].items():
            p20, p50, p80 = (float(value) for value in np.percentile(self.walls[name], QUANTILES))
            times["wall"] = {"p20": p20, "p50": p50, "p80": p80, "rounds": len(self.walls[name])}
            times["timed_by"] = self.by[name]
        return record


def _rounds(budget: float, cost: float) -> int:
    return int(min(max(budget / cost, LEAST_ROUNDS), MOST_ROUNDS))


def so_far() -> list[tuple[str, Any]]:
    """What was compiled until now; nothing where that is not known."""
    try:
        return compilations()
    except Exception:  # another Triton, or none: `compiled` says so
        return []


def compilations() -> list[tuple[str, Any]]:
    """This package's kernels that Triton compiled in this process: names, and what it made of them."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("rewrite_core.kernels.")]
    functions = {
        id(item): (name, item)
        for module in modules
        for name, item in vars(module).items()
        if isinstance(item, JITFunction)
    }
    caches = [(name, cache) for name, function in functions.values() for cache in function.device_caches.values()]
    return [(name, kernel) for name, cache in caches for kernel in cache[0].values()]


def compiled(before: list[tuple[str, Any]]) -> dict[str, Any]:
    """``kernels``: what the compiler made of those that were compiled since `before`; ``kernels_reason`` where none is
    known."""
    try:
        old = {id(kernel) for _, kernel in before}
        found = [_facts(name, kernel) for name, kernel in compilations() if id(kernel) not in old]
    except Exception as error:  # another Triton, or none
        return {"kernels": [], "kernels_reason": why(error)}
    found = [kernel for number, kernel in enumerate(found) if kernel not in found[:number]]
    return {"kernels": found} if found else {"kernels": [], "kernels_reason": "nothing was compiled for this case"}


def _facts(name: str, kernel: Any) -> dict[str, Any]:
    """Registers of a thread, bytes of it that spill, bytes of shared memory of a program."""
    metadata = getattr(kernel, "metadata", None)
    return {
        "name": name,
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
        "shared": getattr(metadata, "shared", None),
        "warps": getattr(metadata, "num_warps", None),
        "stages": getattr(metadata, "num_stages", None),
    }


def peak_bytes() -> int | None:
    """The most memory that tensors took since the last call."""
    if not there():
        return None
    try:
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    except (RuntimeError, AttributeError):
        return None
    return int(most)
