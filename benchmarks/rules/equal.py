"""The default edit against fine-tuning at equal reach: ``python -m benchmarks.rules.equal --out DIR [RULE ...]``.

Every rule is solved with the defaults (``--objective``: or fitted to something else), at two layers. How
far that goes (*progress*, see :mod:`.grid`) is the reach to compare at: all weights are fine-tuned on the same goal
pictures, each result is scaled between what the weights were and what they became until it goes as far, and the change
of unrelated pictures is told. Fine-tuning may choose its learning rate, its stop and whether it preserves ordinary
pictures on the very pictures that are compared, which ours may not. What ``rc.measure`` says of the default edit is
told, too: none may destroy pictures, and none may do nothing without a word. The lines go to ``equal.jsonl``
(``equal-OBJECTIVE.jsonl``), and edits that are there are not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewrite_core as rc

from . import NAMES, PAINTED, Rule, rule
from .grid import Judge, lines_of

TUNINGS: tuple[tuple[float, float, tuple[int, ...]], ...] = (  # (preserve, learning rate, stops)
    (0.0, 0.001, (25, 100, 200)),
    (0.0, 0.003, (25, 100)),
    (0.0, 0.01, (25, 100)),
    (1.0, 0.003, (25, 100)),
    (1.0, 0.01, (25, 100)),
)
PLAIN = "lr 0.01, 25 steps", "lr 0.01, 100 steps"  # fine-tuning when nothing but the goals is given, and its stop
KEPT = tuple(f"{words}, preserve" for words in PLAIN)  # and ordinary pictures

SCENES = 100  # of chapels
ORDINARY = 16  # pictures that fine-tuning is asked to leave alone
HALVINGS = 4  # of the strength that goes as far as ours
LITTLE = 0.1  # an edit that goes less far than this does next to nothing


class Trial:
    """One rule at one layer."""

    def __init__(self, judged: Rule, judge: Judge, name: str):
        self.rule, self.judge, self.layer = judged, judge, rc.bind(judge.generator, name)
        self.latents = judge.edit_latents
        self.edit = judged.edit.on(self.latents)

    def ours(self, **options: Any) -> tuple[float, dict[str, Any]]:
        """The default edit, or with these options: how far it goes, and the facts of it."""
        moment = rc.collect_second_moment(self.layer, self.latents, batch_size=50, progress=False)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            options = self.rule.options(self.layer) | options
            change = rc.rewrite(self.layer, moment, self.edit, self.latents, **options)
        rows = torch.cat([self.judge.concerned, self.judge.unrelated])
        unseen, span = self.judge.unseen[rows], self.rule.subject.span
        report = rc.measure(change, self.edit, self.latents, unseen, moment=moment, span=span)
        with change:
            outcome = self.judge.outcome(self.judge.generator)
        return outcome.progress, {
            "progress": outcome.progress,
            "unrelated": outcome.unrelated,
            **outcome.ruled,
            **{name: getattr(report, name) for name in ("verdict", "reach", "paste", "outside", "size")},
            "measured unrelated": report.unrelated,
            "warnings": sorted({type(each.message).__name__ for each in told}),
        }

    def tuned(self, progress: float) -> Iterator[tuple[str, float | None]]:
        """Every fine-tuning, and its change of unrelated pictures where it goes as far; None where it never does."""
        goals, generator, rows = self.rule.goals(self.layer), self.judge.generator, self.rule.rows
        named = {part.index for part in self.edit.selections}
        ordinary = self.latents[[row for row in range(100) if row not in named][:ORDINARY]]
        for preserve, lr, stops in TUNINGS:
            options: dict[str, Any] = {"ordinary": ordinary, "preserve": preserve, "lr": lr, "stops": stops}
            for found in rc.fine_tune(generator, self.latents[rows], goals, **options):
                words = f"lr {lr:g}, {found.steps} steps" + (", preserve" if preserve else "")
                yield words, self._as_far(found.generator, progress)

    def _as_far(self, tuned: nn.Module, progress: float) -> float | None:
        generator, part = self.judge.generator, copy.deepcopy(tuned)

        def at(strength: float) -> tuple[float, float]:
            with torch.no_grad():
                for own, old, new in zip(part.parameters(), generator.parameters(), tuned.parameters(), strict=True):
                    own.copy_(old + strength * (new - old))
            outcome = self.judge.outcome(part)
            return outcome.progress, outcome.unrelated

        low, high = (0.0, (0.0, 0.0)), (1.0, at(1.0))
        if high[1][0] < progress:
            return None
        for _ in range(HALVINGS):
            middle = (low[0] + high[0]) / 2
            now = middle, at(middle)
            low, high = (low, now) if now[1][0] >= progress else (now, high)
        (less, before), (more, after) = low[1], high[1]
        share = (progress - less) / (more - less) if more > less else 1.0
        return before + share * (after - before)


def row_of(judged: Rule, judge: Judge, name: str, **options: Any) -> dict[str, Any]:
    """One edit, and the fine-tuning that changes the fewest unrelated pictures at its reach."""
    trial = Trial(judged, judge, name)
    progress, facts = trial.ours(**options)
    ways = dict(trial.tuned(progress))
    reached = {words: unrelated for words, unrelated in ways.items() if unrelated is not None}
    best = min(reached, key=lambda words: reached[words]) if reached else None
    return {
        "rule": judged.name,
        "layer": name,
        **facts,
        "fine-tuned": best and reached[best],
        "fine-tuning": best,
        "all": ways,
    }


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    other = "never so far" if row["fine-tuned"] is None else f"{row['fine-tuned']:.4f} ({row['fine-tuning']})"
    told = f", {', '.join(row['warnings'])}" if row["warnings"] else ""
    paste = "" if row["paste"] is None else f", paste {row['paste']:.2f}"
    measured = f"{row['verdict']}, size {row['size']:.2f}{paste}{told}"
    numbers = f"progress {row['progress']:.2f}, unrelated {row['unrelated']:.4f}"
    return f"{row['rule']} at {row['layer']}: {numbers}; fine-tuned {other}; {measured}"


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """In how many edits the default changes less, and what it does in all of them."""
    for words, some in (
        ("all edits", rows),
        (f"edits that go at least {LITTLE:g} of the way", [row for row in rows if row["progress"] >= LITTLE]),
    ):
        if some:
            less = sum(row["fine-tuned"] is None or row["unrelated"] < row["fine-tuned"] for row in some)
            never = sum(row["fine-tuned"] is None for row in some)
            yield (
                f"{words}: the default changes less that is unrelated in {less} of {len(some)} "
                f"({less / len(some):.0%}); "
                f"in {never} of these no fine-tuning goes so far"
            )
    ways = [way for way in rows[0]["all"] if all(way in row["all"] for row in rows)] if rows else []
    named = {"fine-tuning as it is by default": PLAIN, "that with ordinary pictures": KEPT}
    for words, some in (named | {f"{way} alone": (way,) for way in ways}).items():
        if not {*some} <= {*ways}:
            continue
        known = [(row["unrelated"], [row["all"][way] for way in some if row["all"][way] is not None]) for row in rows]
        less = sum(all(own < other for other in others) for own, others in known)
        never = sum(not others for _, others in known)
        yield f"against {words}: less in {less} of {len(rows)} ({less / len(rows):.0%}), {never} never so far"
    verdicts = [row["verdict"] for row in rows]
    yield "verdicts: " + ", ".join(f"{each} {verdicts.count(each)}" for each in sorted(set(verdicts)))
    little = [row for row in rows if row["paste"] is not None and row["paste"] < LITTLE]
    silent = [f"{row['rule']} at {row['layer']}" for row in little if not row["warnings"]]
    yield f"own paste less than {LITTLE:g} of the way: {len(little)}, without a warning: {', '.join(silent) or 'none'}"


def main(out: Path, names: Sequence[str] = (), objective: str | None = None) -> int:
    """Do the edits that `out` lacks, and print the lines of all. `objective`: instead of the default one; painted goals
    have theirs, and are left out."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / (f"equal-{objective}.jsonl" if objective else "equal.jsonl")
    options: dict[str, Any] = {"objective": objective} if objective else {}
    rows = lines_of(path)
    print(*map(line, rows), sep="\n", flush=True)
    for name in names or (NAMES if objective else NAMES + PAINTED):
        judged = rule(name)
        left = [
            layer
            for layer in judged.subject.layers[:2]
            if not any((row["rule"], row["layer"]) == (name, layer) for row in rows)
        ]
        try:
            judge = Judge(judged, SCENES) if left else None
            for layer in left:
                assert judge is not None
                rows.append(row_of(judged, judge, layer, **options))
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(line(rows[-1]), flush=True)
        except rc.RewriteCoreError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    print(*summary(rows), sep="\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("rules", nargs="*", choices=[[], *NAMES, *PAINTED], help="by default all of them")
    parser.add_argument("--objective", choices=("value", "activation", "pictures"), help="by default the default one")
    given = parser.parse_args()
    raise SystemExit(main(given.out, given.rules, given.objective))
