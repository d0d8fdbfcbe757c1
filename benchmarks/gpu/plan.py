"""What a run will know after how many minutes, by the seconds that stages.py expects of every case.

The schedule itself runs them, on a clock that jumps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .schedule import run_stage
from .stages import Case, Stage

MINUTES = (3.0, 5.0, 10.0)  # that are told of


class ImaginedWorker:
    """Says what a process would say, at the times it is expected to."""

    def __init__(self, now: float, stage: Stage, cases: Sequence[Case]):
        at = now + stage.starting
        self.events: list[tuple[float, dict[str, Any] | None]] = []
        for case in cases:
            self.events.append((at, {"begin": case.name}))
            at += case.expected
            self.events.append((at, {"end": case.name, "state": "ok"}))
        self.events.append((at, None))

    def stop(self) -> None:
        self.events.clear()

    def ending(self) -> str:
        return "exit status 0"


class Imagined:
    """A schedule.Launcher without processes."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.ends: list[tuple[float, str, str]] = []  # seconds, stage, case

    def now(self) -> float:
        return self.clock

    def start(self, stage: Stage, cases: Sequence[Case]) -> ImaginedWorker:
        worker = ImaginedWorker(self.clock, stage, cases)
        self.ends += [(at, stage.name, event["end"]) for at, event in worker.events if event and "end" in event]
        return worker

    def wait(self, workers: Sequence[ImaginedWorker], seconds: float) -> list[tuple[ImaginedWorker, Any]]:
        there = [worker for worker in workers if worker.events]
        first = min((worker.events[0][0] for worker in there), default=float("inf"))
        if first > self.clock + seconds:
            self.clock += seconds
            return []
        self.clock = max(self.clock, first)
        return [(worker, worker.events.pop(0)[1]) for worker in there if worker.events[0][0] <= self.clock]


def timetable(stages: Sequence[Stage], seconds: float, before: float = 0.0) -> str:
    """A table of what is known when. `seconds`: what the stages may take; `before`: what came before them (a build)."""
    launcher, lost = Imagined(), set()
    launcher.clock = before
    times = []
    for stage in stages:
        started = launcher.now()
        run_stage(stage, set(), launcher, before + seconds, lambda name, *rest, at=stage.name: lost.add((at, name)))
        times.append((stage, started, launcher.now()))
    done = [(at, stage, case) for at, stage, case in launcher.ends if (stage, case) not in lost]
    lines = []
    if before:
        lines.append(f"{0:5.0f} s to {before:3.0f} s  the library is built")
    for stage, started, ended in times:
        cases = stage.cases
        held = sum((stage.name, case.name) not in lost for case in cases)
        lines.append(f"{started:5.0f} s to {ended:3.0f} s  {stage.name}  {stage.what}: {held} of {len(cases)}")
    for minute in MINUTES:
        known = []
        for stage in stages:
            have = {case for at, name, case in done if name == stage.name and at <= 60 * minute}
            known.append(f"{stage.name} {len(have)} of {len(stage.cases)}")
        lines.append(f"after minute {minute:g}: {', '.join(known)}")
    return "\n".join(lines)
