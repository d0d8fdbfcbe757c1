"""torchrun slow_collect.py ...: ``rewrite collect ...`` that takes its time, with a checkpoint after every batch.

For a test that kills it, each process leaves its number in a file starts/RESTART-RANK, to which it adds a line as each
batch begins, and one when the last is through."""

import os
import sys
import time
from pathlib import Path

from rewrite_core.cli.entry import main
from rewrite_core.statistics import collection


def told(word):
    with open(Path("starts", f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}"), "a") as file:
        file.write(f"{word}\n")


def slowly():
    collection.CHECKPOINT_SECONDS = -1.0
    run_to, run = collection.run_to, collection.Collection.run

    def late(*args):
        told("batch")
        time.sleep(float(os.environ["SECONDS_PER_BATCH"]))
        return run_to(*args)

    def through(self):
        moments = run(self)
        told("through")
        return moments

    collection.run_to, collection.Collection.run = late, through


if __name__ == "__main__":
    Path("starts").mkdir(exist_ok=True)
    told(os.getpid())
    slowly()
    sys.exit(main(sys.argv[1:]))
