"""python slow_batch.py ...: ``rewrite ...`` that takes its time between two fits, for a test that kills it."""

import sys
import time

from rewrite_core.cli.entry import main
from rewrite_core.rewrites import calls


def slowly():
    solve = calls.solve

    def late(*args):
        time.sleep(0.2)
        return solve(*args)

    calls.solve = late


if __name__ == "__main__":
    slowly()
    sys.exit(main(sys.argv[1:]))
