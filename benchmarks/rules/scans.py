"""Whether ``rc.scan_layers`` finds the layer and the rank: ``python -m benchmarks.rules.scans [RULE ...]``.

On the embedded world, whose truth is known: the true efficacy of the scan's first choice beside the best of all layers
and ranks that it tried, and the time that the scan took. Some minutes a rule, most of them for the truth.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import rewrite_core as rc
from rewrite_core.demo import RULES, chapels, load_edit
from rewrite_core.demo.rules import score
from rewrite_core.pictures import paint

UNSEEN, UNSEEN_SEED = 200, 9  # others than the scan looks at


def main(rules: Sequence[str] = ()) -> None:
    generator, latents = chapels(), rc.sample_latents(16, 1000, seed=1)
    unseen = rc.sample_latents(16, UNSEEN, seed=UNSEEN_SEED)
    before = paint(generator, unseen)
    for name in rules or RULES:
        wall, cpu = time.perf_counter(), time.process_time()
        scan = rc.scan_layers(generator, load_edit(name), latents)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        truth = []
        for row in scan.rows:
            row.change.apply(generator)
            try:
                truth.append(score(RULES[name], before, paint(generator, unseen), unseen))
            finally:
                row.change.revert(generator)
        best = max(range(len(truth)), key=lambda i: truth[i].efficacy)
        first, most = scan.rows[0], scan.rows[best]
        told = [
            f"{row.layer} rank {row.rank}, efficacy {true.efficacy:.3f}, collateral {true.collateral:.4f}"
            for row, true in ((first, truth[0]), (most, truth[best]))
        ]
        share = truth[0].efficacy / truth[best].efficacy
        print(f"{name}: first choice {told[0]}; best of {len(truth)}: {told[1]}; share {share:.1%}", flush=True)
        print(f"  the scan took {wall:.0f} s, {cpu:.0f} s of CPU time", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
