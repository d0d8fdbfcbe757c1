"""Two installations of rewrite_core side by side, case by case: is the newer one slower anywhere?

    python -m benchmarks.before_after OLD_PYTHON NEW_PYTHON solve second-moment edit collect

Each Python has its own rewrite_core (with its benchmarks). Both make the same case; then they take turns, one short
round after the other in alternating order, so that a busy moment of the machine meets both. Only ours is timed. Where
a process's memory happens to lie moves a short call by several per cent, so each case has several pairs of fresh
processes. Printed: medians, and the ratio new / old as the median over all rounds, with those of the lowest and the
highest pair.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

PAIRS, ROUNDS, LEAST = 5, 5, 0.15  # a round is so many seconds of calls at least, one call where that takes longer


def work() -> None:
    """In one of the two: obey lines of JSON until the end of standard input."""
    problem: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        if "suite" in order:
            module = importlib.import_module(f"rewrite_core.benchmarks.bench_{order['suite']}")
            found = {case.name: case for case in module.cases(order["quick"])}
            answer: Any = list(found)
            if "case" in order:
                from rewrite_core.benchmarks.harness import chosen_backend

                problem = found[order["case"]].make(chosen_backend(getattr(module, "KERNEL", module.OP)))
                answer = None
        else:
            times: list[float] = []
            while len(times) < order["calls"] if order["calls"] else sum(times) < LEAST:
                problem.ours.prepare()
                start = time.perf_counter()
                problem.ours.run()
                times.append(time.perf_counter() - start)
            answer = [len(times), statistics.median(times)]
        print(json.dumps(answer), flush=True)


class Side:
    """One installation, in a process of its own."""

    def __init__(self, python: str):
        code = f"import runpy; runpy.run_path({__file__!r})['work']()"
        self._process = subprocess.Popen(
            [os.path.abspath(python), "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("One of the two stopped; what it wrote is above.")
        return json.loads(answer)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it


def compare(old: Side, new: Side) -> tuple[list[float], list[float]]:
    """Medians of each round, old and new."""
    calls, _ = old.ask(calls=0)
    new.ask(calls=0)  # both are warm now
    rounds: tuple[list[float], list[float]] = [], []
    for number in range(ROUNDS):
        for which in (0, 1) if number % 2 else (1, 0):
            rounds[which].append((old, new)[which].ask(calls=calls)[1])
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description="Time ours of two installations, side by side.")
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("suites", nargs="+", choices=("second-moment", "solve", "edit", "collect"))
    parser.add_argument("--cases", default="", help="those with this in their name")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"of fresh processes for each case ({PAIRS})")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    slower = 0
    for suite in (name.replace("-", "_") for name in given.suites):
        asked = {"suite": suite, "quick": given.quick}
        with Side(given.old) as old, Side(given.new) as new:
            known, cases = old.ask(**asked), new.ask(**asked)
        for case in (name for name in cases if given.cases in name):
            if case not in known:
                print(f"{suite}: {case}: only in the new one", flush=True)
                continue
            before: list[float] = []
            after: list[float] = []
            pairs: list[float] = []
            for _ in range(given.pairs):
                with Side(given.old) as old, Side(given.new) as new:
                    for side in (old, new):
                        side.ask(**asked, case=case)
                    rounds = compare(old, new)
                pairs.append(statistics.median(b / a for a, b in zip(*rounds, strict=True)))
                before, after = before + rounds[0], after + rounds[1]
            ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
            slower += ratio > 1.03
            times = "  ".join(f"{statistics.median(part) * 1e3:9.3f} ms" for part in (before, after))
            print(f"{suite}: {case:58s} {times}  {ratio:.3f}  ({min(pairs):.2f} to {max(pairs):.2f})", flush=True)
    print(f"{slower} cases are more than 3 % slower")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
