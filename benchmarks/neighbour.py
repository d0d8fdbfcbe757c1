"""Ours beside stock PyTorch with one core taken: how much of a lead is left where another process computes?

    rewrite bench neighbour
    python -m benchmarks.neighbour second-moment solve edit [--cases WORDS] [--seconds 1.5]

A case of a suite is timed twice, ours and every stock contender of it in turns: on the machine as it is, and while a
process that only counts is bound to its last core. Printed for both: our median, that of the best stock contender of
the quiet run, and their ratio; then `kept`, the busy ratio over the quiet one, and of a suite its geometric mean.
Stock that takes many seconds, or does a part of the job, runs as seldom as in the suite, and only where no other does
the job.
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
from pathlib import Path

from .harness import Contender, Problem, chosen_backend, rivals
from .lines import append
from .report import QUIET, disturbance, environment
from .runner import suite

SUITES = ("second-moment", "solve", "edit")
LEAST = 5  # rounds
SECONDS = 1.5  # of each of the two runs of a case


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
    """Seconds of the whole job; one call of each per round, the order turned and reversed from round to round."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    end, round_ = time.perf_counter() + seconds, 0
    while round_ < LEAST or time.perf_counter() < end:
        turn = round_ % len(contenders)
        order = [*contenders[turn:], *contenders[:turn]]
        for contender in reversed(order) if round_ // len(contenders) % 2 else order:
            if contender.rounds is not None and round_ >= contender.rounds:
                continue
            contender.prepare()
            start = time.perf_counter()
            contender.run()
            times[contender.name].append((time.perf_counter() - start) / contender.part)
        round_ += 1
    return {name: statistics.median(taken) for name, taken in times.items()}


def compare(problem: Problem, seconds: float) -> tuple[dict[str, float], dict[str, float], str]:
    """Medians quiet and busy, and the best stock contender."""
    able = []
    for contender in rivals(problem):
        if contender.rounds is None:
            contender.prepare()
            if problem.error(contender.run()) <= problem.tolerance:
                able.append(contender)
    warm = [problem.ours, *able]
    contenders = [problem.ours, *(able or rivals(problem))]
    medians(warm, 0.0)
    quiet = medians(contenders, seconds)
    with beside():
        busy = medians(contenders, seconds)
    return quiet, busy, min((each.name for each in contenders[1:]), key=quiet.__getitem__)


def measure(suites: Sequence[str], words: Sequence[str], seconds: float, quick: bool, path: Path | None) -> None:
    """Print every case of the suites that has one of the words in its name, and append a line for it to `path`."""
    here = environment()
    if here["load"] > QUIET:
        print(f"note: {disturbance(here)}", flush=True)
    for name in suites:
        module = suite(name)
        backend = chosen_backend(getattr(module, "KERNEL", module.OP))
        kept: list[float] = []
        for case in module.cases(quick):
            if not any(word in case.name for word in words):
                continue
            problem = case.make(backend)
            quiet, busy, best = compare(problem, seconds)
            ours = problem.ours.name
            ratios = quiet[best] / quiet[ours], busy[best] / busy[ours]
            kept.append(ratios[1] / ratios[0])
            print(
                f"{name}: {case.name:44s} ours {quiet[ours] * 1e3:9.3f} -> {busy[ours] * 1e3:9.3f} ms  {best}: "
                f"{ratios[0]:.2f} -> {ratios[1]:.2f} x ours, kept {kept[-1]:.2f}",
                flush=True,
            )
            if path is not None:
                found = {"suite": name, "case": case.name, "quick": quick, "quiet": quiet, "busy": busy}
                append(path, {**here, **found, "best_stock": best, "kept": kept[-1]})
        if kept:
            mean = math.exp(statistics.fmean(map(math.log, kept)))
            print(f"{name}: kept {mean:.2f}, geometric mean over {len(kept)} cases (worst {min(kept):.2f})")


def main(out: Path, quick: bool) -> int:
    """``rewrite bench neighbour``: every case of every suite; the exit status of :func:`.runner.main`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{environment()['machine']}.neighbour{'.quick' * quick}.jsonl"
    measure(SUITES, [""], 0.01 if quick else SECONDS, quick, path)
    print(f"-> {path}")
    return 0


def begin() -> None:
    parser = argparse.ArgumentParser(description="Ours beside stock PyTorch, with and without a busy neighbour.")
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--cases", default="", help="those with one of these words, separated by commas, in their name")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each of the two runs of a case")
    parser.add_argument("--quick", action="store_true", help="tiny cases")
    given = parser.parse_args()
    measure(given.suites, given.cases.split(","), given.seconds, given.quick, None)


if __name__ == "__main__":
    begin()
