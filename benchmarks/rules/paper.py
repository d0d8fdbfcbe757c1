"""The paper's comparisons, against the embedded world's ground truth: ``rewrite bench paper``.

Four rules (dome to spire, watermark removal, and the reflection both ways: lit windows stop lighting the ground, dark
ones start to), each by every way of ``rc.compare`` and by ours at ranks 1, 4 and 10. Each way is scored on the same
unseen scenes, whose counterfactual pictures are known; intervals are percentiles of means over scenes drawn with
replacement. One line of JSON for each rule and way goes to ``paper.jsonl``; a run that was ended goes on from there.
``python -m benchmarks.rules.paper --out DIR [RULE ...]`` does some of the rules.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewrite_core as rc
from rewrite_core.demo import chapels, load_edit
from rewrite_core.demo.rules import INVERSES, RULES, SceneScores, scene_scores
from rewrite_core.demo.run import CHOSEN, EDIT_LATENTS, EDIT_SEED, UNSEEN_LATENTS, UNSEEN_SEED
from rewrite_core.demo.world import LATENT_SIZE
from rewrite_core.evaluation.comparing import TUNED, WAYS, On
from rewrite_core.evaluation.verdict import SPILLS
from rewrite_core.pictures import paint

from .grid import lines_of

CASES = RULES | INVERSES
LAYERS = {name: layer for name, (layer, _) in CHOSEN.items()} | {"glow": CHOSEN["reflection"][0]}
RANKS, OBJECTIVES, RANK = (1, 4, 10), ("pictures", "value"), 4  # RANK: of the ways beside ours that have one
FIELDS = ("efficacy", "completed", "collateral", "unrelated")
DRAWS, SEED = 2000, 0  # of the bootstrap
CHOICE, CHOICE_SEED = 100, 3  # scenes that fine-tuning is stopped by: others than those of the table
ORDINARY = 16  # pictures that fine-tuning is asked to leave alone
# a step with ordinary pictures takes ten times as long; of the three rates 0.003 did best there, on the spire
RATES = {"fine-tuned": (0.001, 0.003, 0.01), "fine-tuned, preserved": (0.003,)}
STOPS = {"fine-tuned": (10, 25, 50, 100, 200), "fine-tuned, preserved": (10, 25, 50, 100)}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done: latents of the second moment, unseen scenes, learning rates and stops of fine-tuning."""

    statistics: int = EDIT_LATENTS
    scenes: int = UNSEEN_LATENTS
    choice: int = CHOICE
    rates: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=lambda: RATES)
    stops: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: STOPS)


QUICK = Size(64, 40, 20, dict.fromkeys(STOPS, (0.003,)), dict.fromkeys(STOPS, (2, 4)))


def interval(values: Tensor, draws: int = DRAWS, seed: int = SEED) -> tuple[float, float, float]:
    """(mean, low, high): of values [n], and the bounds that 95 % of the means of n values drawn from them lie in."""
    values = values.double()
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (draws, len(values)), generator=random)
    means = values[rows].mean(1)
    return values.mean().item(), *means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


class World:
    """The embedded generator, its pictures as they are, and what each rule is solved with."""

    def __init__(self, size: Size):
        self.size, self.generator = size, chapels()
        self.latents = rc.sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED)
        self._moments: dict[str, rc.SecondMoment] = {}
        self.unseen = self._painted(size.scenes, UNSEEN_SEED)

    def _painted(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Latents and their pictures as they are: made while no change is on."""
        latents = rc.sample_latents(LATENT_SIZE, count, seed=seed)
        return latents, paint(self.generator, latents)

    def on(self, rule: str, rank: int) -> On:
        layer = rc.bind(self.generator, LAYERS[rule])
        if layer.name not in self._moments:
            rows = self.latents[: self.size.statistics]
            self._moments[layer.name] = rc.collect_second_moment(layer, rows, batch_size=50, progress=False)
        return On(layer, self._moments[layer.name], load_edit(rule).on(self.latents), self.latents, rank)

    @functools.cached_property
    def choice(self) -> tuple[Tensor, Tensor]:
        """What fine-tuning, which changes a copy, is stopped by."""
        return self._painted(self.size.choice, CHOICE_SEED)

    def scores(self, rule: str, generator: nn.Module, on: tuple[Tensor, Tensor]) -> SceneScores:
        latents, before = on
        return scene_scores(CASES[rule], before, paint(generator, latents), latents)


def ways() -> dict[str, tuple[int, Callable[[On], rc.Rewrite]]]:
    """{name: (rank, how the change is made)}: ours at each rank and objective, then the others."""

    def ours(rank: int, objective: str) -> Callable[[On], rc.Rewrite]:
        return lambda on: on.ours(rank, objective)

    named = {f"ours, {what}, rank {rank}": (rank, ours(rank, what)) for what in OBJECTIVES for rank in RANKS}
    return named | {name: (RANK, make) for name, make in WAYS.items() if not name.startswith("ours")}


def told(scores: SceneScores) -> dict[str, tuple[float, float, float]]:
    """{field: (mean, low, high)}"""
    each = (scores.followed, scores.completed, scores.collateral, scores.collateral_unrelated)
    return {field: interval(values) for field, values in zip(FIELDS, each, strict=True)}


def row_of(world: World, rule: str, way: str, kept: Path) -> dict[str, Any]:
    """One way of one rule. `kept`: see :func:`_tuned`."""
    made = ways()
    facts: dict[str, Any] = {"size": None, "rank": None, "steps": None, "lr": None}
    if way in TUNED:
        scores, more = _tuned(world, rule, way, kept)
        facts |= more
    else:
        rank, make = made[way]
        on = world.on(rule, rank)
        start = time.perf_counter()
        change = make(on)
        facts |= {"seconds": time.perf_counter() - start, "rank": change.rank, "size": change.size_on_keys(on.moment)}
        with change:
            scores = world.scores(rule, world.generator, world.unseen)
    return {"rule": rule, "way": way, "layer": LAYERS[rule], **facts, "scenes": world.size.scenes, **told(scores)}


def _tuned(world: World, rule: str, way: str, kept: Path) -> tuple[SceneScores, dict[str, Any]]:
    """All weights on the goal picture, at the learning rate and stopped at the step that were best on other scenes: of
    those that change scenes without the rule by less than the verdict's limit, or of all where none does, that of the
    highest efficacy. What each rate did there goes to `kept`, so that a run that was ended need not try it again."""
    for lr in world.size.rates[way]:
        if not any((each["rule"], each["way"], each["lr"]) == (rule, way, lr) for each in lines_of(kept)):
            tried = [_choice(world, rule, way, lr, each) for each in _stops(world, rule, way, lr, None)]
            with kept.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(each) + "\n" for each in tried))
    mine = [each for each in lines_of(kept) if (each["rule"], each["way"]) == (rule, way)]
    best = max(mine, key=lambda each: (each["unrelated"] < SPILLS, each["efficacy"], -each["unrelated"]))
    start = time.perf_counter()
    (found,) = _stops(world, rule, way, best["lr"], best["steps"])
    seconds = time.perf_counter() - start
    scores = world.scores(rule, found.generator, world.unseen)
    return scores, {"steps": best["steps"], "lr": best["lr"], "seconds": seconds}


def _stops(world: World, rule: str, way: str, lr: float, only: int | None) -> list[rc.FineTuned]:
    stops = world.size.stops[way] if only is None else (only,)
    return world.on(rule, RANK).tuned(TUNED[way], lr=lr, stops=stops, ordinary=ORDINARY)


def _choice(world: World, rule: str, way: str, lr: float, tuned: rc.FineTuned) -> dict[str, Any]:
    scores = world.scores(rule, tuned.generator, world.choice)
    return {
        "rule": rule,
        "way": way,
        "lr": lr,
        "steps": tuned.steps,
        "efficacy": scores.followed.double().mean().item(),
        "unrelated": scores.collateral_unrelated.double().mean().item(),
    }


def run(path: Path, size: Size, rules: Sequence[str], chosen: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows that a file lacks, each written to it as it is made."""
    rows = lines_of(path)
    done = {(row["rule"], row["way"]) for row in rows}
    left = [(rule, way) for rule in rules for way in chosen if (rule, way) not in done]
    world = World(size) if left else None
    for rule, way in left:
        assert world is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ways that are meant to go wrong
            row = row_of(world, rule, way, path.with_suffix(".tuned.jsonl"))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        yield row


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a table for each rule."""
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule]
        yield f"**{CASES[rule].title}** (`{own[0]['layer']}`)"
        yield ""
        yield "| way | efficacy, % | completed, % | collateral | unrelated | size | seconds |"
        yield "|---|---|---|---|---|---|---|"
        for row in own:
            shares = [_share(row[field]) for field in FIELDS[:2]]
            changes = [_change(row[field]) for field in FIELDS[2:]]
            size = "-" if row["size"] is None else f"{row['size']:.2f}"
            way = row["way"] if row["steps"] is None else f"{row['way']} ({row['steps']} steps, lr {row['lr']:g})"
            seconds = f"{row['seconds']:.2g}"
            yield f"| {' | '.join([way, *shares, *changes, size, seconds])} |"
        yield ""


def _share(value: Sequence[float]) -> str:
    mean, low, high = (100 * part for part in value)
    return f"{mean:.0f} ({low:.0f} to {high:.0f})"


def _change(value: Sequence[float]) -> str:
    mean, low, high = value
    return f"{mean:.4f} ({low:.4f} to {high:.4f})"


_MARKS = {
    **{f"ours, pictures, rank {rank}": ("tab:red", mark) for rank, mark in zip(RANKS, "ovs")},
    **{f"ours, value, rank {rank}": ("tab:orange", mark) for rank, mark in zip(RANKS, "ovs")},
    "single context": ("tab:green", "P"),
    "Lambda without direction": ("tab:green", "X"),
    "one layer unconstrained": ("tab:blue", "D"),
    "erase": ("tab:purple", "<"),
    "30 units zeroed": ("tab:gray", "^"),
    "60 units zeroed": ("tab:gray", ">"),
    "fine-tuned": ("black", "*"),
    "fine-tuned, preserved": ("black", "p"),
}
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each rule: efficacy over the change of scenes that it has nothing to do with, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(row["rule"] for row in rows))
    columns = 2 if len(rules) > 1 else 1
    sheet = Figure(figsize=(6 * columns, 4.2 * -(-len(rules) // columns) + 1.2), layout="constrained")
    FigureCanvasAgg(sheet)
    panels = list(sheet.subplots(-(-len(rules) // columns), columns, squeeze=False).flat)
    for unused in panels[len(rules) :]:
        unused.set_axis_off()
    handles: dict[str, Any] = {}
    for panel, rule in zip(panels, rules, strict=False):
        for row in (row for row in rows if row["rule"] == rule):
            colour, mark = _MARKS[row["way"]]
            (x, *across), (y, *up) = row["unrelated"], (100 * part for part in row["efficacy"])
            errors = [[x - across[0]], [across[1] - x]], [[y - up[0]], [up[1] - y]]
            handles[row["way"]] = panel.errorbar(
                x, y, xerr=errors[0], yerr=errors[1], fmt=mark, color=colour, markersize=8, elinewidth=1, alpha=0.85
            )
        panel.set_xscale("log")
        panel.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        panel.set_xticks([], minor=True)
        panel.set_xlim(_TICKS[0] * 0.8, _TICKS[-1] * 1.3)
        panel.set_ylim(-4, 104)
        panel.axvline(SPILLS, color="lightgray", zorder=0)
        panel.set_title(CASES[rule].title)
        panel.set_xlabel("mean change of unrelated scenes, 0..1 (gray: seen at once)")
        panel.set_ylabel("efficacy, %")
        panel.grid(alpha=0.25)
    sheet.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    sheet.savefig(path, dpi=110)


def main(out: Path, quick: bool, rules: Sequence[str] = ()) -> int:
    """Make the rows that are missing in `out`, print the tables, and draw ``paper.png``. `quick`: one rule and four
    ways on a few scenes, in files of their own."""
    out.mkdir(parents=True, exist_ok=True)
    name = "paper-quick" if quick else "paper"
    path = out / f"{name}.jsonl"
    chosen = ["ours, value, rank 1", "single context", "30 units zeroed", "fine-tuned"]
    for row in run(
        path,
        QUICK if quick else Size(),
        rules or (("watermark",) if quick else tuple(CASES)),
        chosen if quick else [*ways(), *TUNED],
    ):
        numbers = (f"{field} {row[field][0]:.4f}" for field in FIELDS)
        print(f"{row['rule']}, {row['way']}: {', '.join(numbers)}; {row['seconds']:.2f} s", flush=True)
    order = [(rule, way) for rule in CASES for way in (*ways(), *TUNED)]
    rows = sorted(lines_of(path), key=lambda row: order.index((row["rule"], row["way"])))
    print("\n".join(table(rows)))
    figure(rows, out / f"{name}.png")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("rules", nargs="*", choices=[[], *CASES], help="by default all")
    given = parser.parse_args()
    raise SystemExit(main(given.out, False, given.rules))
