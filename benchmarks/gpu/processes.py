"""Real processes for schedule.py. Imports nothing but the standard library.

Each leads a process group, so that all it started ends with it, but no session: whoever ends this program's session
ends them too."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .stages import Case, Stage

LOOK = 0.25  # seconds between looks at processes that ended but whose pipe something else holds open
# the worker from the checkout, whose imports need no library
START = "import sys; sys.path.insert(0, sys.argv[1]); from benchmarks.gpu.worker import main; del sys.path[0]; main()"


def end_group(process: subprocess.Popen) -> None:
    """SIGKILL to a process and what it started. One that the kernel does not let go is left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)


def how_ended(process: subprocess.Popen) -> str:
    try:
        status = process.wait(2.0)
    except subprocess.TimeoutExpired:
        return "it stopped telling what it does, and was ended"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


class Process:
    """A worker: what it says comes through a pipe of its own, as anything may be printed."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], folder: Path, log: Path, task: dict[str, Any]
    ):
        self.pipe, writing = os.pipe()
        os.set_blocking(self.pipe, False)
        try:
            with open(log, "ab") as output:
                self.process = subprocess.Popen(
                    [*command, json.dumps(task | {"events": writing})],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writing,),
                    preexec_fn=os.setpgrp,
                )
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(writing)
        self._text = b""

    def stop(self) -> None:
        end_group(self.process)
        self.close()

    def close(self) -> None:
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def ending(self) -> str:
        how = how_ended(self.process)
        self.stop()
        return how

    def heard(self) -> list[dict[str, Any] | None]:
        """What it said since it was last asked."""
        more: list[dict[str, Any] | None] = []
        closed = False
        try:
            while part := os.read(self.pipe, 1 << 16):
                self._text += part
            closed = True
        except BlockingIOError:
            pass
        *whole, self._text = self._text.split(b"\n")
        for line in whole:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                more += [event] if isinstance(event, dict) else []
        return [*more, None] if closed else more


class Processes:
    """schedule.Launcher for this machine.

    python       runs the workers
    checkout     where benchmarks/ and tests/ are
    environment  by stage: the variables of its processes
    task         what all of them are given (worker.py)
    """

    def __init__(self, python: str, checkout: Path, folder: Path, log: Path, environment: Any, task: dict[str, Any]):
        self._command = [python, "-c", START, str(checkout)]
        self._folder, self._log, self._environment, self._task = folder, log, environment, task

    def now(self) -> float:
        return time.monotonic()

    def start(self, stage: Stage, cases: Sequence[Case]) -> Process:
        task = self._task | {
            "stage": stage.name,
            "module": stage.module,
            "cases": [[case.name, case.arguments] for case in cases],
        }
        return Process(self._command, self._environment(stage), self._folder, self._log, task)

    def wait(self, workers: Sequence[Process], seconds: float) -> list[tuple[Process, dict[str, Any] | None]]:
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.pipe, selectors.EVENT_READ, worker)
            while True:
                left = max(0.0, end - time.monotonic())
                ready = selector.select(min(left, LOOK))
                events = [(key.data, event) for key, _ in ready for event in key.data.heard()]
                if not ready:  # something else may hold the pipe of one that is no more
                    over = [worker for worker in workers if worker.process.poll() is not None]
                    events = [(worker, event) for worker in over for event in (*worker.heard(), None)]
                if events or left <= 0.0:
                    return events


def run(command: Sequence[str], folder: Path, environment: dict[str, str], log: Path, timeout: float) -> str | None:
    """Run a command, its output added to the log: None, or how it ended if not well."""
    with open(log, "ab") as output:
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )  # fmt: skip
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"it took more than {timeout:.0f} s, and was ended"
        finally:
            if process.poll() is None:
                end_group(process)
    return None if process.returncode == 0 else how_ended(process)
