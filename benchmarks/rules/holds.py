"""Whether a rule holds on faces and street numbers: ``python -m benchmarks.rules.holds --out DIR [RULE ...]``.

An edit of one copy, one paste and one search (the best matches are its context) is solved in pictures at some layers
and ranks, and measured by ``rc.measure`` on unseen pictures that were looked at: 100 that the rule concerns and 100
that have nothing of it, at several strengths. Fine-tuning all weights on the same goal picture is scaled between what
the weights were and what they became, and its change of unrelated pictures is told at the same reach. The lines of a
rule go to ``holds.jsonl`` when it is done, and rules that are there are not done again; a sheet shows the best of ours:
that with the verdict "holds" and, of several, the least unrelated change; else that of the highest reach.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewrite_core as rc
from rewrite_core.evaluation.measuring import Given, Scene, looking, measured, scene_of
from rewrite_core.pictures import save_png

from . import NAMES, Rule, rule
from .grid import keep_by_rule

RULES = tuple(name for name in NAMES if rule(name).subject.build is not None)
SEEN = 100  # pictures of each kind, at most
MATCHES, RANKS, STRENGTHS = 6, (1, 4), (1.0, 1.5, 2.0)
STEPS, SHARES = 100, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of fine-tuning


class Trial:
    """One rule at one layer."""

    def __init__(self, judged: Rule, generator: nn.Module, name: str):
        self.rule, self.layer = judged, rc.bind(generator, name)
        self.latents = judged.subject.edit_latents
        self.moment = rc.collect_second_moment(self.layer, self.latents, batch_size=100, progress=False)
        paste = judged.edit.pastes[0]
        one = rc.Edit(judged.edit.copy, paste, [paste], latents=self.latents)
        self.edit = one.with_matches(self.layer, self.moment, self.latents, MATCHES)
        mine, others = judged.concerned[:SEEN], judged.unrelated[:SEEN]
        self.concerned, self.unseen = len(mine), judged.subject.unseen_latents[torch.cat([mine, others])]
        self.scene: Scene = scene_of(self.layer, self._given([]))

    def _given(self, changes: list[rc.Rewrite], strength: float = 1.0) -> Given:
        span = self.rule.subject.span
        return Given(changes, self.edit, self.latents, self.unseen, None, self.moment, strength, span)

    def report(self, change: rc.Rewrite | nn.Module, strength: float = 1.0) -> rc.Report:
        if isinstance(change, nn.Module):
            return measured(self.layer, self._given([]), change, scene=self.scene)
        return measured(self.layer, self._given([change], strength), scene=self.scene)

    def tuned(self, preserve: float) -> Iterator[tuple[float, rc.Report, dict[str, float]]]:
        """Fine-tuning, a share of the way."""
        goals, generator = rc.preview(self.layer, self.edit, self.latents), self.layer.generator
        rows, named = [self.edit.pastes[0].index], {part.index for part in self.edit.selections}
        ordinary = self.latents[[row for row in range(100) if row not in named][:32]]
        options: dict[str, Any] = {"ordinary": ordinary, "preserve": preserve, "stops": (STEPS,)}
        (found,) = rc.fine_tune(generator, self.latents[rows], goals, **options)
        part = copy.deepcopy(found.generator)
        for share in SHARES:
            with torch.no_grad():
                for own, old, new in zip(part.parameters(), generator.parameters(), found.generator.parameters()):
                    own.copy_(old + share * (new - old))
            yield share, self.report(part), self.of_all(part)

    def of_all(self, change: rc.Rewrite | nn.Module, strength: float = 1.0) -> dict[str, float]:
        """What is true of all pictures that were looked at, found or not: the share that follows, at the best place of
        each, of those that the rule concerns; and the mean change of those that have nothing of it."""
        every = dataclasses.replace(self.scene.places, level=-math.inf)
        scene = dataclasses.replace(self.scene, places=every)
        other = change if isinstance(change, nn.Module) else None
        given = self._given([] if isinstance(change, nn.Module) else [change], strength)
        report = measured(self.layer, given, other, scene=scene)
        moved = [far for row, far in zip(report.matching, report.moved, strict=True) if row < self.concerned]
        look, low, high = looking(self.layer, given, other), *self.rule.subject.span
        before, after = look(self.unseen, list(range(self.concerned, len(self.unseen))))
        unrelated = (after - before).abs().mean().item() / (high - low)
        return {"reach of all": sum(far >= 0.5 for far in moved) / len(moved), "unrelated of all": unrelated}

    def facts(self, report: rc.Report) -> dict[str, Any]:
        """The numbers; true: how many of the places that were found are in pictures that the rule concerns."""
        told = {name: getattr(report, name) for name in ("verdict", "reach", "agreement", "paste", "size")}
        told |= {name: getattr(report, name) for name in ("inside", "outside", "unrelated")}
        return told | {"found": len(report.matching), "true": sum(row < self.concerned for row in report.matching)}


def rows_of(judged: Rule, out: Path) -> Iterator[dict[str, Any]]:
    """Ours at each layer, rank and strength; then fine-tuning at the reach of the best; its sheet goes to `out`."""
    generator, best = judged.subject.generator(), None
    for name in judged.subject.layers[:2]:
        trial = Trial(judged, generator, name)
        for rank in RANKS:
            given: dict[str, Any] = {"rank": rank, "region": "map", "loss": "l2", "objective": "pictures"}
            change = rc.rewrite(trial.layer, trial.moment, trial.edit, trial.latents, **given)
            for strength in STRENGTHS:
                report = trial.report(change, strength)
                where = {"rule": judged.name, "way": "ours", "layer": name, "rank": rank, "strength": strength}
                yield where | trial.facts(report) | trial.of_all(change, strength)
                holds = report.verdict == "holds"
                score = (holds, -(report.unrelated or 0.0) if holds else report.reach or 0.0)
                if best is None or score > best[0]:
                    best = score, trial, report, f"{name}, rank {rank}, strength {strength:g}"
    assert best is not None
    _, trial, report, words = best
    save_png(report.sheet(), out / f"{judged.name}.png")
    yield {"rule": judged.name, "way": f"best of ours ({words})", **trial.facts(report)}
    reach = report.reach or 0.0
    for preserve in (0.0, 1.0):
        last = 0.0, 0.0
        for share, other, true in trial.tuned(preserve):
            now = other.reach or 0.0, other.unrelated or 0.0
            if now[0] >= reach:
                part = (reach - last[0]) / (now[0] - last[0]) if now[0] > last[0] else 1.0
                unrelated = last[1] + part * (now[1] - last[1])
                where = {"rule": judged.name, "way": f"fine-tuned, preserve {preserve:g}, at that reach"}
                numbers = {"strength": share, "reach": reach, "unrelated": unrelated}
                yield where | trial.facts(other) | numbers | true
                break
            last = now
        else:
            where = {"rule": judged.name, "way": f"fine-tuned, preserve {preserve:g}, all of it: reaches less"}
            yield where | trial.facts(other) | {"strength": share} | true


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    place = f"{row['layer']}, rank {row['rank']}" if "layer" in row else ""
    fields = ("reach", "paste", "outside", "unrelated", "reach of all", "unrelated of all")
    numbers = [f"{name} {row[name]:.4f}" for name in fields if row.get(name) is not None]
    size = "" if row["size"] is None else f", size {row['size']:.2f}"
    found = f"{row['found']} found, {row['true']} of them concerned"
    strength = f" x {row['strength']:g}" if "strength" in row else ""
    return f"{row['rule']}, {row['way']} {place}{strength}: {row['verdict']}, {', '.join(numbers)}{size}, {found}"


def main(out: Path, names: Sequence[str] = ()) -> int:
    """Do the rules that `out` lacks, and print the lines of all."""
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keep_by_rule(out / "holds.jsonl", names or RULES, lambda name: rows_of(rule(name), out), line)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("rules", nargs="*", choices=[[], *RULES], help="by default all of them")
    given = parser.parse_args()
    raise SystemExit(main(given.out, given.rules))
