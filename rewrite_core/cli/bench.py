"""``rewrite bench``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .command import Command, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="SUITE",
        help="second-moment, solve, edit, collect, all of these (default); neighbour, with one core taken; large, "
        "which needs 7 GiB; studio, a browser; rules and paper, which compare what edits do",
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="the cases alone that have these words in their name"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of the smallest cases")
    parser.add_argument(
        "--out", default="bench_out", metavar="DIR", help="for the numbers and pictures (default bench_out)"
    )


def run(options: argparse.Namespace) -> int:
    from .generator import usable_device

    if usable_device(options.device).type != "cpu":
        raise UsageError("The benchmarks measure the CPU so far; use --device cpu.")
    try:
        # by name: benchmarks are written on top of the library, and this is only where they are called
        runner = importlib.import_module("rewrite_core.benchmarks.runner")
    except ModuleNotFoundError as error:
        if error.name not in ("rewrite_core.benchmarks", "pytest", "pytest_benchmark"):
            raise
        raise UsageError(
            f"{error.name} is not installed; run pip install '.[test]' in a checkout to benchmark."
        ) from error
    return runner.main(options.names or ["all"], Path(options.out), options.quick, options.only)


COMMAND = Command(
    "bench", "time the kernels against stock PyTorch", "rewrite bench solve --out bench_out", add_arguments, run
)
