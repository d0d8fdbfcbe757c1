"""How good pictures of the embedded world can get: ``python -m benchmarks.rules.limits --out DIR [RULE ...]``.

What is asked for: efficacy >= 95 %, completed >= 75 %, collateral <= 0.005 on every rule. Four kinds of rows:

- *the generator itself*: what it paints for the latent whose scene is the wanted one (in the region that the rule
  changes). No edit of one layer can be expected to paint that better.
- *the goal*: the picture that the edit's paste renders, against the truth of its own scene. An edit is fitted to this.
- *the paste*: on every scene that the rule concerns the edit's own copy is pasted where it belongs, by the true mask,
  as near as whole cells of the map let it be: one copied picture in all places, without a rule.
- edits, over layers, ranks, objectives, ``preserve`` and one paste or the copy spread over the context.

Scored on scenes that no table of results is made of. The lines go to ``limits.jsonl``; what is there is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rewrite_core as rc
from rewrite_core.demo import RULES, chapels, load_edit
from rewrite_core.demo.rules import scene_scores
from rewrite_core.demo.run import CHOSEN, EDIT_LATENTS, EDIT_SEED
from rewrite_core.demo.world import LATENT_SIZE, region, render, scene_from_latents
from rewrite_core.pictures import paint, to_unit

from .grid import lines_of

SCENES, SEED = 300, 3  # 3: the scenes that the demo's layers were chosen on
WANTED = {"efficacy": 0.95, "completed": 0.75, "collateral": 0.005}
FIELDS = (*WANTED, "unrelated")
LASSO = {"spire": 6, "watermark": 2, "reflection": 2}  # pixels outside the shape, as in the shipped edits
LAYERS = {
    "spire": [f"synthesis.layer{n}.conv" for n in (3, 4, 5)],
    "watermark": ["synthesis.layer4.conv"],
    "reflection": [f"synthesis.layer{n}.conv" for n in (6, 7, 8)],
}
VALUES: list[dict[str, Any]] = [
    {"objective": "value", "rank": rank, "preserve": preserve, "spread": spread}
    for rank, preserve, spread in itertools.product((4, 10, 20), (0.0, 0.03, 0.1), (False, True))
]
PICTURES: list[dict[str, Any]] = [
    {"objective": "pictures", "rank": rank, "preserve": preserve, "spread": spread}
    for rank, preserve, spread in itertools.product((4, 10), (0.0, 1.0, 3.0, 10.0), (False, True))
]


def twins(rule: str, latents: Tensor) -> Tensor:
    """Latents [N, 16] of the same scenes under the rule. The ground of a lit scene is that of the dark one."""
    found = latents.clone()
    if rule == "spire":  # a third of a turn back, in the plane whose sectors are the kinds of roof
        turn = -2 * math.pi / 3
        x, y = latents[:, 0], latents[:, 14]
        found[:, 0], found[:, 14] = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    else:
        own = {"watermark": 2, "reflection": 1}[rule]
        found[:, own] = -latents[:, own]
    return found


class World:
    """The generator, the scenes, and nothing computed twice."""

    def __init__(self) -> None:
        self.generator = chapels()
        self.latents = rc.sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED)
        self.unseen = rc.sample_latents(LATENT_SIZE, SCENES, seed=SEED)
        self.before = paint(self.generator, self.unseen)
        self._on: dict[str, tuple[rc.BoundLayer, rc.SecondMoment]] = {}

    def on(self, name: str) -> tuple[rc.BoundLayer, rc.SecondMoment]:
        if name not in self._on:
            layer = rc.bind(self.generator, name)
            self._on[name] = layer, rc.collect_second_moment(layer, self.latents, batch_size=50, progress=False)
        return self._on[name]

    def told(self, rule: str, after: Tensor) -> dict[str, float]:
        """The scores of pictures of all scenes."""
        each = scene_scores(RULES[rule], self.before, after, self.unseen)
        means = (each.followed.float(), each.completed, each.collateral, each.collateral_unrelated)
        return {field: values.mean().item() for field, values in zip(FIELDS, means, strict=True)}

    def itself(self, rule: str) -> dict[str, Any]:
        """What the generator paints for the wanted scenes: only the region is compared."""
        mine = RULES[rule].concerns(scene_from_latents(self.unseen))
        after = self.before.clone()
        after[mine] = paint(self.generator, twins(rule, self.unseen[mine]))
        told = self.told(rule, after)
        return {field: told[field] for field in ("efficacy", "completed")}

    def goal(self, rule: str, name: str) -> dict[str, Any]:
        """What the edit is fitted to, on its own scene."""
        layer, edit = rc.bind(self.generator, name), load_edit(rule).on(self.latents)
        own = self.latents[[edit.pastes[0].index]]
        goal = to_unit(rc.preview(layer, edit, self.latents), (-1.0, 1.0))
        each = scene_scores(RULES[rule], paint(self.generator, own), goal, own)
        means = (each.followed.float(), each.completed, each.collateral)
        return {field: values.mean().item() for field, values in zip(WANTED, means, strict=True)}

    def pasted(self, rule: str, name: str) -> dict[str, Any]:
        """The edit's copy, pasted into every scene that the rule concerns."""
        layer, edit = rc.bind(self.generator, name), load_edit(rule).on(self.latents)
        assert edit.copy is not None
        scenes = scene_from_latents(self.unseen)
        mine = RULES[rule].concerns(scenes).nonzero()[:, 0]
        shapes = region(render(scenes), render(scenes.replace(**RULES[rule].change))).float()
        margin = LASSO[rule]
        areas = F.max_pool2d(shapes[:, None], 2 * margin + 1, 1, margin)[:, 0]
        latents, after = torch.cat([self.unseen, edit.copy.latent(self.latents)]), self.before.clone()
        copy = rc.Selection(len(self.unseen), edit.copy.mask)
        for row in mine.tolist():
            paste = rc.Selection(row, areas[row])
            one = rc.Edit(copy, paste, [paste], latents=latents)
            after[row] = to_unit(rc.preview(layer, one, latents), (-1.0, 1.0))[0]
        told = self.told(rule, after)
        return {field: told[field] for field in WANTED}

    def edited(self, rule: str, name: str, way: dict[str, Any]) -> dict[str, Any]:
        """One edit."""
        layer, moment = self.on(name)
        edit = load_edit(rule).on(self.latents)
        if way["spread"]:
            edit = edit.spread(layer, moment, self.latents)
        options = {key: value for key, value in way.items() if key != "spread"}
        change = rc.rewrite(layer, moment, edit, self.latents, **options)
        with change:
            after = paint(self.generator, self.unseen)
        return {**self.told(rule, after), "size": change.size_on_keys(moment), "pastes": len(edit.pastes)}


Job = tuple[str, str | None, dict[str, Any] | None, Callable[[World], dict[str, Any]]]


def jobs(rule: str) -> Iterator[Job]:
    """(what, layer, settings, how) of each row of a rule."""
    yield "the generator itself", None, None, lambda world: world.itself(rule)
    for name in LAYERS[rule]:
        yield "the goal", name, None, lambda world, name=name: world.goal(rule, name)  # type: ignore[misc]
        yield "the paste", name, None, lambda world, name=name: world.pasted(rule, name)  # type: ignore[misc]
    for name in LAYERS[rule]:
        ways = VALUES + (PICTURES if name == CHOSEN[rule][0] else [])
        for way in ways:
            yield "edit", name, way, lambda world, name=name, way=way: world.edited(rule, name, way)  # type: ignore[misc]


def words(row: dict[str, Any]) -> str:
    """What a row is of."""
    if row["settings"] is None:
        return row["what"] if row["layer"] is None else f"{row['what']} at {row['layer']}"
    way = row["settings"]
    spread = f", copy in {row['pastes']} places" if way["spread"] else ""
    return f"{row['layer']}, {way['objective']}, rank {way['rank']}, preserve {way['preserve']:g}{spread}"


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    if "error" in row:
        return f"{row['rule']}, {row['what']} at {row['layer']} {row['settings']}: {row['error']}"
    numbers = ", ".join(f"{field} {row[field]:.4f}" for field in FIELDS if field in row)
    return f"{row['rule']}, {words(row)}: {numbers}"


def missed(row: dict[str, Any]) -> float:
    """By how much of what is wanted a row falls short, all three together; 0: it has all."""
    short = max(0.0, 1 - row["efficacy"] / WANTED["efficacy"]) + max(0.0, 1 - row["completed"] / WANTED["completed"])
    return short + max(0.0, row["collateral"] / WANTED["collateral"] - 1)


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of each rule the bounds, and the edits that fall least short."""
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule and "error" not in row]
        yield from (line(row) for row in own if row["what"] != "edit")
        edits = sorted((row for row in own if row["what"] == "edit"), key=missed)
        yield f"{rule}: {sum(not missed(row) for row in edits)} of {len(edits)} edits have all that is wanted"
        yield from (f"  short by {missed(row):.3f}: {line(row)}" for row in edits[:5])


def main(out: Path, names: Sequence[str] = ()) -> int:
    """Do the rows that `out` lacks, and print the best of all."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "limits.jsonl"
    rows = lines_of(path)

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(json.dumps(row[field], sort_keys=True) for field in ("rule", "what", "layer", "settings"))

    done, world = {key(row) for row in rows}, None
    warnings.simplefilter("ignore")  # of places that are left out, and fits that are held back
    for rule in names or LAYERS:
        for what, layer, way, how in jobs(rule):
            row: dict[str, Any] = {"rule": rule, "what": what, "layer": layer, "settings": way}
            if key(row) in done:
                continue
            world = world or World()
            try:
                row |= how(world)
            except rc.RewriteCoreError as error:
                row["error"] = str(error)
            rows.append(row)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), file=sys.stderr, flush=True)
    print(*summary(rows), sep="\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("rules", nargs="*", choices=[[], *LAYERS], help="by default all of them")
    given = parser.parse_args()
    raise SystemExit(main(given.out, given.rules))
