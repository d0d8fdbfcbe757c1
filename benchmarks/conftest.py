"""``pytest benchmarks/``: pytest-benchmark owns the loop and times ours, and its set-up runs the others.

Both this and ``rewrite bench`` append the same lines and draw the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import runner
from .harness import Checked, Race, Refused, measurement
from .report import Report

REPORT = pytest.StashKey[Report]()
LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rewrite_core")
    group.addoption("--quick", action="store_true", help="tiny cases and few rounds: a smoke test")
    results = Path(__file__).parent / "results"
    group.addoption("--out", type=Path, default=results, metavar="DIR", help="folder for the results")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        torch.set_num_threads(1)
    lines: list[str] = []
    config.stash[REPORT] = Report(config.getoption("--out"), config.getoption("--quick"), lines.append)
    config.stash[REPORT].start()
    config.stash[LINES] = lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" in metafunc.fixturenames:
        names = [case.name for case in metafunc.module.cases(metafunc.config.getoption("--quick"))]
        metafunc.parametrize("measure", names, indirect=True)


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> dict[str, Checked]:
    try:
        entries = runner.gate(request.module, request.config.getoption("--quick"))
    except Refused as refusal:
        pytest.exit(str(refusal), returncode=1)
    return {entry.case.name: entry for entry in entries}


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark, checked: dict[str, Checked]) -> Callable[[], None]:
    """Times one case and records it; with --benchmark-disable it is only checked."""

    def run() -> None:
        quick = request.config.getoption("--quick")
        entry = checked.pop(request.param)
        if benchmark.disabled:
            return
        race = Race(entry.problem)
        benchmark.group = request.module.OP
        benchmark.pedantic(race.ours, setup=race.others, rounds=race.plan(quick))
        record = measurement(request.module.OP, entry, race, quick)
        benchmark.extra_info.update({key: record[key] for key in ("gflops", "error", "best_stock", "ratio")})
        request.config.stash[REPORT].add(record)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    config.stash[REPORT].finish()
    if config.stash[REPORT].records:
        for line in config.stash[LINES]:
            terminalreporter.write_line(line)
