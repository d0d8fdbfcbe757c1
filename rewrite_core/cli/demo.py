"""``rewrite demo``."""

from __future__ import annotations

import argparse

from .command import Command
from .messages import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="demo_out", metavar="DIR", help="for the pictures and report.json (default demo_out)"
    )


def run(options: argparse.Namespace) -> None:
    from ..demo.run import run_demo, table
    from .generator import usable_device

    report = run_demo(options.out, device=str(usable_device(options.device)), progress=not options.quiet)
    say(table(report))
    names = ", ".join(f"{name}.png" for name in report["edits"])
    say(f"\n{report['environment']['seconds_total']} s in all. Look at {names} in {options.out}.")


COMMAND = Command(
    "demo",
    "change three rules of the embedded generator and measure the result",
    "rewrite demo --out demo_out",
    add_arguments,
    run,
)
