"""Whether rules with painted goals hold: ``python -m benchmarks.rules.colours --out DIR [RULE ...]``.

The goal of such an edit is what an artist would make of its pictures (:mod:`.retouches`). It is solved by the defaults
and measured by ``rc.measure`` on several draws of unseen latents. As a retouch can be made of every picture, it is also
told how far the pictures that were seen by eye to be concerned go to their own. The lines go to ``colours.jsonl``, a
sheet of each rule beside it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import rewrite_core as rc
from rewrite_core.pictures import save_png

from . import PAINTED, Rule, rule
from .grid import keep_by_rule
from .retouches import RETOUCHES

LAYER = "d2"  # chosen on 700 latents of seed 101, as was the number of plates that are marked
DRAWS = (2, 201, 202, 203)  # seeds of those that judge
ROWS = 1500  # of each


class Trial:
    """One rule at one layer."""

    def __init__(self, judged: Rule, name: str):
        self.rule, self.layer = judged, rc.bind(judged.subject.generator(), name)
        self.latents = judged.subject.edit_latents
        self.moment = rc.collect_second_moment(self.layer, self.latents, batch_size=100, progress=False)

    def change(self) -> rc.Rewrite:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return rc.rewrite(self.layer, self.moment, self.rule.edit, self.latents, **self.rule.options(self.layer))

    def report(self, change: rc.Rewrite, unseen: torch.Tensor) -> rc.Report:
        span = self.rule.subject.span
        return rc.measure(change, self.rule.edit, self.latents, unseen, moment=self.moment, span=span)

    def seen(self, change: rc.Rewrite) -> dict[str, float]:
        """Of the pictures that were looked at: the way to their own retouch (1 is all of it) of those that the rule
        concerns, and the change of those that have nothing of it, 0..1."""
        assert self.rule.retouch is not None
        unseen, (low, high) = self.rule.subject.unseen_latents, self.rule.subject.span
        mine, others = unseen[self.rule.concerned], unseen[self.rule.unrelated]
        before, still = self.layer.render(mine), self.layer.render(others)
        with change:
            after, now = self.layer.render(mine), self.layer.render(others)
        wanted = RETOUCHES[self.rule.retouch](before) - before
        way = ((after - before) * wanted).flatten(1).sum(1) / wanted.square().flatten(1).sum(1)
        return {
            "gone": way.mean().item(),
            "half way": (way >= 0.5).float().mean().item(),
            "unrelated of all": (now - still).abs().mean().item() / (high - low),
        }


def rows_of(judged: Rule, out: Path) -> Iterator[dict[str, Any]]:
    """What was seen, and what every draw says."""
    trial = Trial(judged, LAYER)
    change = trial.change()
    where = {"rule": judged.name, "layer": LAYER, "rank": change.rank, **trial.seen(change)}
    for seed in DRAWS:
        report = trial.report(change, judged.subject.latents(seed, ROWS))
        names = ("verdict", "reach", "agreement", "inside", "unrelated", "size")
        told = {name: getattr(report, name) for name in names}
        yield where | {"seed": seed, "found": len(report.matching)} | told
        if seed == DRAWS[0]:
            save_png(report.sheet(), out / f"{judged.name}.png")


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    names = ("reach", "agreement", "unrelated", "gone", "half way", "unrelated of all")
    numbers = ", ".join(f"{name} {row[name]:.4f}" for name in names if row[name] is not None)
    where = f"{row['layer']}, rank {row['rank']}, seed {row['seed']}, {row['found']} found"
    return f"{row['rule']} ({where}): {row['verdict']}, {numbers}, size {row['size']:.2f}"


def main(out: Path, names: Sequence[str] = ()) -> int:
    """Do the rules that `out` lacks, and print the lines of all."""
    out.mkdir(parents=True, exist_ok=True)
    keep_by_rule(out / "colours.jsonl", names or PAINTED, lambda name: rows_of(rule(name), out), line)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("rules", nargs="*", choices=[[], *PAINTED], help="by default all of them")
    given = parser.parse_args()
    raise SystemExit(main(given.out, given.rules))
