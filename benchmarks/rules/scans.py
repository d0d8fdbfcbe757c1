"""Whether ``rc.scan_layers`` finds the layer and the rank: ``python -m benchmarks.rules.scans --out DIR [RULE ...]``.

On the embedded world, whose truth is known: the true efficacy of the scan's first choice beside the best of all layers
and ranks that it tried, and the time that the scan took. Rules that ``scans.jsonl`` has are told again, not done again.
Most of a rule's minute goes into the truth.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import rewrite_core as rc
from rewrite_core.demo import RULES, chapels, load_edit
from rewrite_core.demo.rules import score
from rewrite_core.pictures import paint

from .grid import lines_of

UNSEEN, UNSEEN_SEED = 200, 9  # others than the scan looks at


def scanned(name: str) -> dict[str, Any]:
    """One rule: what the scan says of each layer and rank, best first, what is true of it, and how long it took."""
    generator, latents = chapels(), rc.sample_latents(16, 1000, seed=1)
    wall, cpu = time.perf_counter(), time.process_time()
    scan = rc.scan_layers(generator, load_edit(name), latents)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    unseen = rc.sample_latents(16, UNSEEN, seed=UNSEEN_SEED)
    before, rows = paint(generator, unseen), []
    for row in scan.rows:
        with row.change.apply(generator):
            true = score(RULES[name], before, paint(generator, unseen), unseen)
        facts = {"layer": row.layer, "rank": row.rank, "score": row.score, "verdict": row.report.verdict}
        rows.append(facts | {"efficacy": true.efficacy, "collateral": true.collateral})
    taken = {"seconds": wall, "cpu_seconds": cpu, "threads": torch.get_num_threads()}
    return {"rule": name, **taken, "left_out": scan.left_out, "rows": rows}


def line(found: dict[str, Any]) -> str:
    """A rule in words."""
    first, best = found["rows"][0], max(found["rows"], key=lambda row: row["efficacy"])
    told = [
        f"{row['layer']} rank {row['rank']}, efficacy {row['efficacy']:.3f}, collateral {row['collateral']:.4f}"
        for row in (first, best)
    ]
    return (
        f"{found['rule']}: first choice {told[0]}; best of {len(found['rows'])}: {told[1]}; "
        f"share {first['efficacy'] / best['efficacy']:.1%}; the scan took {found['seconds']:.1f} s on "
        f"{found['threads']} threads, {found['cpu_seconds']:.0f} s of CPU time"
    )


def main(out: Path, names: Sequence[str] = ()) -> int:
    """Do the rules that `out` lacks, and print all."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "scans.jsonl"
    found = {row["rule"]: row for row in lines_of(path)}
    warnings.simplefilter("ignore")  # of fits that are held back
    for name in names or RULES:
        if name not in found:
            found[name] = scanned(name)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[name]) + "\n")
        print(line(found[name]), flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("rules", nargs="*", choices=[[], *RULES], help="by default all of them")
    given = parser.parse_args()
    raise SystemExit(main(given.out, given.rules))
