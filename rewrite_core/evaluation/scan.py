"""Which layer and rank hold a rule: what the layers can show, then fits that unseen pictures judge."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from ..edits.edit import Edit
from ..errors import (
    ArgumentError,
    RankError,
    RewriteCoreError,
    UnderdeterminedWarning,
    UnknownLayerError,
    quoted,
    silent,
    whole_number,
)
from ..layers.binding import bind
from ..layers.bound import BoundLayer
from ..layers.fingerprints import Forward
from ..layers.latents import check_latents
from ..rewrites.change import Rewrite
from ..session import Session
from ..turns import generator_lock
from .measuring import Given, Scene, map_layers, measured, scene_of
from .places import moments_of
from .report import Report
from .sheet import scan_sheet
from .showing import Visibility, visibility
from .steps import Cancelled, Steps

RANKS = (1, 4, 10)
FIT: dict[str, Any] = {"objective": "value", "loss": "l2", "region": "map"}
_SHOWS = 0.25  # of what the best layer shows of the paste: a layer that shows less is left out
_ELSEWHERE = 0.75  # of what a layer's pasted value changes: a layer where more of it lies outside is left out
_LAYERS = 12  # that are fitted at most, evenly spread
_STATISTICS = 512  # latents that second moments are collected from, at most
_SCORED = 24  # unseen pictures with the context, and half as many without, that each fit is judged on


@dataclasses.dataclass(frozen=True)
class ScanRow:
    """One layer and rank.

    score: how far unseen places moved along what was wanted, mean of 0..1, less the mean change elsewhere as a share of
    the movement that was wanted. change: the rewrite. report: what :func:`rewrite_core.measure` says of it. shown: of
    the paste, by the layer.
    """

    layer: str
    rank: int
    score: float
    shown: float
    change: Rewrite
    report: Report


@dataclasses.dataclass(frozen=True)
class LayerScan:
    """What :func:`rewrite_core.scan_layers` found.

    Attributes:
        rows: a :class:`ScanRow` for each layer and rank that was fitted, best first.
        visibility: what each layer can show of the paste, in the order they run.
        left_out: {layer, or "layer, rank R": why it was not fitted}.
        complete: False where the scan was cancelled.
        looked_at: the layer that told where the context is.
    """

    rows: list[ScanRow]
    visibility: list[Visibility]
    left_out: dict[str, str]
    complete: bool
    looked_at: str

    @property
    def best(self) -> ScanRow:
        """The first row. Raises RewriteCoreError where there is none."""
        if not self.rows:
            raise RewriteCoreError("The scan was ended before anything was fitted, or no layer could be.")
        return self.rows[0]

    def table(self) -> list[tuple[str, ...]]:
        """The rows in words, the head first."""
        head = ("layer", "rank", "score", "verdict", "reach", "agreement", "outside", "unrelated", "size", "shown")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            told = row.report
            numbers = (told.reach, told.agreement, told.outside, told.unrelated, told.size)
            words = ["-" if n is None else f"{n:.4f}" if i in (2, 3) else f"{n:.2f}" for i, n in enumerate(numbers)]
            lines.append((row.layer, str(row.rank), f"{row.score:.3f}", told.verdict, *words, f"{row.shown:.2f}"))
        return lines

    def __str__(self) -> str:
        lines = self.table()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        text += [f"left out: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join([*text, *([] if self.complete else ["cancelled: what was done until then"])])

    def _repr_html_(self) -> str:
        """For notebooks."""
        head, *lines = self.table()
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
        out = "".join(f"<br><small>left out: {html.escape(f'{k} ({v})')}</small>" for k, v in self.left_out.items())
        return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{rows}</table>{out}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        rows = [
            {"layer": row.layer, "rank": row.rank, "score": row.score, "shown": row.shown, **row.report.to_dict()}
            for row in self.rows
        ]
        for row, full in zip(rows, self.rows, strict=True):
            row["layer"] = full.layer  # the report's own is the one that was looked at
        return {
            "looked_at": self.looked_at,
            "complete": self.complete,
            "rows": rows,
            "visibility": [dataclasses.asdict(each) for each in self.visibility],
            "left_out": self.left_out,
        }

    def sheet(self, side: int = 96, rows: int = 8) -> Image:
        """What the best rows made of some unseen pictures: an RGB picture. `side`: pixels of one picture's longer
        side."""
        shown = [
            (f"{row.layer}, rank {row.rank}: {row.report.verdict}, score {row.score:.2f}", row.report.pairs)
            for row in self.rows[:rows]
        ]
        if not shown:
            raise RewriteCoreError("The scan has no row to show.")
        return scan_sheet(shown, side)


def scan_layers(
    generator: nn.Module,
    edit: Edit,
    z: Tensor,
    *,
    unseen: Tensor | None = None,
    layers: Sequence[str] | None = None,
    ranks: Sequence[int] = RANKS,
    forward: Forward | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    progress: bool = False,
    told: Callable[[str, int, int], object] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **options: Any,
) -> LayerScan:
    """Find the layer and the rank that hold a rule, on a generator of your own.

    First what each layer can show: the pasted value is rendered, and layers that show little of the paste, or change
    more outside of it, are left out. Then the second moments of the rest, in one pass; fits over all ranks; and for
    each what :func:`rewrite_core.measure` says, with the same unseen pictures and places for all.

    It may run in a thread beside others that use sessions of the same generator: they have their turns in between. The
    generator is left as it was, however it ends.

    Args:
        generator: images = generator(latents), or what `forward` makes of them, as for :func:`rewrite_core.bind`.
        edit: with a copy and a paste; its selections index the rows of `z`.
        z: [M, ...], the latents of the edit; second moments are collected from the first 512.
        unseen: [N, ...] latents to judge on; by default the first 256 rows of `z` that no selection names.
        layers: names of the layers to try; by default all whose keys and values are maps of two axes.
        ranks: to try; those that a context has too few keys for are left out.
        span: what the images lie in.
        progress: show bars.
        told: called as ``told(stage, done, total)`` from the thread that scans, before each step. What it raises ends
            the scan.
        cancelled: asked between two steps; once it says True the scan ends with the rows it has, and its ``complete``
            is False.
        options: of :func:`rewrite_core.rewrite`. By default objective="value", loss="l2" and region="map": values on
            the whole map, which takes milliseconds.

    Raises:
        SelectionError: the edit has no copy or no paste. UnknownLayerError: there is no such layer.
        MaskError: its masks vanish on every layer's map. RewriteCoreError: as their names say.
    """
    steps = Steps(progress, told, cancelled)
    return scanned(generator, edit, z, steps, unseen, layers, ranks, forward=forward, span=span, **options)


def scanned(
    generator: nn.Module,
    edit: Edit,
    z: Tensor,
    steps: Steps,
    unseen: Tensor | None = None,
    layers: Sequence[str] | None = None,
    ranks: Sequence[int] = RANKS,
    *,
    forward: Forward | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    **options: Any,
) -> LayerScan:
    """:func:`scan_layers` in these steps, with its arguments. Where processes share them, the first has the whole
    result, and the others what they fitted themselves."""
    check_latents(z)
    if not isinstance(edit, Edit):
        raise ArgumentError(f"An edit is an rc.Edit (rc.Edit.load reads a file), not {quoted(edit)}.")
    ranks = [whole_number("A rank", rank) for rank in ranks]
    steps = dataclasses.replace(steps, turn=lambda: generator_lock(generator))
    edit, latents = edit.on(z), z if unseen is None else torch.cat([z, unseen.to(z)])
    scan = _Scan(generator, edit, latents, len(z), forward, span, steps, FIT | options)
    try:
        scan.look(layers)
        scan.fit(ranks)
        complete = True
    except Cancelled:
        complete = False
    return scan.result(complete)


class _Scan:
    """One scan: what is known so far."""

    def __init__(
        self,
        generator: nn.Module,
        edit: Edit,
        latents: Tensor,
        own: int,
        forward: Forward | None,
        span: tuple[float, float],
        steps: Steps,
        options: dict[str, Any],
    ):
        self._generator, self._edit, self._forward, self._span = generator, edit, forward, span
        self._latents, self._own, self._steps, self._options = latents, own, steps, options
        self._visible: list[Visibility] = []
        self._left_out: dict[str, str] = {}
        self._layers: list[BoundLayer] = []
        self._scene: Scene | None = None
        self._rows: list[ScanRow] = []
        self._before: dict[tuple[int, ...], Tensor] = {}

    def look(self, names: Sequence[str] | None) -> None:
        """What the layers show of the paste, which of them are promising, and where the context is."""
        steps, stage = self._steps, "what layers show"
        with steps.turn():
            every = self._all_layers(names)
        for layer in steps.over(steps.own(every), stage):
            with steps.turn():
                try:
                    self._visible += visibility([layer], self._edit, self._latents, self._span)
                except RewriteCoreError as error:
                    if len(every) == 1:
                        raise
                    self._left_out[layer.name] = str(error).rstrip(".")
        self._visible = steps.all(self._visible, stage)
        self._left_out = dict(steps.all([*self._left_out.items()], stage))
        self._layers = self._promising({layer.name: layer for layer in every})
        unseen = None if self._own == len(self._latents) else self._latents[self._own :]
        z = self._latents[: self._own]
        found = scene_of(every[0], Given([], self._edit, z, unseen, span=self._span, steps=steps))
        rows = found.rows if unseen is None else [self._own + row for row in found.rows]
        self._scene = dataclasses.replace(found, latents=self._latents, unseen=self._latents, rows=rows, most=_SCORED)

    def _all_layers(self, names: Sequence[str] | None) -> list[BoundLayer]:
        infos = map_layers(self._generator, self._latents, self._forward)
        known = [info.name for info in infos]
        for name in names or ():
            if name not in known:
                raise UnknownLayerError(f"There is no layer {name!r} with maps of two axes; choose from {known}.")
        return [bind(self._generator, name, forward=self._forward) for name in known if not names or name in names]

    def _promising(self, layers: dict[str, BoundLayer]) -> list[BoundLayer]:
        best = max((each.shown for each in self._visible), default=0.0)
        kept = []
        for each in self._visible:
            if not each.shown >= _SHOWS * best:
                self._left_out[each.layer] = f"shows {max(0.0, each.shown):.0%} of the paste"
            elif each.elsewhere > _ELSEWHERE:
                self._left_out[each.layer] = f"{each.elsewhere:.0%} of what its paste changes lies outside"
            else:
                kept.append(layers[each.layer])
        step = max(1.0, len(kept) / _LAYERS)
        chosen = [kept[int(i * step)] for i in range(min(_LAYERS, len(kept)))]
        for layer in kept:
            if layer not in chosen:
                self._left_out[layer.name] = "like its neighbours; name it in `layers` to try it"
        return chosen

    def fit(self, ranks: Sequence[int]) -> None:
        """The fits, each judged."""
        steps, stage, shown = self._steps, "fit and judge", {each.layer: each.shown for each in self._visible}
        if not self._layers:
            return
        moments = moments_of(self._layers, self._latents[: min(self._own, _STATISTICS)], 16, steps)
        pairs = [(layer, moment, rank) for layer, moment in zip(self._layers, moments, strict=True) for rank in ranks]
        session: Session | None = None
        before = dict(self._left_out)
        quiet = Steps(turn=steps.turn, cancelled=steps.cancelled)
        for layer, moment, rank in steps.over(steps.own(pairs), stage):
            if session is None or session.layer is not layer:
                session = Session(layer, moment, self._latents)
            row = self._row(session, rank, shown[layer.name], quiet)
            if row is not None:
                self._rows.append(row)
        new = [item for item in self._left_out.items() if item[0] not in before]
        self._left_out = before | dict(steps.all(new, stage))
        if steps.shard is not None:
            self._share_rows(stage)

    def _share_rows(self, stage: str) -> None:
        """The rows of all processes, in the first."""
        reports = [
            dataclasses.replace(row.report, pairs=[pair.alone() for pair in row.report.pairs]) for row in self._rows
        ]
        own = [dataclasses.replace(row, report=report) for row, report in zip(self._rows, reports, strict=True)]
        self._rows = self._steps.all(own, stage, first_only=True)
        for row in self._rows:  # those of other processes know no generator
            row.change._made_on = next(layer for layer in self._layers if layer.name == row.layer)

    def _row(self, session: Session, rank: int, shown: float, steps: Steps) -> ScanRow | None:
        scene = self._scene
        assert scene is not None  # look() came before
        try:
            with silent(UnderdeterminedWarning):
                change = session.rewrite(self._edit, rank=rank, **self._options)
        except RankError as error:
            self._left_out[f"{session.layer.name}, rank {rank}"] = str(error).rstrip(".")
            return None

        def look(latents: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
            key = tuple(rows)
            if key not in self._before:  # the same for all layers
                self._before[key] = session.images(rows)
            return self._before[key], session.images(rows, [change])

        given = Given([change], self._edit, self._latents, moment=session.moment, span=self._span, steps=steps)
        report = measured(session.layer, given, look=look, scene=scene)
        return ScanRow(session.layer.name, rank, _score(report), shown, change, report)

    def result(self, complete: bool) -> LayerScan:
        rows = sorted(self._rows, key=lambda row: -row.score)
        looked_at = "" if self._scene is None else self._scene.places.layer.name
        return LayerScan(rows, self._visible, self._left_out, complete, looked_at)


def _score(report: Report) -> float:
    """See :class:`ScanRow`; of a change that destroys pictures -1 and less."""
    moved = [min(max(far, 0.0), 1.0) for far in report.moved]
    elsewhere = [change for change in (report.outside, report.unrelated) if change is not None]
    spill = sum(elsewhere) / len(elsewhere) / max(report.wanted, 1e-12) if elsewhere else 0.0
    score = (sum(moved) / len(moved) if moved else 0.0) - spill
    return score - 1 if report.verdict == "destroys" else score
