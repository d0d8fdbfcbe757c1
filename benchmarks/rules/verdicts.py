"""How far ``rc.measure`` can be believed: hundreds of edits of the embedded world, whose outcome is known.

``python -m benchmarks.rules.verdicts --out verdicts.jsonl``: the true outcome of each edit, what ``rc.measure`` says of
it without the truth, and at the end how the two agree. A file that exists is gone on with. About 5 seconds an edit.

The true verdict, written down before any limit was tried: with e the share of scenes whose region is nearer to the
counterfactual than to the original (efficacy), and c the larger of the mean change outside of the region and in scenes
that the rule does not concern (0..1),

    c > 0.05: "destroys"; else e < 0.6: "weak"; else c > 0.02: "spills"; else "holds".
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewrite_core as rc
from rewrite_core.demo import RULES, chapels, load_edit
from rewrite_core.demo.rules import score
from rewrite_core.evaluation.measuring import Given, Look, Scene, measured, scene_of
from rewrite_core.evaluation.verdict import DESTROYS, FOLLOWS, SPILLS
from rewrite_core.pictures import paint

LAYERS = [f"synthesis.layer{n}.conv" for n in range(2, 11)]
MAP = {"loss": "l2", "region": "map", "objective": "value"}
BOX = {"loss": "l1", "region": "box", "objective": "value", "preserve": 0.0}
WAYS: list[dict[str, Any]] = [
    *(
        {**MAP, "rank": rank, "preserve": preserve, "pastes": pastes}
        for rank in (1, 4, 10)
        for preserve, pastes in ((0.0, 1), (0.3, 1), (0.1, 5))
    ),
    *({**BOX, "rank": rank, "pastes": 1} for rank in (1, 4)),
    {**MAP, "rank": 4, "preserve": 3.0, "pastes": 1},
    *(
        {"loss": "l2", "region": "map", "objective": objective, "rank": rank, "preserve": 0.0, "pastes": 1}
        for rank in (1, 4)
        for objective in ("pictures", "activation")
    ),
]
SLOW = ("synthesis.layer3.conv", "synthesis.layer4.conv", "synthesis.layer6.conv", "synthesis.layer8.conv")
UNSEEN, UNSEEN_SEED, STATISTICS = 160, 7, 600
TRUE_FOLLOWS, TRUE_SPILLS, TRUE_DESTROYS = 0.6, 0.02, 0.05


def true_verdict(truth: dict[str, float]) -> str:
    """See above."""
    elsewhere = max(truth["collateral"], truth["collateral_unrelated"])
    if elsewhere > TRUE_DESTROYS:
        return "destroys"
    if truth["efficacy"] < TRUE_FOLLOWS:
        return "weak"
    return "spills" if elsewhere > TRUE_SPILLS else "holds"


def verdict_with(row: dict, follows: float, spills: float, destroys: float) -> str:
    """The verdict that other limits give."""
    elsewhere = max(row["outside"] or 0.0, row["unrelated"] or 0.0)
    if elsewhere > destroys:
        return "destroys"
    if row["reach"] is None or row["reach"] < follows:
        return "weak"
    return "spills" if elsewhere > spills else "holds"


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's, with the mean rank for equal values."""

    def ranks(values: Sequence[float]) -> Tensor:
        _, place, count = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double()
        return ((2 * last - count + 1) / 2)[place]

    pair = torch.stack([ranks(one), ranks(two)])
    return torch.corrcoef(pair)[0, 1].item()


class World:
    """The embedded generator, what an edit is measured against, and nothing computed twice."""

    def __init__(self) -> None:
        self.generator = chapels()
        self.latents = rc.sample_latents(16, 1000, seed=1)
        self.unseen = rc.sample_latents(16, UNSEEN, seed=UNSEEN_SEED)
        self.before = paint(self.generator, self.unseen)
        self._layers: dict[str, rc.BoundLayer] = {}
        self._moments: dict[str, rc.SecondMoment] = {}
        self._scenes: dict[str, Scene] = {}

    def on(self, name: str) -> tuple[rc.BoundLayer, rc.SecondMoment]:
        if name not in self._layers:
            self._layers[name] = layer = rc.bind(self.generator, name)
            self._moments[name] = rc.collect_second_moment(layer, self.latents[:STATISTICS], progress=False)
        return self._layers[name], self._moments[name]

    def scene(self, rule: str) -> Scene:
        if rule not in self._scenes:
            given = Given([], load_edit(rule), self.latents, self.unseen)
            self._scenes[rule] = scene_of(self.on(LAYERS[0])[0], given)
        return self._scenes[rule]

    def row(self, rule: str, name: str, way: dict[str, Any]) -> dict[str, Any]:
        """One edit: what is true of it, and what rc.measure says."""
        layer, moment = self.on(name)
        edit, scene = load_edit(rule), self.scene(rule)
        if way["pastes"] > 1:
            edit = rc.Edit(edit.copy, edit.where, edit.where, latents=self.latents)
        options = {key: value for key, value in way.items() if key != "pastes"} | {"trust": None}
        change = rc.rewrite(layer, moment, edit, self.latents, **options)
        with change:
            after = paint(self.generator, self.unseen)
        plain = self._look(layer, change)

        def look(latents: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
            if latents is not self.unseen:
                return plain(latents, rows)
            return 2 * self.before[rows] - 1, 2 * after[rows] - 1

        given = Given([change], load_edit(rule), self.latents, self.unseen, moment=moment)
        report = measured(layer, given, look=look, scene=scene).to_dict()
        told = {key: report[key] for key in ("reach", "agreement", "outside", "unrelated", "size", "weight_size")}
        return {
            "rule": rule,
            "layer": name,
            "way": way,
            "truth": vars(score(RULES[rule], self.before, after, self.unseen)),
        } | told

    @staticmethod
    def _look(layer: rc.BoundLayer, change: rc.Rewrite) -> Look:
        def look(latents: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
            before = layer.render(latents[rows])
            with change:
                return before, layer.render(latents[rows])

        return look


def edits() -> list[tuple[str, str, dict[str, Any]]]:
    """All of them, in an order by chance, so that the first few are a sample."""
    every = [
        (rule, name, way)
        for rule in RULES
        for name in LAYERS
        for way in WAYS
        if way["objective"] == "value" or name in SLOW
    ]
    random.Random(0).shuffle(every)
    return every


def summary(rows: Sequence[dict]) -> Iterator[str]:
    """The tables."""
    yield "rank correlations with the truth; of the two sizes with the change of unrelated scenes"
    yield "rule         edits    reach  outside  unrelated     size  |dW|/|W|"
    for rule in (None, *RULES):
        own = [row for row in rows if rule in (None, row["rule"])]
        if len(own) < 3:
            continue
        truth = [row["truth"] for row in own]
        pairs = (
            ("efficacy", "reach"),
            ("collateral", "outside"),
            *(("collateral_unrelated", name) for name in ("unrelated", "size", "weight_size")),
        )
        numbers = [
            rank_correlation([each[true] for each in truth], [row[told] or 0.0 for row in own]) for true, told in pairs
        ]
        yield f"{rule or 'all':12} {len(own):5}  " + "  ".join(
            f"{n:{width}.3f}" for n, width in zip(numbers, (7, 7, 9, 7, 8), strict=True)
        )
    for told in ("size", "weight_size"):
        each = [[row for row in rows if row["layer"] == name] for name in LAYERS]
        within = [
            rank_correlation([row["truth"]["collateral_unrelated"] for row in own], [row[told] for row in own])
            for own in each
            if len(own) > 2
        ]
        if within:
            yield f"{told} within one layer: {min(within):.2f} to {max(within):.2f}"
    train, test = rows[::2], rows[1::2]

    def right(some: Sequence[dict], *limits: float) -> float:
        return sum(verdict_with(row, *limits) == true_verdict(row["truth"]) for row in some) / len(some)

    grid = [(f / 100, s / 1000, d / 1000) for f in range(30, 91, 5) for s in range(14, 41, 2) for d in range(40, 71, 5)]
    best = max(grid, key=lambda limits: right(train, *limits))
    for text, limits in (("the library's", (FOLLOWS, SPILLS, DESTROYS)), ("best of the first half", best)):
        yield (
            f"verdicts with limits {limits} ({text}): right in {right(train, *limits):.1%} of the first half, "
            f"{right(test, *limits):.1%} of the second"
        )
    limits = FOLLOWS, SPILLS, DESTROYS
    for rule in RULES:
        own = [row for row in rows if row["rule"] == rule]
        if own:
            yield f"{rule}: the library's verdict is right in {right(own, *limits):.1%} of {len(own)}"
    yield f"of all: right in {right(rows, *limits):.1%} of {len(rows)}"
    for kind in ("holds", "weak", "spills", "destroys"):
        verdicts = [verdict_with(row, FOLLOWS, SPILLS, DESTROYS) for row in rows if true_verdict(row["truth"]) == kind]
        yield f"truly {kind}: {len(verdicts)}, told " + ", ".join(
            f"{each} {verdicts.count(each)}" for each in sorted(set(verdicts))
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each edit")
    parser.add_argument("--edits", type=int, help="at most so many (default all)")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["rule"], row["layer"], json.dumps(row["way"], sort_keys=True)) for row in rows}
    world: World | None = None
    warnings.simplefilter("ignore")  # of edits that are meant to go wrong
    for rule, name, way in edits()[: options.edits]:
        if (rule, name, json.dumps(way, sort_keys=True)) in done:
            continue
        world = world or World()
        try:
            rows.append(world.row(rule, name, way))
        except rc.RewriteCoreError as error:  # such as a rank that a context is too small for
            print(f"{rule} {name} {way}: {error}", file=sys.stderr)
            continue
        with options.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
