"""What the studio works on: one generator, the layers in use, the edit in hand and the stack of rules.

No web in here: the server only turns requests into these calls. What a person does is written to a session file as they
go, so that a crash or a reload loses at most the last stroke.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import pictures
from ..edits.edit import Edit
from ..edits.selection import Selection
from ..errors import FileFormatError, MismatchError, RewriteCoreError, SelectionError, heard, silent, warn
from ..evaluation.measuring import Given
from ..evaluation.scan import scan_layers
from ..evaluation.steps import Cancelled as Ended
from ..evaluation.steps import Steps
from ..files import atomic_write, from_json, to_json
from ..layers.binding import bind
from ..layers.bound import BoundLayer
from ..layers.listing import LayerInfo, list_layers
from ..rewrites.change import Rewrite
from ..session import Session
from ..statistics.collection import collect_second_moment
from ..statistics.second_moment import SecondMoment
from ..turns import Latest, generator_lock
from . import films
from .pixels import Tiles, png, sheet, tiles

MOMENT_PICTURES = 1000  # that a second moment is collected from, where there are as many
SESSION_FILE = "studio.json"
KINDS = ("rewrite", "erase", "zero")
_THUMBNAIL = 64  # pixels
_PIXELS_AT_ONCE = 1 << 16  # of pictures that are painted together: large ones come one by one, and take less memory
_MEASURED_AT_ONCE = 4  # pictures: a hand that draws meanwhile waits for no more than these
_MEASURED = ("verdict", "reach", "agreement", "paste", "inside", "outside", "unrelated", "size", "layer")
made_by: ContextVar[str] = ContextVar("made_by", default="")  # the page whose request is worked on
_PLACES = {
    "with rc.scan_layers": "with “Try all layers”",
    "mark more of it, with rc.search": "mark more of it, with “Find matches”",
    "give more unseen latents, or mark": "mark",
    "Keep it; the sheet shows the pictures that followed least.": "Keep it as a rule.",
}


@dataclasses.dataclass
class Settings:
    """How an edit is solved: the arguments of :func:`rewrite_core.rewrite`."""

    rank: int = 4
    loss: str = "l2"
    region: str = "map"
    preserve: float = 0.0
    strength: float = 1.0
    units: int = 30
    objective: str = "value"

    def change(self, values: object) -> None:
        """Take over what a page sends. Raises RewriteCoreError for what no setting can be."""
        if not isinstance(values, dict) or not values.keys() <= self.__dict__.keys():
            raise RewriteCoreError(f"Settings are an object with some of {list(self.__dict__)}.")
        for name, value in values.items():
            kind = type(getattr(self, name))
            good = isinstance(value, int | float) and not isinstance(value, bool) if kind is not str else True
            if not good or not isinstance(value, int | float | str) or (kind is str) != isinstance(value, str):
                raise RewriteCoreError(f"{name} is of another type than {value!r}.")
            if not isinstance(value, str) and not math.isfinite(value):
                raise RewriteCoreError(f"{name} is a finite number, not {value!r}.")
            setattr(self, name, kind(value))


@dataclasses.dataclass
class Rule:
    """A change on the stack, with its switch and strength."""

    number: int
    name: str
    change: Rewrite
    on: bool = True
    strength: float = 1.0

    def describe(self) -> dict[str, Any]:
        change = self.change
        return {
            "number": self.number,
            "name": self.name,
            "on": self.on,
            "strength": self.strength,
            "layer": change.layer,
            "rank": change.rank,
            "size": change.size,
        }


def moment_file(folder: Path, layer: str) -> Path:
    """Where a layer's second moment is kept."""
    return folder / f"moment-{re.sub(r'[^A-Za-z0-9]+', '-', layer)}.safetensors"


def stored_moment(folder: Path, layer: BoundLayer, latents: Tensor) -> SecondMoment | None:
    """A layer's second moment that the folder keeps; None where there is none that fits."""
    path = moment_file(folder, layer.name)
    if path.exists():
        with contextlib.suppress(FileFormatError, MismatchError):
            moment = SecondMoment.load(path)
            moment.check(layer, latents)
            return moment
    return None


def in_the_page(advice: str) -> str:
    """Advice in the words of the page, where it names functions of the library."""
    for function, place in _PLACES.items():
        advice = advice.replace(function, place)
    return advice


class Cancelled(RewriteCoreError):
    """A person stopped what was running."""


class Workshop:
    """The studio's state. Every method may be called from any thread.

    Args:
        session: the layer, moment and latents to begin with.
        folder: where the session file, moments and rules lie; nothing is read or written outside it.
        span: what range the generator's images lie in.
        name: what the page calls the generator.
    """

    def __init__(
        self, session: Session, folder: Path, span: tuple[float, float] = (-1.0, 1.0), name: str = "generator"
    ):
        self.folder, self.span, self.name = folder.resolve(), span, name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.generator: nn.Module = session.layer.generator
        self.latents: Tensor = session.latents
        self.sessions = {session.layer.name: session}
        self.layer = session.layer.name
        self.settings = Settings()
        self.edit: Edit | None = None  # in hand
        self._edit_record: dict[str, Any] = {}  # the same as JSON, its masks as the page drew them
        self._selections: list[tuple[Any, Selection]] = []  # what the JSON holds, and what it was read as
        self.rules: list[Rule] = []
        self.live: Rewrite | None = None
        self.live_report: dict[str, Any] = {}
        self.live_edit: Edit | None = None
        self.version = 0  # of all that pictures depend on
        self._last = 0  # the highest number that a rule had
        self._state = threading.RLock()
        self._latest, self._measuring = Latest(), Latest()
        self._painter = ThreadPoolExecutor(1, "rewrite_core painter")
        self._disk = ThreadPoolExecutor(1, "rewrite_core disk")
        self._writing = threading.Lock()
        self._states = self._written = 0  # states that were to be saved, and the last that was
        self._solving = 0  # edits that are being solved, or wait for it
        self._drags = 0  # times that pictures of another strength were asked for
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._cancel = threading.Event()
        self._layers: list[LayerInfo] | None = None
        self._resuming = True
        self._resume()
        self._resuming = False

    @property
    def session(self) -> Session:
        return self.sessions[self.layer]

    # --- telling pages

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call `listener` with every event; returns what ends that."""
        with self._state:
            self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def tell(self, **event: Any) -> None:
        for listener in list(self._listeners):
            listener(event)

    def _changed(self, keep: bool = True) -> None:
        """Pages are told that pictures have changed. `keep`: the session file, too."""
        self.version += 1
        if keep:
            self._save()
        self.tell(kind="state", version=self.version, by=made_by.get())

    def describe(self) -> dict[str, Any]:
        """All that a page shows, but for pictures."""
        with self._state:
            height, width = self.picture_size
            return {
                "name": self.name,
                "layer": self.layer,
                "pictures": len(self.latents),
                "height": height,
                "width": width,
                "map": list(self.map_size),
                "settings": dataclasses.asdict(self.settings),
                "edit": self._edit_record,
                "rules": [rule.describe() for rule in self.rules],
                "conflicts": self.conflicts(),
                "live": self.live_report if self.live is not None else None,
                "version": self.version,
                "films": films.kinds(),
                "memory": self.session.nbytes,
            }

    # --- pictures

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        if not hasattr(self, "_picture_size"):
            height, width = self.session.images([0]).shape[-2:]
            self._picture_size = int(height), int(width)
        return self._picture_size

    @property
    def map_size(self) -> tuple[int, ...]:
        """The size of the layer's value map."""
        sizes = self.__dict__.setdefault("_map_sizes", {})
        if self.layer not in sizes:
            sizes[self.layer] = tuple(self.session.layer.values(self.latents[:1]).shape[2:])
        return sizes[self.layer]

    def _rewrites(self, original: bool, strength: float | None) -> tuple[list[Rewrite], list[float]]:
        if original:
            return [], []
        with self._state:
            on = [(rule.change, rule.strength) for rule in self.rules if rule.on]
            if self.live is not None:
                on.append((self.live, self.settings.strength if strength is None else strength))
        return [change for change, _ in on], [factor for _, factor in on]

    def paint(self, rows: Sequence[int], original: bool = False, strength: float | None = None) -> Tensor:
        """Pictures [N, 3, H, W] in 0..1, with the stack and the live change on."""
        return self._paint(rows, *self._rewrites(original, strength))

    def _paint(self, rows: Sequence[int], changes: Sequence[Rewrite], strengths: Sequence[float]) -> Tensor:
        parts = [self.session.images(part, changes, strengths) for part in self._batches(list(rows))]
        images = parts[0] if len(parts) == 1 else torch.cat(parts)
        return pictures.to_unit(images, self.span).clamp(0, 1).nan_to_num(0)

    def _batches(self, rows: list[int]) -> list[list[int]]:
        """Rows in parts that are painted together."""
        size = max(1, _PIXELS_AT_ONCE // math.prod(self.picture_size))
        return [rows[start : start + size] for start in range(0, len(rows), size)] or [rows]

    def sheet(self, rows: Sequence[int], side: int, original: bool = False, strength: float | None = None) -> bytes:
        """A PNG of pictures side by side, each `side` pixels at its longer side."""
        return sheet(self.paint(rows, original, strength), side)

    def paint_soon(
        self, parts: Sequence[list[int]], side: int, original: bool = False, strength: float | None = None
    ) -> list[tuple[list[int], Future[Tiles]]]:
        """Pictures as they are now, part by part: the rows of each, and what will be painted of them; parts of large
        pictures are divided. One thread works through all that was asked for; whoever no longer wants a part cancels
        it."""
        missing = [row for part in parts for row in part if not 0 <= row < len(self.latents)]
        if missing:
            raise SelectionError(f"There is no picture {missing[0]}; the last one is {len(self.latents) - 1}.")
        changes, strengths = self._rewrites(original, strength)
        self._drags += strength is not None

        def work(rows: list[int]) -> Tiles:
            return tiles(self._paint(rows, changes, strengths), side)

        small = [rows for part in parts for rows in self._batches(part)]
        return [(rows, self._painter.submit(work, rows)) for rows in small]

    def differences(self, rows: Sequence[int]) -> list[float]:
        """How much each picture differs from the original: mean absolute difference, 0..1."""
        before, after = self.paint(rows, original=True), self.paint(rows)
        return (after - before).abs().mean((1, 2, 3)).tolist()

    # --- the edit

    def take_edit(self, text: str) -> None:
        """Replace the edit in hand by the reference implementation's JSON; nothing is solved."""
        self.take_edit_soon(text).result()

    def take_edit_soon(self, text: str) -> Future[None]:
        """:meth:`take_edit`; the session file is written meanwhile. Returns what is done when it is."""
        edit: Edit | None = None
        record: dict[str, Any] = {}
        read: list[tuple[Any, Selection]] = []

        def selection(value: Any, field: str) -> Selection:
            """That of the edit in hand where it is the same: to read a mask takes a while, and a stroke changes one."""
            known = next((part for old, part in self._selections if old == value), None)
            read.append((value, known or Selection._from_json(value, field)))
            return read[-1][1]

        if text.strip() not in ("", "{}"):
            record = from_json(text, "The edit")
            edit = Edit._from_record(record, selection)
            for part in edit.selections:
                if part.index >= len(self.latents):
                    raise SelectionError(f"Picture {part.index} is not among the {len(self.latents)} of this studio.")
            edit = edit.on(self.latents)  # refused where it was made on other latents
            record = edit._to_record(lambda part: []) | record  # what it knows of its latents
        with self._state:
            self.edit, self._edit_record, self._selections = edit, record, read
        return self._disk.submit(self._save)

    @property
    def edit_json(self) -> str:
        """The edit in hand in the reference implementation's JSON."""
        edit = self.edit
        return "{}" if edit is None else edit.to_json()

    def _edit_in_hand(self) -> Edit:
        """Raises FileFormatError where there is none."""
        return Edit.from_json("{}") if self.edit is None else self.edit

    def take_settings(self, values: object) -> None:
        with self._state:
            self.settings.change(values)
            self._save()

    def fit(self, kind: str = "rewrite") -> dict[str, Any]:
        """Solve the edit in hand; it is live until it is kept or dropped. A newer call replaces one that waits."""
        if kind not in KINDS:
            raise RewriteCoreError(f"An edit is one of {', '.join(KINDS)}, not {kind!r}.")
        context = copy_context()  # the thread that solves knows for whom
        with self._state:
            self._solving += 1  # what is measured meanwhile gives way
        try:
            return self._latest.submit(lambda: context.run(self._fit, kind)).result()
        finally:
            with self._state:
                self._solving -= 1

    def _fit(self, kind: str) -> dict[str, Any]:
        with self._state:
            edit, settings, session = self._edit_in_hand(), dataclasses.replace(self.settings), self.session
        common = {"rank": settings.rank}
        solving = common | {"loss": settings.loss, "region": settings.region, "preserve": settings.preserve}
        with heard() as said:
            if kind == "rewrite":
                change = session.rewrite(edit, objective=settings.objective, **solving)
            elif kind == "erase":
                change = session.erase(edit, units=settings.units, **solving)
            else:
                change = session.zero(edit, **common)
        report = {
            "kind": kind,
            "layer": change.layer,
            "rank": change.rank,
            "size": change.size,
            "loss": [change.losses[0], change.final_loss] if change.losses else None,
            "seconds": change.seconds,
            "warnings": said,
            "measured": None,
        }
        with self._state:
            self.live, self.live_report, self.live_edit = change, report, edit
            self._changed(keep=False)  # the session file holds the edit, and not what comes of it
        return report

    def measure(self) -> dict[str, Any]:
        """What the live change does to unseen pictures: see :func:`rewrite_core.measure`. Others have
        turns at the generator meanwhile. It gives way, cancelled, where the change is gone, to a newer call or
        edit, and while the strength is dragged."""
        return self._measuring.submit(self._measure).result()

    def _measure(self) -> dict[str, Any]:
        with self._state:
            change, edit, session, strength = self.live, self.live_edit, self.session, self.settings.strength
        if change is None or edit is None:
            raise RewriteCoreError("There is no change to measure; make one first.")
        drags = self._drags

        def late() -> bool:
            return self.live is not change or self._solving > 0 or self._drags != drags

        steps = Steps(cancelled=late, turn=session._turn)
        given = Given(
            [change], edit, self.latents, None, None, session.moment, strength, self.span, _MEASURED_AT_ONCE, steps
        )
        try:
            with heard():
                report = session._measure(given)
        except Ended:
            raise CancelledError from None
        measured = {name: value for name, value in report.to_dict().items() if name in _MEASURED}
        measured |= {"advice": in_the_page(report.advice), "seen": len(report.matching), "strength": strength}
        with self._state:
            if self.live is change:
                self.live_report["measured"] = measured
        return measured

    def drop_live(self) -> None:
        with self._state:
            self.live, self.live_report = None, {}
            self._changed()

    def find(self, selection: list, top: int = 12) -> dict[str, Any]:
        """The pictures where a selection's key fires, best first, with heat maps in 0..1."""
        found = self.session.search(Selection._from_json(selection, "query"), top=max(1, min(int(top), 200)))
        high = max(float(found.heatmaps.max()), 1e-12)
        return {
            "rows": found.indices.tolist(),
            "scores": found.scores.tolist(),
            "level": found.level / high,
            "heat": (found.heatmaps / high).clamp(0, 1).nan_to_num(0).tolist(),
        }

    # --- rules

    def keep(self, name: str) -> Rule:
        """Put the live change on the stack."""
        with self._state:
            if self.live is None:
                raise RewriteCoreError("There is no change to keep; make one first.")
            rule = self._add(self.live, name)
            rule.strength, self.live, self.live_report = self.settings.strength, None, {}
            self._changed()
            return rule

    def _add(self, change: Rewrite, name: str) -> Rule:
        number = self._last = max(self._last, *(rule.number for rule in self.rules), 0) + 1  # never one that was used
        rule = Rule(number, name.strip()[:80] or f"rule {number}", change)
        change.save(self.folder / f"rule-{number}.safetensors")
        self.rules.append(rule)
        return rule

    def drop_in(self, name: str, data: bytes) -> Rule:
        """A saved rule of somebody's goes on the stack."""
        with atomic_write(self.folder / "incoming.safetensors") as partial:
            partial.write_bytes(data)
        try:
            change = Rewrite.load(self.folder / "incoming.safetensors")
            change._bind(self.generator)
        finally:
            (self.folder / "incoming.safetensors").unlink(missing_ok=True)
        with self._state:
            rule = self._add(change, name)
            self._changed()
            return rule

    def rule(self, number: int) -> Rule:
        for rule in self.rules:
            if rule.number == number:
                return rule
        raise RewriteCoreError(f"There is no rule {number} on the stack.")

    def change_rule(self, number: int, values: object) -> None:
        """Give a rule a name, a switch or a strength; what is not named stays as it is."""
        if not isinstance(values, dict) or not values.keys() <= {"name", "on", "strength"}:
            raise RewriteCoreError("A rule is changed by an object with some of name, on and strength.")
        strength = values.get("strength", 0.0)
        if not isinstance(strength, int | float) or isinstance(strength, bool) or not -10 <= strength <= 10:
            raise RewriteCoreError(f"A strength is a number from -10 to 10, not {strength!r}.")
        with self._state:
            rule = self.rule(number)
            rule.name = str(values.get("name", rule.name)).strip()[:80] or rule.name
            rule.on = bool(values.get("on", rule.on))
            rule.strength = float(values.get("strength", rule.strength))
            self._changed()

    def order_rules(self, numbers: object) -> None:
        """Put rules in the order of their numbers. One that is not named (it came meanwhile) goes to the end; the
        number of one that was taken off meanwhile is passed over."""
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise RewriteCoreError("The order of the rules is a list of their numbers.")
        with self._state:
            self.rules.sort(key=lambda rule: numbers.index(rule.number) if rule.number in numbers else len(numbers))
            self._changed()

    def take_off(self, number: int) -> None:
        """Take a rule off the stack; its file goes too."""
        with self._state:
            self.rules.remove(self.rule(number))
            self._changed()
            (self.folder / f"rule-{number}.safetensors").unlink(missing_ok=True)

    def conflicts(self) -> list[list[int]]:
        """Pairs of rules that are on, of one layer, whose directions overlap: each changes what the other set."""
        found, on = [], [rule for rule in self.rules if rule.on]
        for i, one in enumerate(on):
            for other in on[i + 1 :]:
                if one.change.layer != other.change.layer:
                    continue
                a, b = one.change.directions.double(), other.change.directions.double()
                if a.shape[1] == b.shape[1] and float(torch.linalg.matrix_norm(a @ b.T, 2)) > 0.5:
                    found.append([one.number, other.number])
        return found

    # --- layers

    def layers(self) -> list[dict[str, Any]]:
        """The generator's layers, in the order it runs them."""
        if self._layers is None:
            with generator_lock(self.generator), silent(UserWarning):
                self._layers = list_layers(self.generator, self.latents[:2], self.session.layer.own_forward)
        return [
            {
                "name": info.name,
                "channels": info.in_channels,
                "map": list(info.value_size),
                "ready": self._ready(info.name),
            }
            for info in self._layers
            if len(info.value_size) == 2
        ]

    def _ready(self, layer: str) -> bool:
        return layer in self.sessions or moment_file(self.folder, layer).exists()

    def choose_layer(self, name: str) -> None:
        """Work at another layer; its second moment is read from the folder or collected, with progress told."""
        if name not in [layer["name"] for layer in self.layers()]:
            raise RewriteCoreError(f"There is no layer {name!r} to work at.")
        if name not in self.sessions:
            layer = bind(self.generator, name, forward=self.session.layer.own_forward)
            self.sessions[name] = Session(layer, self._moment(layer), self.latents, memory=self.session._kept.memory)
        with self._state:
            self.layer, self.live, self.live_report = name, None, {}
            self._changed()

    def scan(self) -> list[dict[str, Any]]:
        """Try the edit in hand at all layers, with progress told: the best rank of each, best first, as
        :func:`rewrite_core.scan_layers` finds them; of a scan that was stopped what it has. Others have turns
        meanwhile."""
        edit = self._edit_in_hand()
        self._cancel.clear()

        def told(stage: str, done: int, total: int) -> None:
            self.tell(kind="progress", what=stage, done=done, total=total)

        found = scan_layers(
            self.generator,
            edit,
            self.latents,
            forward=self.session.layer.own_forward,
            span=self.span,
            told=told,
            cancelled=self._cancel.is_set,
            objective="value",
        )
        self.tell(kind="progress", what="scan", done=1, total=1)
        best: dict[str, dict[str, Any]] = {}
        for row in found.rows:
            report, own = row.report, next((pair for pair in row.report.pairs if pair.of == "edit"), None)
            told_of = {"layer": row.layer, "rank": row.rank, "score": row.score, "verdict": report.verdict}
            told_of |= {"reach": report.reach, "elsewhere": max(report.outside or 0.0, report.unrelated or 0.0)}
            if own is not None:
                picture = base64.b64encode(png(pictures.to_image(own.after.clamp(0, 1), _THUMBNAIL))).decode()
                told_of["picture"] = f"data:image/png;base64,{picture}"
            best.setdefault(row.layer, told_of)
        return list(best.values())

    def _moment(self, layer: BoundLayer) -> SecondMoment:
        stored = stored_moment(self.folder, layer, self.latents)
        if stored is not None:
            return stored
        self._cancel.clear()
        total = min(len(self.latents), MOMENT_PICTURES)
        moment, done = SecondMoment(layer.in_channels), 0
        for batch in self.latents[:total].split(50):
            if self._cancel.is_set():
                self.tell(kind="progress", what=f"statistics of {layer.name}", done=total, total=total)
                raise Cancelled(f"Collecting the statistics of {layer.name} was stopped.")
            with generator_lock(self.generator):
                part = collect_second_moment(layer, batch, progress=False)
            moment = part if done == 0 else moment.merge(part)
            done += len(batch)
            self.tell(kind="progress", what=f"statistics of {layer.name}", done=done, total=total)
        moment.save(moment_file(self.folder, layer.name))
        return moment

    def cancel(self) -> None:
        self._cancel.set()

    # --- files

    def _save(self) -> None:
        """The session file holds what there is now."""
        if self._resuming:
            return
        with self._state:
            self._states += 1
            number = self._states
            record = {
                "version": 1,
                "layer": self.layer,
                "settings": dataclasses.asdict(self.settings),
                "edit": self._edit_record,
                "rules": [
                    {"number": rule.number, "name": rule.name, "on": rule.on, "strength": rule.strength}
                    for rule in self.rules
                ],
            }
        with self._writing:
            if number < self._written:
                return  # a newer one is there already
            with atomic_write(self.folder / SESSION_FILE) as partial:
                partial.write_text(to_json(record), encoding="utf-8")
            self._written = number

    def _resume(self) -> None:
        """Take up what the folder holds; what cannot be read is left out, and said."""
        path = self.folder / SESSION_FILE
        if not path.exists():
            return
        try:
            record = from_json(path.read_bytes(), path.name)
            self.settings.change(record["settings"])
            self.take_edit(to_json(record["edit"]))
            for item in record["rules"]:
                change = Rewrite.load(self.folder / f"rule-{int(item['number'])}.safetensors")
                change._bind(self.generator)
                self.rules.append(Rule(item["number"], item["name"], change, bool(item["on"]), float(item["strength"])))
            if record["layer"] != self.layer and record["layer"] in [each["name"] for each in self.layers()]:
                self.choose_layer(record["layer"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"What the studio kept in {path.name} could not all be read ({error}).")

    def checkpoint(self) -> bytes:
        """The generator's state dict with all rules that are on, as safetensors."""
        from safetensors.torch import save

        changes, strengths = self._rewrites(False, None)
        with generator_lock(self.generator), self.session._changed(changes, strengths):
            state = self.generator.state_dict()
            return save({name: value.detach().clone().contiguous() for name, value in state.items()})

    def before_after(self, rows: Sequence[int], side: int = 128) -> bytes:
        """A PNG: pairs of pictures, before and after."""
        pairs = pictures.before_after(
            self.paint(rows, original=True), self.paint(rows), side, [f"picture {row}" for row in rows], columns=4
        )
        return png(
            pictures.grid(pairs, title=", ".join(rule.name for rule in self.rules if rule.on) or "before and after")
        )

    def walk(self, rows: Sequence[int], kind: str = "gif", frames: int = 48, side: int = 256) -> bytes:
        """A film that walks through the latents of some pictures and back, with the rules on."""
        changes, strengths = self._rewrites(False, None)
        shown, size = [], min(12, max(1, _PIXELS_AT_ONCE // math.prod(self.picture_size)))
        with generator_lock(self.generator), self.session._changed(changes, strengths):
            for batch in films.walk(self.latents[list(rows)], frames).split(size):
                found = pictures.to_unit(self.session.layer.render(batch), self.span)
                shown += [pictures.to_image(picture, side) for picture in found]
        return films.film(shown, kind)

    def close(self) -> None:
        self._latest.close()
        self._measuring.close()
        self._painter.shutdown(wait=False, cancel_futures=True)
        self._disk.shutdown()

    @contextlib.contextmanager
    def open(self) -> Iterator[Workshop]:
        try:
            yield self
        finally:
            self.close()
