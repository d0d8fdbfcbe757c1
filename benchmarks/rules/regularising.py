"""What keeps an edit from doing more than it should: ways of regularising, against each other, on every rule.

``python -m benchmarks.rules.regularising [RULE ...]``: a line for each way. All fit one paste along directions of the
same context, whole maps, l2. *progress* and *unrelated* are those of :mod:`.grid`; on chapels there are true efficacy
and collateral besides.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rewrite_core as rc
from rewrite_core.solvers.problem import generic_second_moment

from . import NAMES, Rule, rule
from .grid import Judge, at_equal_progress, of_change

_VALUES: dict[str, Any] = {"rank": 4, "region": "map", "loss": "l2", "objective": "value"}
_PICTURES: dict[str, Any] = {**_VALUES, "objective": "pictures"}
_REFERENCE = {**rc.REFERENCE, "solver": "lm"}
WEIGHTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of preserve, that are chosen from
_ORDINARY = 32


class On:
    """One rule at one layer, and ways to solve it."""

    def __init__(self, judged: Rule):
        self.judge, self.edit = Judge(judged), judged.edit
        named = judged.subject.layers[1 if judged.name == "reflection" else 0]
        self.layer = rc.bind(self.judge.generator, named)
        self.latents = self.judge.edit_latents
        self.moment = rc.collect_second_moment(self.layer, self.latents, batch_size=50, progress=False)

    def solve(self, moment: rc.SecondMoment | None = None, edit: rc.Edit | None = None, **options: Any) -> rc.Rewrite:
        """Without a bound, where none is asked for."""
        asked = {"trust": None, **options}
        return rc.rewrite(self.layer, moment or self.moment, edit or self.edit, self.latents, **asked)

    def size(self, change: rc.Rewrite) -> float:
        return change.size_on_keys(self.moment)

    def ridge(self, share: float, **options: Any) -> rc.Rewrite:
        """C with a share of its mean diagonal added to the diagonal, for the directions alone."""
        moment = self.moment.to("cpu")
        ridged = rc.SecondMoment(moment.channels, moment.layer, moment.fingerprint)
        ridged.merge(moment)
        ridged._sum += share * moment._sum.diagonal().mean() * torch.eye(moment.channels, dtype=torch.float64)
        return self.solve(ridged, **options)

    def explained(self, share: float, **options: Any) -> rc.Rewrite:
        """The least rank whose directions hold that share of the context's whitened keys."""
        keys, weights = rc.context_keys(self.layer, self.edit.where, self.latents)
        white = torch.linalg.solve_triangular(
            self.moment.factor.lower, (keys.double() * weights.double()[:, None]).T, upper=False
        )
        squares = torch.linalg.svdvals(white).square()
        rank = int((squares.cumsum(0) / squares.sum() < share).sum()) + 1
        return self.solve(**{**options, "rank": min(rank, 10)})

    def corner(self, **options: Any) -> rc.Rewrite:
        """The L-curve's corner: where log loss against log change of ordinary pictures bends most."""
        changes = [self.solve(**{**options, "preserve": weight}) for weight in WEIGHTS]
        places = []
        for change in changes:
            generic = generic_second_moment(
                self.layer, change.directions, self.latents[:_ORDINARY], self.moment.matrix()
            )
            flat = change.coefficients.double().flatten(1)
            bent = torch.einsum("oj,jk,ok->o", flat, generic.double(), flat).mean().item()
            places.append((math.log(change.final_loss or 1e-30), math.log(max(bent, 1e-30))))

        def bend(i: int) -> float:
            (ax, ay), (bx, by), (cx, cy) = places[i - 1 : i + 2]
            area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
            sides = math.dist(places[i - 1], places[i]) * math.dist(places[i], places[i + 1])
            return abs(area) / max(sides * math.dist(places[i - 1], places[i + 1]), 1e-30)

        return changes[max(range(1, len(WEIGHTS) - 1), key=bend)]

    def crossed(self, **options: Any) -> rc.Rewrite:
        """Cross-validation: the copy goes to every place of the context; the weight whose fits to the others come
        closest to the goal of the one that is left out is the weight of the edit's own paste."""
        places = self.edit.where

        def left(weight: float) -> float:
            total = 0.0
            for i, place in enumerate(places):
                others = rc.Edit(self.edit.copy, [*places[:i], *places[i + 1 :]], places, latents=self.latents)
                change = self.solve(edit=others, **{**options, "preserve": weight})
                total += self._missed(change, rc.Edit(self.edit.copy, place, places, latents=self.latents))
            return total

        return self.solve(**{**options, "preserve": min(WEIGHTS, key=left)})

    def _missed(self, change: rc.Rewrite, edit: rc.Edit) -> float:
        from rewrite_core.edits.goals import paste_goals

        goals = paste_goals(self.layer, edit, self.latents, "map")
        with change:
            return sum((self.layer.value(goal.capture) - goal.target).square().mean().item() for goal in goals)

    def own_strength(self, change: rc.Rewrite) -> float:
        """The strength at which the edit's own pictures come closest to their goal."""
        rows = list(dict.fromkeys(paste.index for paste in self.edit.pastes))
        goal = rc.preview(self.layer, self.edit, self.latents)

        def missed(strength: float) -> float:
            change.apply(strength=strength)
            try:
                return (self.layer.render(self.latents[rows]) - goal).abs().mean().item()
            finally:
                change.revert()

        return min((0.5 + 0.125 * step for step in range(13)), key=missed)


Way = Callable[[On], rc.Rewrite]
QUICK: dict[str, Way] = {
    "values": lambda on: on.solve(**_VALUES),
    "values, rank 1": lambda on: on.solve(**_VALUES | {"rank": 1}),
    **{f"ridge {share:g}": partial(On.ridge, share=share, **_VALUES) for share in (1e-4, 1e-2, 1e-1, 1.0)},
    **{f"explained {share:g}": partial(On.explained, share=share, **_VALUES) for share in (0.5, 0.7, 0.9)},
    **{f"preserve {weight:g}": partial(On.solve, **_VALUES, preserve=weight) for weight in (0.03, 0.1, 0.3, 1.0)},
    "preserve, L-curve": lambda on: on.corner(**_VALUES),
    "preserve, crossed": lambda on: on.crossed(**_VALUES),
    **{f"trust {bound:g}": partial(On.solve, **_VALUES, trust=bound) for bound in (0.25, 0.5, 1.0)},
    "rank 1, l1, box": lambda on: on.solve(**_REFERENCE),
    "rank 1, l1, box, trust 0.25": lambda on: on.solve(**_REFERENCE | {"trust": 0.25}),
}
SLOW: dict[str, Way] = {
    "pictures": lambda on: on.solve(**_PICTURES),
    "pictures, preserve 0.1": lambda on: on.solve(**_PICTURES, preserve=0.1),
    "pictures, preserve 0": lambda on: on.solve(**_PICTURES, preserve=0.0),
    "pictures, trust 0.25": lambda on: on.solve(**_PICTURES, preserve=0.0, trust=0.25),
}
BOUNDS = (0.5, 1.0)  # that a plain fit is scaled back to


def rows_of(judged: Rule, ways: dict[str, Way]) -> Iterator[dict[str, Any]]:
    """One row for each way, and for each scaling of it."""
    on = On(judged)
    equal = judged.subject.build is not None
    for name, way in ways.items():
        start = time.perf_counter()
        try:
            change = way(on)
        except rc.SelectionError as error:  # places of one picture that overlap
            print(f"{judged.name} {name}: {error}", file=sys.stderr)
            continue
        seconds, size = time.perf_counter() - start, on.size(change)
        scaled = of_change(on.judge, change)
        strengths = {name: 1.0}
        if name == "values":
            strengths |= {f"scaled to {bound:g}": bound / size for bound in BOUNDS if size > bound}
        if name in SLOW:
            strengths[f"{name}, own strength"] = on.own_strength(change)
        found = at_equal_progress(scaled) if equal else None
        for told, strength in strengths.items():
            full = scaled(strength)
            yield {
                "rule": judged.name,
                "way": told,
                "rank": change.rank,
                "size": strength * size,
                "strength": strength,
                "seconds": seconds,
                "progress": full.progress,
                "unrelated": full.unrelated,
                "unrelated at equal progress": found and found[1],
                **full.ruled,
            }


def line(row: dict[str, Any]) -> str:
    def told(name: str, form: str) -> str:
        return "-".rjust(6) if row.get(name) is None else format(row[name], form)

    numbers = (
        f"{row['rank']:4}",
        told("strength", "6.2f"),
        told("size", "6.2f"),
        told("progress", "6.2f"),
        told("unrelated", "6.4f"),
        told("unrelated at equal progress", "6.4f"),
        told("efficacy", "6.3f"),
        told("collateral", "6.4f"),
        told("seconds", "6.1f"),
    )
    return f"{row['rule']:14} {row['way']:32} " + "  ".join(numbers)


_COLUMNS = ("rank", "str.", "size", "prog.", "unrel.", "equal", "effic.", "coll.", "s")
HEAD = f"{'rule':14} {'way':32} " + "  ".join(column.rjust(6) for column in _COLUMNS).replace("  rank", "rank", 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rules", nargs="*", metavar="RULE", help="default: all")
    parser.add_argument("--ways", choices=("quick", "slow", "all"), default="all", help="slow: those of pictures")
    parser.add_argument("--out", type=Path, help="JSON lines to add to, one for each row")
    options = parser.parse_args(arguments)
    ways = (QUICK if options.ways != "slow" else {}) | (SLOW if options.ways != "quick" else {})
    warnings.simplefilter("ignore")  # of edits that are meant to go wrong
    print(HEAD, flush=True)
    for name in options.rules or NAMES:
        try:
            for row in rows_of(rule(name), ways):
                print(line(row), flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        except rc.RewriteCoreError as error:
            print(f"{name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
