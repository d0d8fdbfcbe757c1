"""Runs a stage: its groups in processes, within their limits, whatever these processes do.

What a process finished stays; what it was at when it ended or was ended is told of, and another process goes on with
the rest. Processes and the clock come from a launcher (processes.py; tests have one of their own). Imports nothing but
the standard library.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .stages import STARTING, Case, Stage

OVER = "cut off, as the stage's time was over"
Tell = Callable[[str, str, float, str], None]  # case, state, seconds, reason: a line that its process did not write
Show = Callable[[dict[str, Any]], None]  # what a process said at the end of a case whose line it wrote


def _silent(event: dict[str, Any]) -> None:
    return None


class Worker(Protocol):
    def stop(self) -> None:
        """Ends the process and all that it started."""

    def ending(self) -> str:
        """How the process ended, in words, after its events did."""


class Launcher(Protocol):
    def now(self) -> float: ...

    def start(self, stage: Stage, cases: Sequence[Case]) -> Worker: ...

    def wait(self, workers: Sequence[Any], seconds: float) -> list[tuple[Any, dict[str, Any] | None]]:
        """What processes say within so many seconds; None: this one says no more."""


@dataclass
class _Run:
    """A group that is under way."""

    cases: deque[Case]
    worker: Worker | None = None
    since: float = 0.0  # when it last said something
    current: Case | None = None
    part: str | None = None  # of the current case (a test of a file)
    moved: bool = False  # whether this process has got anywhere
    complaint: str = ""

    def limit(self) -> float:
        return self.since + (STARTING if self.current is None else self.current.limit)


@dataclass
class _Stage:
    stage: Stage
    launcher: Launcher
    deadline: float
    tell: Tell
    show: Show
    begun: float | None = None  # the first case
    running: list[_Run] = field(default_factory=list)

    def end(self, started: float) -> float:
        last = self.deadline - (self.stage.reserved if self.stage.seconds is None else 0.0)
        if self.stage.seconds is None:
            return last
        return min(last, (started + STARTING if self.begun is None else self.begun) + self.stage.seconds)

    def run(self, groups: Sequence[Sequence[Case]], lone: int) -> None:
        waiting = deque(_Run(deque(group)) for group in groups if group)
        try:
            self._run(waiting, lone)
        except BaseException:
            for run in self.running:
                if run.worker is not None:
                    run.worker.stop()
            raise
        self._close(waiting)

    def _run(self, waiting: deque[_Run], lone: int) -> None:
        started = self.launcher.now()
        while waiting or self.running:
            now, end = self.launcher.now(), self.end(started)
            if now >= end:
                break
            while waiting and self._may_start(len(waiting), lone):
                self._start(waiting.popleft())
            until = min([end, *(run.limit() for run in self.running)])
            workers = [run.worker for run in self.running if run.worker is not None]
            for worker, event in self.launcher.wait(workers, max(0.0, until - now)):
                run = next((run for run in self.running if run.worker is worker), None)
                if run is not None:
                    self._heard(run, event)
            now = self.launcher.now()
            for run in [run for run in self.running if now >= run.limit()]:
                seconds = now - run.since
                assert run.worker is not None
                run.worker.stop()
                self._ended(run, "timeout", f"ended after {seconds:.0f} s without a result")

    def _may_start(self, waiting: int, lone: int) -> bool:
        if waiting <= lone:  # those that run alone come last
            return not self.running
        return len(self.running) < self.stage.parallel

    def _start(self, run: _Run) -> None:
        run.worker = self.launcher.start(self.stage, list(run.cases))
        run.since, run.current, run.part, run.moved = self.launcher.now(), None, None, False
        self.running.append(run)

    def _heard(self, run: _Run, event: dict[str, Any] | None) -> None:
        now = self.launcher.now()
        if event is None:
            assert run.worker is not None
            self._ended(run, "crashed", run.worker.ending())
            return
        if "complaint" in event:
            run.complaint = str(event["complaint"])
        elif "begin" in event and run.cases and event["begin"] == run.cases[0].name:
            run.current, run.since = run.cases[0], now
            self.begun = now if self.begun is None else self.begun
        elif "end" in event and run.current is not None and event["end"] == run.current.name:
            run.cases.popleft()
            run.current, run.part, run.since, run.moved = None, None, now, True
            self.show(event)
        elif "part" in event:
            run.part, run.since = event["part"], now
            run.moved = run.moved or event["part"] is None

    def _ended(self, run: _Run, state: str, how: str) -> None:
        """A process that is no more: what it was at is told of, and another goes on."""
        self.running.remove(run)
        seconds = self.launcher.now() - run.since
        if run.current is not None and run.part is not None:
            self.tell(run.part, state, seconds, how)  # the file's other tests go on
        elif run.current is not None:
            self.tell(run.current.name, state, seconds, how)
            run.cases.popleft()
        elif run.cases and not run.moved:
            reason = f"its process did not get to its first case: {run.complaint or how}"
            while run.cases:
                self.tell(run.cases.popleft().name, "failed", seconds, reason)
        if run.cases:
            self._start(run)

    def _close(self, waiting: Sequence[_Run]) -> None:
        now = self.launcher.now()
        for run in self.running:
            assert run.worker is not None
            run.worker.stop()
        for run in [*self.running, *waiting]:
            if run.current is not None:
                if run.part is not None:
                    self.tell(run.part, "skipped", now - run.since, OVER)
                self.tell(run.cases.popleft().name, "skipped", now - run.since, OVER)
            for case in run.cases:
                self.tell(case.name, "skipped", 0.0, "no time was left for it")
        self.running.clear()


def run_stage(
    stage: Stage, known: set[str], launcher: Launcher, deadline: float, tell: Tell, show: Show = _silent
) -> None:
    """Run the cases of a stage that are not `known`, till `deadline` (of the launcher's clock) at the latest.

    tell  takes the lines that no process writes: of cases that crashed, hung, could not be started, or had no time
    show  takes what processes say of the others
    """
    groups = [[case for case in group if case.name not in known] for group in stage.groups]
    lone = sum(bool(group) for group in groups[len(groups) - stage.alone :]) if stage.alone else 0
    _Stage(stage, launcher, deadline, tell, show).run(groups, lone)
