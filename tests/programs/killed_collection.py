"""python killed_collection.py FILE FILE: collect to two checkpoints in a child that is killed at random moments, again
and again until it is through. Prints how many kills left a checkpoint."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import rewrite_core as rc
from rewrite_core.statistics import collection

DATA = Path(__file__).parents[1] / "data"


def collect(checkpoints):
    """Two layers, keys for the second, and an end before the latents'."""
    generator = rc.load_proggan(DATA / "proggan_state.npz")
    return rc.collect_second_moments(
        [rc.bind(generator, name) for name in ("layer5.conv", "layer2.conv")],
        rc.sample_latents(64, 200),
        batch_size=4,
        checkpoints=checkpoints,
        progress=False,
        until=0.22,
        keys=[None, torch.eye(64)[:2]],
    )


def main(checkpoints):
    torch.set_num_threads(1)  # no threads that a fork would lose
    ticks = iter(range(0, 10**9, 100))
    collection.time = SimpleNamespace(monotonic=lambda: next(ticks))  # a checkpoint after every batch
    run_to = collection.run_to
    collection.run_to = lambda *args: (time.sleep(0.01), run_to(*args))  # time to be killed in
    random.seed(0)
    for name in (".warm", ".whole"):  # the first call of all is slow
        start = time.perf_counter()
        collect([path + name for path in checkpoints])
        seconds = time.perf_counter() - start
    kills = 0
    for attempt in range(100):
        child = os.fork()
        if not child:
            collect(checkpoints)
            os._exit(0)
        time.sleep(random.uniform(0.03, 0.1) * (attempt + 2) * seconds)  # longer and longer, so it ends
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += os.path.exists(checkpoints[0])
    print(kills, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
