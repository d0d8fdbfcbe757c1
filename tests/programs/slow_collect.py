"""torchrun slow_collect.py ...: ``rewrite collect ...`` that takes its time, with a checkpoint after every batch.

Each process leaves its number in a file pids/RESTART-RANK, for a test to kill it by."""

import os
import sys
import time
from pathlib import Path

from rewrite_core.cli.entry import main
from rewrite_core.statistics import collection


def slowly():
    collection.CHECKPOINT_SECONDS = -1.0
    run_to = collection.run_to

    def late(*args):
        time.sleep(float(os.environ["SECONDS_PER_BATCH"]))
        return run_to(*args)

    collection.run_to = late


if __name__ == "__main__":
    Path("pids").mkdir(exist_ok=True)
    pid = Path("pids", f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}")
    pid.with_suffix(".new").write_text(str(os.getpid()))
    pid.with_suffix(".new").rename(pid)
    slowly()
    sys.exit(main(sys.argv[1:]))
