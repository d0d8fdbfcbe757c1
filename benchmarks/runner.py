"""Runs suites without pytest: what ``rewrite bench`` calls."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

import rewrite_core

from . import report
from .harness import Checked, Race, Refused, check, measurement

SUITES = {
    "second-moment": "bench_second_moment",
    "solve": "bench_solve",
    "edit": "bench_edit",
    "collect": "bench_collect",
}

ALONE = {
    "neighbour": "neighbour",
    "large": "large",
    "studio": "bench_studio",
    "rules": "rules.grid",
    "paper": "rules.paper",
}
"""{a name: the module} of what is more than a race between contenders and has a ``main(out, quick)`` of its own."""


def suite(name: str) -> ModuleType:
    """The module of a suite, which has ``OP`` and ``cases(quick)``; where `OP` is no op of ``rewrite_core.ops``
    it also has ``KERNEL``, the op whose backend it uses. ``TESTS`` names its files of tests, where they are others."""
    return importlib.import_module(f".{SUITES[name]}", __package__)


def run_tests(op: str, names: Sequence[str] = ()) -> str:
    """Run the op's own tests, tests/test_<name>.py of each of `names` (default: the op's), in a source checkout:
    "passed", or "none here" for an installed wheel.

    Raises Refused where they fail.
    """
    folder = report.checkout()
    if folder is None or not (folder / "tests").is_dir():
        return "none here"
    tests = [folder / "tests" / f"test_{name}.py" for name in names or (op,)]
    for path in tests:
        if not path.is_file():
            raise Refused(f"{op} has no tests/{path.name}, and the speed of an untested op is not reported.")
    if importlib.util.find_spec("pytest") is None:
        raise Refused("pytest is not installed to test with: run `pip install '.[test]'` in a checkout.")
    # The tests must meet the very library that is measured, whatever else is on the path; cwd, because
    # `python -m` puts it there first. The tests name their backends, and run in full.
    dropped = ("REWRITE_CORE_BACKEND", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    library = str(Path(rewrite_core.__file__).resolve().parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [library, variables.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, tests)]
    done = subprocess.run(command, cwd=folder / "tests", env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        cause = lines[0] if lines else (done.stderr.strip().splitlines() or ["pytest said nothing"])[-1]
        raise Refused(f"The tests of {op} fail, so its speed is not reported ({cause}).")
    return "passed"


def gate(module: ModuleType, quick: bool, only: str = "") -> list[Checked]:
    """Every case of a suite whose name has the words `only`, each found right; raises Refused before anything is timed.

    Quick runs check the cases alone: the tests take longer than they do, and their lines say so.
    """
    kernel = getattr(module, "KERNEL", module.OP)
    tests = "not run" if quick else run_tests(module.OP, getattr(module, "TESTS", ()))
    return [check(module.OP, case, tests, kernel) for case in module.cases(quick) if only in case.name]


def main(names: Sequence[str], out: Path, quick: bool, only: str = "") -> int:
    """Check and measure suites; the exit status.

    names  of ``SUITES`` or ``ALONE``, or "all", which is all of ``SUITES``
    out    folder for the JSON lines and pictures, made where missing; lines are appended
    only   of suites: the cases alone whose names have these words
    quick  tiny cases, few rounds, without the ops' tests: a smoke test, kept apart from the results

    0: measured. 1: refused, for an op is wrong here (stderr says which). 2: bad input.
    """
    unknown = [name for name in names if name not in (*SUITES, *ALONE, "all")]
    if unknown or not names:
        what = f"There is no benchmark {unknown[0]!r}" if unknown else "No benchmark was named"
        print(f"{what}: use {', '.join((*SUITES, *ALONE))}, or all.", file=sys.stderr)
        return 2
    status = 0
    for name in dict.fromkeys(name for name in names if name in ALONE):
        status = max(status, importlib.import_module(f".{ALONE[name]}", __package__).main(Path(out), quick))
    chosen = list(SUITES) if "all" in names else [name for name in dict.fromkeys(names) if name in SUITES]
    if status or not chosen:
        return status

    if not any(only in case.name for name in chosen for case in suite(name).cases(quick)):
        print(f"No case has {only!r} in its name; leave --only out to see all.", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    if quick:
        torch.set_num_threads(1)  # OpenMP's spinning threads would make it slow on a busy machine
    try:
        try:
            sheet = report.Report(Path(out), quick, functools.partial(print, flush=True))
        except OSError as error:
            print(f"Results cannot go to {out} ({error.strerror}): choose another folder.", file=sys.stderr)
            return 2
        return _run(chosen, sheet, quick, only)
    finally:
        torch.set_num_threads(threads)


def _run(names: Sequence[str], sheet: report.Report, quick: bool, only: str) -> int:
    sheet.start()
    for name in names:
        module = suite(name)
        print(f"checking {module.OP} ...", flush=True)
        try:
            checked = gate(module, quick, only)
        except Refused as refusal:
            print(refusal, file=sys.stderr, flush=True)
            sheet.finish()  # what was measured before is right, and stays
            return 1
        while checked:
            entry = checked.pop(0)  # its data go when it is done
            race = Race(entry.problem)
            race.run(quick)
            sheet.add(measurement(module.OP, entry, race, quick))
    sheet.finish()
    return 0
