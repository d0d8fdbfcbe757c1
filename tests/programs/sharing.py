"""torchrun sharing.py WHAT: a command whose processes share 10 pieces of work, and what one of them may do else."""

import argparse
import os
import signal
import sys

from rewrite_core.cli import entry
from rewrite_core.cli.command import Command
from rewrite_core.cli.messages import say
from rewrite_core.cli.processes import is_first, shared
from rewrite_core.errors import RewriteCoreError, warn
from rewrite_core.evaluation.steps import Steps


def run(options):
    steps = Steps(shard=options.process)
    number = options.process.number
    if options.what == "warn":
        warn("All say this.")
        warn(f"Process {number} says this.")
    if options.what == "fail" and number == 2:
        raise RewriteCoreError("The second cannot go on.")
    if options.what == "kill" and number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    stage = f"stage of {number}" if options.what == "differ" else "stage"
    made = steps.all([piece * piece for piece in steps.own(range(10))], stage)
    first_only = steps.all([number], stage, first_only=True)
    say(f"{made} {first_only}")
    if options.what == "write" and is_first(options):
        raise OSError(28, "No space left on device", "out")


if __name__ == "__main__":
    command = Command("sharing", "", "", lambda parser: None, shared(run), settings=False, processes=True)
    sys.exit(entry._run(command, argparse.Namespace(what=sys.argv[1], device="cpu", quiet=True)))
