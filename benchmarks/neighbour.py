"""Ours beside stock PyTorch with one core taken: how much of a lead is left where another process computes?

    python -m benchmarks.neighbour second-moment solve edit [--cases WORDS] [--seconds 1.5]

A case of a suite is timed twice, ours and every stock contender of it in turns: on the machine as it is, and while a
process that only counts is bound to its last core. Printed for both: our median, that of the best stock contender of
the quiet run, and their ratio; then `kept`, the busy ratio over the quiet one, and of a suite its geometric mean. The
suite "edit" is its clicks and its fits; where all stock contenders are of minutes ("part"), only our times.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from .harness import Contender, Problem, chosen_backend
from .runner import suite

SUITES = ("second-moment", "solve", "edit")
LEAST = 5  # rounds


@contextlib.contextmanager
def beside() -> Iterator[subprocess.Popen[bytes]]:
    """While it lasts, a process of its own computes on the last core that this one may use."""
    core = max(os.sched_getaffinity(0))
    counting = (
        f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\n"
        f"while os.getppid() == {os.getpid()}:\n    sum(range(100_000))"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", counting], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def medians(contenders: Sequence[Contender], seconds: float) -> dict[str, float]:
    """One call of each per round, the order turned and reversed from round to round."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    end, round_ = time.perf_counter() + seconds, 0
    while round_ < LEAST or time.perf_counter() < end:
        turn = round_ % len(contenders)
        order = [*contenders[turn:], *contenders[:turn]]
        for contender in reversed(order) if round_ // len(contenders) % 2 else order:
            contender.prepare()
            start = time.perf_counter()
            contender.run()
            times[contender.name].append(time.perf_counter() - start)
        round_ += 1
    return {name: statistics.median(taken) for name, taken in times.items()}


def compare(problem: Problem, seconds: float) -> tuple[dict[str, float], dict[str, float], str | None]:
    """Medians quiet and busy, and the best stock contender, None where there is none to time."""
    able = []
    for contender in problem.stock:
        if contender.aside or contender.rounds is not None:
            continue
        contender.prepare()
        if problem.error(contender.run()) <= problem.tolerance:
            able.append(contender)
    contenders = [problem.ours, *able]
    medians(contenders, 0.0)  # warm
    quiet = medians(contenders, seconds)
    with beside():
        busy = medians(contenders, seconds)
    return quiet, busy, min((each.name for each in able), key=quiet.__getitem__, default=None)


def main() -> int:
    parser = argparse.ArgumentParser(description="Ours beside stock PyTorch, with and without a busy neighbour.")
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--cases", default="", help="those with one of these words, separated by commas, in their name")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each of the two runs of a case")
    parser.add_argument("--quick", action="store_true", help="tiny cases")
    given = parser.parse_args()
    words = given.cases.split(",")
    for name in given.suites:
        module = suite(name)
        backend = chosen_backend(getattr(module, "KERNEL", module.OP))
        kept: list[float] = []
        for case in module.cases(given.quick):
            if not any(word in case.name for word in words):
                continue
            problem = case.make(backend)
            quiet, busy, best = compare(problem, given.seconds)
            ours = problem.ours.name
            line = f"{name}: {case.name:44s} ours {quiet[ours] * 1e3:9.3f} -> {busy[ours] * 1e3:9.3f} ms"
            if best is not None:
                ratios = quiet[best] / quiet[ours], busy[best] / busy[ours]
                kept.append(ratios[1] / ratios[0])
                line += f"  {best}: {ratios[0]:.2f} -> {ratios[1]:.2f} x ours, kept {kept[-1]:.2f}"
            print(line, flush=True)
        if kept:
            mean = math.exp(statistics.fmean(map(math.log, kept)))
            print(f"{name}: kept {mean:.2f}, geometric mean over {len(kept)} cases (worst {min(kept):.2f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
