"""S3: the tests marked `gpu`, a share of a file's to a process.

Every test has a line of its own as soon as it has run; one that hangs or ends the process costs no other its line."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import pytest

from .stages import ALONE
from .summary import latest
from .timing import sound as gpu_answers
from .timing import there
from .worker import UNSOUND, WORDS, Setting, Skipped

DROPPED = ("REWRITE_CORE_BACKEND", "PYTEST_ADDOPTS")


def sound() -> bool:
    return gpu_answers()


class Plugin:
    """Chooses the tests of a share that have no line yet, and writes a line after each."""

    def __init__(self, arguments: dict[str, Any], setting: Setting):
        self._arguments, self._setting = arguments, setting
        self._done = results(setting)
        self.share: list[str] = []
        self.errors: list[str] = []  # of collection
        self._began = 0.0
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(trylast=True)  # after -m
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        alone = [item for item in items if getattr(item, "originalname", item.name) in ALONE]
        if self._arguments.get("alone"):
            share = alone
        else:
            others = [item for item in items if item not in alone]
            share = others[self._arguments["part"] :: self._arguments["parts"]]
        self.share = [item.nodeid for item in share]
        items[:] = [item for item in share if item.nodeid not in self._done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(f"{report.nodeid}: {' '.join(words_of(report).split())}"[:WORDS])

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self._began, self._reports = time.monotonic(), []
        self._setting.say(part=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        failed = next((report for report in self._reports if report.failed), None)
        skipped = next((report for report in self._reports if report.skipped), None)
        state = "failed" if failed is not None else "skipped" if skipped is not None else "ok"
        more: dict[str, Any] = {}
        if failed is not None:
            more["reason"] = " ".join(words_of(failed).split())[-WORDS:]
            print(f"\n{nodeid}\n{failed.longreprtext}", flush=True)  # now: pytest itself would at its end
        elif skipped is not None:
            more["reason"] = str(skipped.longrepr[-1] if isinstance(skipped.longrepr, tuple) else skipped.longrepr)
        self._setting.write(nodeid, state, time.monotonic() - self._began, more)
        self._setting.say(part=None)
        if failed is not None and not sound():
            print("The GPU does not answer any more: another process goes on.", flush=True)
            os._exit(UNSOUND)


def words_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The end of what pytest says of a failure: the lines with the error, and where it was."""
    lines = report.longreprtext.splitlines()
    errors = [line for line in lines if re.match(r"E  ", line)]
    return "\n".join([*errors[:8], *lines[-1:]])


def results(setting: Setting, share: list[str] | None = None) -> dict[str, str]:
    """The states of tests with a line in this run, or that passed earlier with the same sources on such a GPU."""
    states = {}
    for line in latest(setting.lines, setting.common):
        if line["stage"] != setting.stage or (share is not None and line["case"] not in share):
            continue
        if line.get("run") == setting.common["run"] or line["state"] == "ok":
            states[str(line["case"])] = str(line["state"])
    return states


def run(name: str, arguments: dict[str, Any], setting: Setting) -> dict[str, Any]:
    if setting.device == "cuda" and not there():
        raise Skipped("torch sees no GPU")
    for variable in DROPPED:
        os.environ.pop(variable, None)
    plugin = Plugin(arguments, setting)
    files = [str(setting.tests / file) for file in arguments["files"]]
    words = [
        "-q",
        "-m",
        arguments.get("mark", "gpu"),
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--color=no",
    ]
    words += ["--continue-on-collection-errors", f"--rootdir={setting.tests.parent}"]
    status = int(pytest.main([*words, *files], plugins=[plugin]))
    states = list(results(setting, plugin.share).values())
    counts = {"tests": {state: states.count(state) for state in dict.fromkeys(states)}}
    bad = sum(state in ("failed", "crashed", "timeout") for state in states)
    if plugin.errors:
        return {"state": "failed", "reason": plugin.errors[0], **counts}
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return {"state": "failed", "reason": f"pytest ended with status {status}: see the log", **counts}
    if bad:
        return {"state": "wrong", "reason": f"{bad} of {len(states)} tests are not right", **counts}
    if states and set(states) == {"skipped"}:
        return {"state": "skipped", "reason": "all tests were skipped", **counts}
    return counts
