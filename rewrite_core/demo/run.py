"""The demo: three rule changes of the embedded generator, from second moment to measured result."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .. import pictures
from ..demo import chapels, load_edit
from ..edits.edit import Edit
from ..edits.goals import paste_goals
from ..edits.selection import Selection
from ..files import atomic_write, to_json, writable_path
from ..layers.binding import bind
from ..layers.bound import BoundLayer
from ..layers.latents import sample_latents
from ..pictures import paint, to_unit
from ..rewrites.calls import rewrite
from ..rewrites.change import Rewrite
from ..statistics.collection import collect_second_moment
from ..statistics.second_moment import SecondMoment
from ..version import __version__, cpu_name
from .rules import RULES, Rule, Score, score
from .world import LATENT_SIZE, ROOFS, scene_from_latents

EDIT_LATENTS, EDIT_SEED = 1000, 1  # what the edits' selections index, and the moment is collected on
UNSEEN_LATENTS, UNSEEN_SEED = 500, 2  # what the result is measured on
SHOWN = 64

# measured best of all layers and ranks: python -m rewrite_core.demo.layers
CHOSEN: dict[str, tuple[str, int]] = {
    "spire": ("synthesis.layer4.conv", 4),
    "watermark": ("synthesis.layer4.conv", 1),
    "reflection": ("synthesis.layer6.conv", 4),
}

# On maps of 8x8 and 16x16 a pasted box is a few cells wide and the zeros beyond its edge would be most of what is
# fitted, so the whole map is; l2 there has the exact closed form.
OPTIONS: dict[str, Any] = {"loss": "l2", "region": "map"}


def _state(rule: Rule, latents: Tensor) -> list[str]:
    """What each scene is, as far as the rule cares."""
    scene = scene_from_latents(latents)
    if rule.name == "spire":
        return [ROOFS[kind] for kind in scene.roof.tolist()]
    names = {"watermark": ("no watermark", "watermark"), "reflection": ("dark", "lit")}[rule.name]
    return [names[int(flag)] for flag in rule.concerns(scene)]


def _sheet(
    rule: Rule,
    layer: BoundLayer,
    edit: Edit,
    change: Rewrite,
    result: Score,
    latents: Tensor,
    unseen: Tensor,
    before: Tensor,
    after: Tensor,
    shown: int,
) -> Image:
    """The edit, and `shown` of the unseen pictures before and after it, those first that the rule concerns."""
    side = 96
    wide = 2 * side + 2
    assert edit.copy is not None  # it is one of ours
    (paste,) = edit.pastes
    (goal,) = paste_goals(layer, edit, latents, region="map")
    preview = to_unit(layer.render(latents[paste.index][None], goal.target))[0]

    def marked(selection: Selection, text: str) -> pictures.Cell:
        picture = paint(layer.generator, latents[selection.index][None])[0]
        return pictures.selected(picture, selection, wide), text

    top = [
        marked(edit.copy, f"copy (picture {edit.copy.index})"),
        marked(paste, f"paste (picture {paste.index})"),
        (pictures.to_image(preview, wide), "the pasted features"),
        *(marked(selection, f"context {i}") for i, selection in enumerate(edit.where, 1)),
    ]
    order = torch.argsort(rule.concerns(scene_from_latents(unseen)).int(), descending=True, stable=True)[:shown]
    states = _state(rule, unseen)
    labels = [f"{states[i]}: before | after" for i in order.tolist()]
    notes = [
        f"layer {layer.name}, rank {change.rank}, solver {change.solver}; "
        f"weights changed by Lambda D in {change.seconds['fit'] * 1e3:.0f} ms",
        f"on {result.scenes} unseen scenes that the rule concerns: efficacy {result.efficacy:.1%} "
        f"(before: {result.efficacy_before:.1%}), completed {result.completed:.0%}, "
        f"collateral {result.collateral:.4f}; "
        f"on {result.scenes_unrelated} others: change {result.collateral_unrelated:.4f}",
    ]
    rows = pictures.before_after(before[order], after[order], side, labels)
    count = str(len(unseen)) if len(order) == len(unseen) else f"{len(order)} of {len(unseen)}"
    return pictures.grid([top, *rows], f"{rule.title}: one edit, then {count} unseen pictures", notes)


def environment(device: torch.device) -> dict:
    """What the numbers were measured on."""
    return {
        "rewrite_core": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def run_demo(out: str | os.PathLike, device: str = "cpu", progress: bool = True, shown: int = SHOWN) -> dict:
    """Run the three edits; write ``<edit>.png``, with `shown` of 64 unseen pictures each, and ``report.json`` into
    `out`; return the report.

    Raises OSError before any work where one of those files could not be written.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder for the pictures and report.json.")
    out.mkdir(parents=True, exist_ok=True)
    sheets = {name: writable_path(out / f"{name}.png") for name in RULES}
    report_file = writable_path(out / "report.json")
    start = time.perf_counter()
    generator = chapels().to(device)
    latents = sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED)
    unseen = sample_latents(LATENT_SIZE, UNSEEN_LATENTS, seed=UNSEEN_SEED)
    before = paint(generator, unseen, progress=progress)
    moments: dict[str, tuple[BoundLayer, SecondMoment, float]] = {}
    edits: dict[str, dict] = {}
    for rule in RULES.values():
        name, rank = CHOSEN[rule.name]
        seconds: dict[str, float] = {}
        if name not in moments:
            layer, clock = bind(generator, name), time.perf_counter()
            moment = collect_second_moment(layer, latents, batch_size=50, progress=progress, latent_seed=EDIT_SEED)
            moments[name] = layer, moment, time.perf_counter() - clock
        layer, moment, seconds["collect"] = moments[name]
        edit = load_edit(rule.name)
        clock = time.perf_counter()
        change = rewrite(layer, moment, edit, latents, rank=rank, **OPTIONS)
        seconds |= {"rewrite": time.perf_counter() - clock, **change.seconds}
        clock = time.perf_counter()
        change.apply()
        seconds["apply"], clock = time.perf_counter() - clock, time.perf_counter()
        try:
            after = paint(generator, unseen, progress=progress)
        finally:
            change.revert()
        seconds["render"] = time.perf_counter() - clock
        result = score(rule, before, after, unseen)
        some = unseen[:SHOWN], before[:SHOWN], after[:SHOWN]
        sheet = _sheet(rule, layer, edit, change, result, latents, *some, shown)
        pictures.save_png(sheet, sheets[rule.name])
        edits[rule.name] = {
            "layer": name,
            "rank": rank,
            "solver": change.solver,
            "loss": [change.losses[0], change.final_loss],
            **dataclasses.asdict(result),
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        }
    report = {"edits": edits, "environment": environment(torch.device(device))}
    report["environment"]["seconds_total"] = round(time.perf_counter() - start, 2)
    with atomic_write(report_file) as partial:
        partial.write_text(to_json(report, "the report", indent=2) + "\n", encoding="utf-8")
    return report


def table(report: dict) -> str:
    """The report as a table for the terminal."""
    head = (
        "edit",
        "layer",
        "rank",
        "efficacy",
        "before",
        "completed",
        "collateral",
        "unrelated",
        "collect",
        "rewrite",
        "render",
    )
    rows = [head]
    for name, row in report["edits"].items():
        seconds = row["seconds"]
        rows.append(
            (
                name,
                row["layer"],
                str(row["rank"]),
                f"{row['efficacy']:.1%}",
                f"{row['efficacy_before']:.1%}",
                f"{row['completed']:.0%}",
                f"{row['collateral']:.4f}",
                f"{row['collateral_unrelated']:.4f}",
                *(f"{seconds[stage]:.2f} s" for stage in ("collect", "rewrite", "render")),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
