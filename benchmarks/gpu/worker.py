"""The process of a stage: runs cases one after the other, and writes a line after each.

Its own imports are the standard library's; the stage's module (``rates.py``, ...) comes from the library that is
measured. A module has ``run(name, arguments, setting)``, which returns what to add to the case's line (``state`` among
it where that is not "ok") or raises, and ``sound()``: whether more cases can run in this process after one that failed.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..lines import append

UNSOUND = 17  # exit status of a process in which the GPU does not answer any more
WORDS = 600  # characters of a reason


SKIPPED = "skipped: "  # and the reason: what a process of its own says


class Skipped(Exception):
    """This case cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What every case is given.

    device  "cuda", or "cpu" in a rehearsal, where everything is small and Triton's interpreter runs the kernels
    common  the part of a line that is the same for all of a run
    lines   the file of lines: what was measured before is there
    tests   the folder of the tests
    folder  for files that nobody needs afterwards
    library where rewrite_core is
    events  the pipe that the program which started this process reads
    """

    device: str
    small: bool
    stage: str
    common: dict[str, Any]
    lines: Path
    tests: Path
    folder: Path
    installed: str  # the folder that the library is imported from, or ""
    events: int

    def say(self, **words: Any) -> None:
        """A word to the process that waits for this one."""
        os.write(self.events, json.dumps(words).encode() + b"\n")

    def write(self, case: str, state: str, seconds: float, more: dict[str, Any]) -> None:
        """A line of its own, flushed and on the disk."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        head = {"timestamp": now, **self.common, **facts(), "stage": self.stage, "case": case}
        append(self.lines, {**head, "state": state, "seconds": round(seconds, 3), **more})


def facts() -> dict[str, Any]:
    """What is known of this process without asking a GPU."""
    return {"python": platform.python_version(), "torch": _version("torch"), "triton": _version("triton")}


def _version(package: str) -> str | None:
    module = sys.modules.get(package)
    if module is not None and hasattr(module, "__version__"):
        return str(module.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def why(error: BaseException) -> str:
    """An exception in one line, with where it was raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return text[: WORDS - len(where)] + where


def said(more: dict[str, Any]) -> str:
    """What a line says in a few words."""
    if "reason" in more:
        return str(more["reason"])
    words = []
    if isinstance(more.get("rate"), float):
        words.append(f"{more['rate']:.4g} {more.get('unit', '')}")
    if isinstance(more.get("error"), float):
        words.append(f"error {more['error']:.1e}")
    if isinstance(more.get("p50"), float):
        words.append(f"{1e6 * more['p50']:.4g} us, {more['ratio']:.3g} x")
    return ", ".join(words)


def run_cases(module: Any, cases: list[tuple[str, dict[str, Any]]], setting: Setting) -> None:
    for name, arguments in cases:
        setting.say(begin=name)
        print(f"== {setting.stage} {name}", flush=True)
        started, state, more = time.monotonic(), "ok", {}
        try:
            more = module.run(name, arguments, setting)
            state = more.pop("state", "ok")
        except Skipped as reason:
            state, more = "skipped", {"reason": str(reason)}
        except Exception as error:
            state, more = "failed", {"reason": why(error)}
            sys.stderr.write(traceback.format_exc())  # in one write
            sys.stderr.flush()
        seconds = time.monotonic() - started
        try:
            setting.write(name, state, seconds, more)
        except (TypeError, ValueError) as error:  # something that JSON does not have
            state = "failed"
            setting.write(name, state, seconds, {"reason": f"its result cannot be written: {why(error)}"})
        setting.say(end=name, state=state, says=said(more))
        if state == "failed" and not module.sound():
            print("The GPU does not answer any more: another process goes on.", flush=True)
            sys.stdout.flush()
            os._exit(UNSOUND)


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """sys.argv[-1]: the task, as processes.py makes it."""
    die_with_parent()
    task = json.loads(sys.argv[-1])
    os.set_inheritable(task["events"], False)
    if task["library"]:
        sys.path.insert(0, task["library"])
    try:
        own = importlib.import_module(f"{task['package']}.worker")  # this file as the stage's module knows it
        module = importlib.import_module(f"{task['package']}.{task['module']}")
    except BaseException as error:
        os.write(task["events"], json.dumps({"complaint": why(error)}).encode() + b"\n")
        raise
    setting = own.Setting(
        device=task["device"],
        small=task["small"],
        stage=task["stage"],
        common=task["common"],
        lines=Path(task["lines"]),
        tests=Path(task["tests"]),
        folder=Path(task["folder"]),
        installed=task["library"],
        events=task["events"],
    )
    own.run_cases(module, task["cases"], setting)
