"""Settings of ``rc.rewrite`` against each other, and against fine-tuning, on every rule: ``rewrite bench rules``.

*progress* of a change: how far unseen pictures that a rule concerns have come. On chapels along what the renderer says
they should become; on other people's generators along the linear discriminant of the pictures that the rule concerns
and those that it has nothing to do with (means and spreads of the cells of 4x4 pixels where the edit pastes, ridge
regression), 1 being the middle of the latter. *unrelated*: the mean change of pictures that the rule has nothing to do
with, in 0..1. What changes more makes more progress, so both are also told at equal progress, the change being scaled
by a strength.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewrite_core as rc
from rewrite_core.demo import RULES as SCENES
from rewrite_core.demo.rules import score
from rewrite_core.demo.world import region, render, scene_from_latents
from rewrite_core.files import atomic_write

from . import NAMES, PAINTED, Rule, rule

_WHOLE: dict[str, Any] = {"rank": 4, "region": "map", "loss": "l2"}
SETTINGS: dict[str, dict[str, Any]] = {
    "the reference's, by lm": {**rc.REFERENCE, "solver": "lm"},
    "default": {},
    "values, rank 1": _WHOLE | {"rank": 1, "objective": "value"},
    "values, no trust": _WHOLE | {"objective": "value", "trust": None},
    "values, preserve 0.3": _WHOLE | {"objective": "value", "preserve": 0.3},
    "activations": _WHOLE | {"objective": "activation"},
    "pictures, preserve 0": _WHOLE | {"objective": "pictures", "preserve": 0.0},
    "pictures, rank 1": _WHOLE | {"objective": "pictures", "rank": 1},
    "pictures": _WHOLE | {"objective": "pictures"},
    "pictures, rank 8": _WHOLE | {"objective": "pictures", "rank": 8},
}
EQUAL = 0.5  # the progress at which unrelated changes are compared
STRENGTHS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
CHAPELS, MOST = 300, 160  # unseen pictures that are looked at: of chapels, and of each kind of other generators
TUNED = 200  # steps of fine-tuning


@dataclasses.dataclass(frozen=True)
class Outcome:
    progress: float
    unrelated: float
    ruled: dict[str, float]  # efficacy and so on, where the renderer is known


class Judge:
    """What pictures of one rule say."""

    def __init__(self, judged: Rule, scenes: int | None = None):
        self.rule = judged
        self.generator, self.unseen = judged.subject.generator(), judged.subject.unseen_latents
        self.edit_latents = judged.subject.edit_latents
        if judged.subject.build is None:
            rows = torch.arange(CHAPELS if scenes is None else scenes)
            mine = torch.isin(rows, judged.concerned)
            self.concerned, self.unrelated = rows[mine], rows[~mine]
        else:
            self.concerned, self.unrelated = judged.concerned[:MOST], judged.unrelated[:MOST]
        self.before = self.paint(self.generator)
        self._towards = self._scenes if judged.subject.build is None else self._discriminant()

    def paint(self, generator: nn.Module) -> tuple[Tensor, Tensor]:
        """Pictures of the latents that the rule concerns, and of the others, in 0..1."""
        latents = self.unseen[torch.cat([self.concerned, self.unrelated])]
        painted = rc.pictures.paint(generator, latents, span=self.rule.subject.span)
        return painted[: len(self.concerned)], painted[len(self.concerned) :]

    def outcome(self, generator: nn.Module) -> Outcome:
        after = self.paint(generator)
        ruled = {}
        if self.rule.subject.build is None:
            latents = self.unseen[torch.cat([self.concerned, self.unrelated])]
            told = score(SCENES[self.rule.name], torch.cat(self.before), torch.cat(after), latents)
            ruled = {name: getattr(told, name) for name in ("efficacy", "completed", "collateral")}
        progress = self._towards(after[0]).clamp(-1, 1.5).mean().item()
        return Outcome(progress, (after[1] - self.before[1]).abs().mean().item(), ruled)

    @functools.cached_property
    def _wanted(self) -> Tensor:
        scene = scene_from_latents(self.unseen[self.concerned])
        wanted = render(scene.replace(**SCENES[self.rule.name].change))
        return (wanted - render(scene)) * region(render(scene), wanted)[:, None]

    def _scenes(self, after: Tensor) -> Tensor:
        moved = (after - self.before[0]) * self._wanted
        return moved.flatten(1).sum(1) / self._wanted.square().flatten(1).sum(1)

    def _discriminant(self) -> Callable[[Tensor], Tensor]:
        side = self.before[0].shape[-1] // _CELL
        area = torch.stack([paste.area((side, side)) for paste in self.rule.edit.pastes]).amax(0) > 0.25
        rows = torch.cat([_cells(pictures, area) for pictures in self.before])
        middle, spread = rows.mean(0), rows.std(0) + 1e-2
        rows = (rows - middle) / spread
        mine, others = (len(pictures) for pictures in self.before)
        kind = torch.cat([torch.ones(mine), -torch.ones(others)])
        weight = torch.cat([torch.full((mine,), 0.5 / mine), torch.full((others,), 0.5 / others)])
        ridge = torch.eye(rows.shape[1])
        along = torch.linalg.solve(rows.T @ (weight[:, None] * rows) + ridge, rows.T @ (weight * kind))
        places = rows @ along
        start, end = places[:mine], places[mine:].mean()

        def towards(after: Tensor) -> Tensor:
            return (start - (_cells(after, area) - middle) / spread @ along) / (start.mean() - end)

        return towards


_CELL = 4


def _cells(pictures: Tensor, area: Tensor) -> Tensor:
    """Means of the colours and spreads of the brightness in cells of 4x4 pixels, those of `area`: [N, features]."""
    grey = pictures.mean(1, keepdim=True)
    spread = (F.avg_pool2d(grey.square(), _CELL) - F.avg_pool2d(grey, _CELL).square()).clamp_min(0).sqrt()
    return torch.cat([F.avg_pool2d(pictures, _CELL), spread], 1)[:, :, area].flatten(1)


Scaled = Callable[[float], Outcome]


def of_change(judge: Judge, change: rc.Rewrite) -> Scaled:
    """The outcome of a change at a strength."""

    def scaled(strength: float) -> Outcome:
        change.apply(judge.generator, strength=strength)
        try:
            return judge.outcome(judge.generator)
        finally:
            change.revert(judge.generator)

    return scaled


def fine_tuned(judge: Judge, layer: rc.BoundLayer, steps: int) -> Scaled:
    """All weights of the generator, trained by Adam (1e-4 of each weight's own scale) towards the goal pictures; scaled
    between what they were and what they became."""
    target, rows = judge.rule.goals(layer), judge.rule.rows
    tuned = copy.deepcopy(judge.generator)
    groups = [{"params": [own], "lr": 0.01 * own.detach().square().mean().sqrt().item()} for own in tuned.parameters()]
    optimiser = torch.optim.Adam(groups, lr=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        F.mse_loss(tuned(judge.edit_latents[rows]), target).backward()
        optimiser.step()
    first = [own.detach().clone() for own in judge.generator.parameters()]
    moved = [new.detach() - old for new, old in zip(tuned.parameters(), first, strict=True)]

    def scaled(strength: float) -> Outcome:
        with torch.no_grad():
            for own, old, delta in zip(tuned.parameters(), first, moved, strict=True):
                own.copy_(old + strength * delta)
        return judge.outcome(tuned)

    return scaled


def at_equal_progress(scaled: Scaled) -> tuple[float, float] | None:
    """The strength at which the progress is EQUAL, and the unrelated change there; None where no strength has it."""
    last = 0.0, 0.0, 0.0
    for strength in STRENGTHS:
        now = scaled(strength)
        if now.progress >= EQUAL:
            share = (EQUAL - last[1]) / (now.progress - last[1])
            return last[0] + share * (strength - last[0]), last[2] + share * (now.unrelated - last[2])
        last = strength, now.progress, now.unrelated
    return None


def rows_of(
    judged: Rule, settings: dict[str, dict[str, Any] | None], steps: int, equal: bool
) -> Iterator[dict[str, Any]]:
    """One row for each setting; None is fine-tuning."""
    if not settings:
        return
    judge, named = Judge(judged), judged.subject.layers[0]
    if judged.name == "reflection":
        named = judged.subject.layers[1]
    layer = rc.bind(judge.generator, named)
    moment = rc.collect_second_moment(layer, judge.edit_latents, batch_size=50, progress=False)
    for name, options in settings.items():
        if judged.retouch and options and options.get("objective", "pictures") != "pictures":
            continue  # what is painted is a picture
        start = time.perf_counter()
        facts: dict[str, Any] = {"rank": None, "size": None}
        if options is None:
            scaled = fine_tuned(judge, layer, steps)
        else:
            options = options | judged.options(layer)
            change = rc.rewrite(layer, moment, judged.edit, judge.edit_latents, **options)
            scaled, facts = of_change(judge, change), {"rank": change.rank, "size": change.size}
        seconds, full = time.perf_counter() - start, scaled(1.0)
        found = at_equal_progress(scaled) if equal else None
        yield {
            "rule": judged.name,
            "layer": named,
            "settings": name,
            **facts,
            "seconds": seconds,
            "progress": full.progress,
            "unrelated": full.unrelated,
            "strength at equal progress": found and found[0],
            "unrelated at equal progress": found and found[1],
            **full.ruled,
        }


def _line(row: dict[str, Any]) -> str:
    def told(name: str, form: str) -> str:
        return "-".rjust(6) if row.get(name) is None else format(row[name], form)

    numbers = (
        told("progress", "6.2f"),
        told("unrelated", "6.4f"),
        told("strength at equal progress", "6.2f"),
        told("unrelated at equal progress", "6.4f"),
        *(told(name, "6.3f") for name in ("efficacy", "completed")),
        told("collateral", "6.4f"),
        told("size", "6.2f"),
        told("seconds", "6.1f"),
    )
    return f"{row['rule']:14} {row['settings']:20} " + "  ".join(numbers)


_COLUMNS = ("prog.", "unrel.", "str.", "equal", "effic.", "compl.", "coll.", "size", "s")
HEAD = f"{'rule':14} {'settings':20} " + "  ".join(column.rjust(6) for column in _COLUMNS)


def main(out: Path, quick: bool, chosen: Sequence[str] = (), names: Sequence[str] = ()) -> int:
    """Print the table, and write it to `out`/rules.jsonl, a line as soon as it is there; lines of a run before are kept
    and not made again. Rules whose generator is not here are left out, and said to be. `quick`: one rule of each
    generator, two settings, no equal progress, from the start. `chosen`, `names`: some of the settings and rules
    (default all)."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("rules-quick.jsonl" if quick else "rules.jsonl")
    if quick:
        path.unlink(missing_ok=True)
    settings: dict[str, dict[str, Any] | None] = {
        name: options
        for name, options in SETTINGS.items()
        if name in (chosen or (("default", "pictures") if quick else SETTINGS))
    }
    settings |= {"fine-tuning": None}
    rows = lines_of(path)
    print(HEAD, *map(_line, rows), sep="\n", flush=True)
    for name in names or (("watermark", "faces_glasses", "svhn_grey") if quick else NAMES + PAINTED):
        done = {row["settings"] for row in rows if row["rule"] == name}
        left = {each: options for each, options in settings.items() if each not in done}
        try:
            for row in rows_of(rule(name), left, 5 if quick else TUNED, not quick):
                rows.append(row)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(_line(row), flush=True)
        except rc.RewriteCoreError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    print(*summary(rows), sep="\n")
    return 0


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines that a run before has left, without one that was cut off, which goes."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # a run was ended as it wrote
        with atomic_write(path) as partial:
            partial.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def keep_by_rule(
    path: Path,
    names: Sequence[str],
    rows_of: Callable[[str], Iterable[dict[str, Any]]],
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Add the rows of each rule that the file lacks, when it is done, and print the lines of all."""
    rows = lines_of(path)
    print(*map(line, rows), sep="\n", flush=True)
    for name in names:
        if any(row["rule"] == name for row in rows):
            continue
        found = []
        try:
            for row in rows_of(name):
                found.append(row)
                print(line(row), flush=True)
        except rc.RewriteCoreError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in found))


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How the settings compare: in how many rules each changes less that is unrelated than fine-tuning does, at equal
    progress, where both have it; and how much that is beside it, by the geometric mean."""
    field = "unrelated at equal progress"
    by = {(row["rule"], row["settings"]): row[field] for row in rows}
    for name in dict.fromkeys(row["settings"] for row in rows):
        for other in ("fine-tuning", "default"):
            pairs = [
                (mine, by[own, other])
                for (own, settings), mine in by.items()
                if settings == name and mine and by.get((own, other))
            ]
            if pairs and name != other:
                ratio = torch.tensor([a / b for a, b in pairs]).log().mean().exp().item()
                less = sum(a < b for a, b in pairs)
                share = f"{less} of {len(pairs)} rules ({less / len(pairs):.0%})"
                yield f"{name}: less than {other} in {share}, {ratio:.2f} times as much on average"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[], help="by default all")
    parser.add_argument("--rules", nargs="+", choices=NAMES + PAINTED, default=[], help="by default all")
    given = parser.parse_args()
    raise SystemExit(main(given.out, False, given.settings, given.rules))
