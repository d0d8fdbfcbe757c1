"""Measuring what a change did: where unseen pictures hold the context, and what happened there and elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..edits.edit import Edit
from ..edits.goals import bounding_box, map_size
from ..errors import (
    ArgumentError,
    MismatchError,
    RewriteCoreError,
    SelectionError,
    number,
    quoted,
    silent,
    whole_number,
)
from ..layers.binding import bind, unwrapped
from ..layers.bound import BoundLayer
from ..layers.fingerprints import Forward
from ..layers.latents import check_latents
from ..layers.listing import LayerInfo, list_layers
from ..pictures import to_unit
from ..rewrites.change import Rewrite
from ..statistics.second_moment import SecondMoment
from .aligning import best_shift
from .places import Places, find_places, moments_of
from .report import Pair, Report
from .sheet import SHOWN
from .showing import rendered_goals, seen_goals
from .steps import PLAIN, Steps

UNSEEN = 256  # pictures, where none are given
_CELLS = (2, 32)  # a context is so many cells long on the maps of the layers that are asked where it is
_LAYERS = 12  # that are asked at most
_SHOWS = 0.25  # of what the best layer shows of the paste, one that is asked shows at least so much
_TRIED = 96  # unseen pictures that the layer to ask is chosen on
_FOLLOWED = 0.5  # of the wanted movement: nearer to what was wanted than to what was there
_STILL = 1 / 255  # a movement of a paste below this is none

Look = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]
"""(latents, rows) -> the images of those rows without and with the change, as the generator returns them."""


def measure(
    change: Rewrite | Sequence[Rewrite] | nn.Module,
    edit: Edit,
    z: Tensor,
    unseen: Tensor | None = None,
    *,
    layer: BoundLayer | None = None,
    moment: SecondMoment | None = None,
    strength: float = 1.0,
    span: tuple[float, float] = (-1.0, 1.0),
    batch_size: int = 16,
    progress: bool = False,
) -> Report:
    """What a change did to the pictures of its edit and to unseen ones, without ground truth.

    Where an unseen picture holds the edit's context is told by keys alone: by the cosine of the context's whitened key
    with those of a place (:func:`rewrite_core.evaluation.places.find_places`). What should happen there is what the
    pasted value renders in the edit's own picture. Both are asked of one layer: by default of the one that tells the
    context best apart among those whose value shows the paste. So a report does not depend on how well the changed
    layer can show the paste. But the patch lands by whole cells, and is looked for where the changed layer put it;
    where the cells of the layer that is asked are too coarse for that, a finer one renders it.

    Args:
        change: a rewrite, several (on together, in this order), or a generator that was changed in any other way, of
            the same kind as the one of `layer`. The generator is left as it was.
        edit: that was made; its selections index the rows of `z`. One without a copy, and what rc.erase and rc.zero
            made of one with a copy, is compared with what happened to its own paste, or context.
        z: [M, ...], the latents of the edit.
        unseen: [N, ...] latents; by default the first 256 rows of `z` that no selection names.
        layer: the layer to ask, from :func:`rewrite_core.bind`; it names the generator for a change that was loaded or
            is a generator itself.
        moment: of the changed layer's keys, for the size; by default that of the unseen pictures.
        strength: of the rewrites, as in :meth:`rewrite_core.Rewrite.apply`.
        span: what the generator's images lie in.
        batch_size: pictures at a time.
        progress: show bars.

    Raises:
        MismatchError: a rewrite is of another generator, or is applied already. SelectionError: there are too few
            unseen pictures, or the edit marks no place. MaskError: its masks vanish on every layer's map.
    """
    several = several_changes(change)
    on = _generator(several, layer)
    other = change if isinstance(change, nn.Module) else None
    given = Given(several, edit, z, unseen, layer, moment, strength, span, batch_size, Steps(progress))
    return measured(on, given, other)


@dataclasses.dataclass(frozen=True)
class Given:
    """The arguments of :func:`measure`; `force`: apply rewrites to weights that they were not fitted to, too. What only
    took away (rc.erase, rc.zero) is measured without the edit's copy, as it put nothing there."""

    changes: list[Rewrite]  # empty: the change is a generator
    edit: Edit
    z: Tensor
    unseen: Tensor | None = None
    layer: BoundLayer | None = None
    moment: SecondMoment | None = None
    strength: float = 1.0
    span: tuple[float, float] = (-1.0, 1.0)
    batch_size: int = 16
    steps: Steps = PLAIN
    force: bool = False

    def __post_init__(self) -> None:
        copied = [change.edit is None or change.edit.copy is not None for change in self.changes]
        if copied and not any(copied) and isinstance(self.edit, Edit) and self.edit.copy is not None:
            object.__setattr__(self, "edit", self.edit.without_copy())


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a change of an edit is measured against: nothing of it depends on the change.

    edit, latents: the edit on its latents. unseen: latents, `rows` of which are looked at. places: where the context
    is in those. looks: the window of the paste as it is, [C, h, w]. area: what of it most contexts cover, [h, w], 0 or
    1, where movements are compared. around: what any context covers; what is beyond is outside. wanted: how it should
    move; None for an edit without a copy. most: so many pictures with the context, and half as many without, are
    measured (None: all).
    """

    edit: Edit
    latents: Tensor
    unseen: Tensor
    rows: list[int]
    places: Places
    looks: Tensor
    area: Tensor
    around: Tensor
    wanted: Wanted | None
    most: int | None = None

    @property
    def matching(self) -> list[int]:
        """The numbers among `rows` of the pictures with the context that are looked at, best match first."""
        return _some(self.places.matching, self.most)

    @property
    def unrelated(self) -> list[int]:
        """And of those clearly without."""
        return _some(self.places.unrelated, None if self.most is None else self.most // 2)


class Wanted:
    """How the windows of pictures with the context should move, for patches that land as on a map of a size.

    Args:
        layers: that may render it, the one that is asked first, then those that show the paste best, with the sizes of
            their maps.
        before: {row: [C, H, W] in 0..1} of the pictures that are pasted into.
        cut: a window of a picture, as `corners` says for each paste.
        area: [h, w], 0 or 1, what of the window counts.
    """

    def __init__(
        self,
        layers: Sequence[tuple[BoundLayer, tuple[int, ...]]],
        edit: Edit,
        latents: Tensor,
        span: tuple[float, float],
        before: dict[int, Tensor],
        cut: Callable[[Tensor, tuple[int, int]], Tensor],
        corners: Sequence[tuple[int, int]],
        area: Tensor,
    ):
        self._layers, self._edit, self._latents, self._span = list(layers), edit, latents, span
        self._before, self._cut, self._corners, self._area = before, cut, corners, area
        self._sizes: dict[str, tuple[int, ...]] = {layer.name: size for layer, size in layers}
        self._moves: dict[tuple[int, ...], Tensor] = {}

    def by(self, changed: Sequence[BoundLayer]) -> Tensor:
        """[C, h, w], for a change of those layers. It runs the generator, once for each size of map."""
        for layer in changed:
            if layer.name not in self._sizes:
                self._sizes[layer.name] = map_size(layer, self._edit.pastes[0], self._latents)
        sizes = {self._sizes[layer.name] for layer in changed}
        asked = self._layers[0][1]
        on = sizes.pop() if len(sizes) == 1 else asked  # layers that place it differently: as the one that is asked
        if len(on) != len(asked):
            on = asked
        if on not in self._moves:
            self._moves[on] = self._rendered(on)
        return self._moves[on]

    def _rendered(self, on: tuple[int, ...]) -> Tensor:
        exact = [pair for pair in self._layers if not any(side % cells for side, cells in zip(pair[1], on))]
        asked = self._layers[0]
        layer, _ = asked if asked in exact or not exact else min(exact, key=lambda pair: math.prod(pair[1]))
        goals = rendered_goals(layer, self._edit, self._latents, self._span, on).pictures
        moves = [
            self._cut(goals[paste.index] - self._before[paste.index], corner)
            for paste, corner in zip(self._edit.pastes, self._corners, strict=True)
        ]
        return torch.stack(moves).mean(0) * self._area


def _some(rows: list[int], most: int | None) -> list[int]:
    """At most so many of the rows, from all parts of the list."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[i * len(rows) // most] for i in range(most)]


def several_changes(change: object) -> list[Rewrite]:
    """The rewrites; none where the change is a generator."""
    if isinstance(change, nn.Module):
        return []
    several = [change] if isinstance(change, Rewrite) else change
    if not isinstance(several, Sequence) or not several or not all(isinstance(one, Rewrite) for one in several):
        raise ArgumentError(f"A change is an rc.Rewrite, several in a list, or a generator, not {quoted(change)}.")
    return list(several)


def _generator(changes: Sequence[Rewrite], layer: BoundLayer | None) -> BoundLayer:
    """A bound layer of the generator that is measured."""
    if layer is not None:
        if not isinstance(layer, BoundLayer):
            raise ArgumentError(f"layer is what rc.bind(generator, name) returns, not {quoted(layer)}.")
        return layer
    for change in changes:
        for place in reversed(change._places()):
            return place
    raise MismatchError(
        "It is not known of which generator this change is (a loaded one, or a generator itself): give layer, what "
        "rc.bind(generator, name) returns."
    )


def _check_off(changes: Sequence[Rewrite], on: BoundLayer) -> None:
    for change in changes:
        if change._is_on(change._bind(on.generator)):
            raise MismatchError("A rewrite that is to be measured is applied already; revert it first.")


def looking(on: BoundLayer, given: Given, other: nn.Module | None = None) -> Look:
    """Pictures without and with a change: the rewrites, or another generator."""
    if other is not None:
        module, name = unwrapped(other, on.name)
        changed = bind(module, name, forward=on.own_forward)
        return lambda latents, rows: (on.render(latents[rows]), changed.render(latents[rows]))

    def look(latents: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        before = on.render(latents[rows])
        with contextlib.ExitStack() as applied:
            for change in given.changes:
                change.apply(on.generator, given.strength, force=given.force)
                applied.callback(change.revert, on.generator, force=given.force)
            return before, on.render(latents[rows])

    return look


def measured(
    on: BoundLayer,
    given: Given,
    other: nn.Module | None = None,
    look: Look | None = None,
    scene: Scene | None = None,
) -> Report:
    """:func:`measure`, of another generator where it is given; with pictures from `look`, and the scene, where there
    are better ones."""
    number("strength", given.strength)
    whole_number("batch_size", given.batch_size)
    with given.steps.turn():
        _check_off(given.changes, on)
    scene = scene_of(on, given) if scene is None else scene
    wanted: Tensor | None = None
    if scene.wanted is not None:
        with given.steps.turn():
            wanted = scene.wanted.by([change._bind(on.generator) for change in given.changes] or [on])
    return _Measuring(scene, wanted, given, look or looking(on, given, other)).report(_size(on, given, scene))


# --- the scene -------------------------------------------------------------------------------------------------------


def scene_of(on: BoundLayer, given: Given) -> Scene:
    """Where the context is in the unseen pictures, and what should happen there."""
    check_latents(given.z)
    edit = given.edit
    if not isinstance(edit, Edit):
        raise ArgumentError(f"An edit is an rc.Edit (rc.Edit.load reads a file), not {quoted(edit)}.")
    edit = edit.on(given.z)
    edit.check(given.z)
    if given.unseen is None:
        named = {part.index for part in edit.selections}
        unseen, rows = given.z, [row for row in range(len(given.z)) if row not in named][:UNSEEN]
    else:
        check_latents(given.unseen)
        unseen, rows = given.unseen, list(range(len(given.unseen)))
    if len(rows) < 2:
        raise SelectionError("There are fewer than two unseen pictures; give more latents.")
    with given.steps.turn():
        layers = [given.layer] if given.layer is not None else asked_layers(on, edit, given.z)
    places, showing = _best_told(layers, edit, given, unseen[rows])
    with given.steps.turn():
        looks, area, around, wanted = _wanted(places, edit, given.z, showing, given.span)
    return Scene(edit, given.z, unseen, rows, places, looks, area, around, wanted)


def asked_layers(on: BoundLayer, edit: Edit, latents: Tensor) -> list[BoundLayer]:
    """The layers of a generator that may tell where an edit's context is: maps on which it is a few cells long."""
    infos = map_layers(on.generator, latents, on.own_forward)
    fitting = [info for info in infos if _CELLS[0] <= _longest(edit, info.key_size) <= _CELLS[1]]
    if not fitting:
        fitting = [info for info in infos if _longest(edit, info.key_size) > 0]
    if not fitting:
        edit.where[0].area(infos[-1].key_size)  # says what is wrong with the masks
    step = max(1.0, len(fitting) / _LAYERS)
    chosen = [fitting[int(i * step)] for i in range(min(_LAYERS, len(fitting)))]
    return [bind(on.generator, info.name, forward=on.own_forward) for info in chosen]


def map_layers(generator: nn.Module, latents: Tensor, forward: Forward | None = None) -> list[LayerInfo]:
    """The layers of a generator whose keys and values are maps of two axes, in the order they run."""
    with silent(UserWarning):  # of layers that are left out
        infos = list_layers(generator, latents[:2], forward=forward)
    infos = [info for info in infos if len(info.key_size) == 2 and len(info.value_size) == 2]
    if not infos:
        raise RewriteCoreError("No layer of this generator has maps of two axes, so no place in a picture is known.")
    return infos


def _longest(edit: Edit, size: tuple[int, ...]) -> int:
    """How many cells the longest context is long on a map; 0 where one vanishes."""
    longest = 0
    for selection in edit.where:
        try:
            top, left, bottom, right = bounding_box(selection.area(size))
        except RewriteCoreError:
            return 0
        longest = max(longest, bottom - top, right - left)
    return longest


def _best_told(
    layers: Sequence[BoundLayer], edit: Edit, given: Given, unseen: Tensor
) -> tuple[Places, list[tuple[BoundLayer, tuple[int, ...]]]]:
    """What the layer tells that tells most; and the layers whose value shows the paste, that one first, then those that
    show most, with the sizes of their maps. None for an edit without a copy."""
    showing: list[tuple[BoundLayer, tuple[int, ...]]] = []
    if edit.copy is not None and edit.pastes:
        stage = "what layers show"
        with given.steps.turn():
            seen = seen_goals(given.steps.own(layers), edit, given.z, given.span)
        seen = given.steps.all(seen, stage)
        best = max(visible.shown for visible, _ in seen)
        named, ranked = {layer.name: layer for layer in layers}, sorted(seen, key=lambda pair: -pair[0].shown)
        showing = [(named[each.layer], goal.size) for each, goal in ranked if each.shown >= _SHOWS * best]
        layers = [layer for layer in layers if any(layer is other for other, _ in showing)]
    if len(layers) > 1:
        tried = find_places(layers, edit, given.z, unseen[:_TRIED], given.batch_size, given.steps)
        layers = [max(tried, key=lambda each: each.distinct).layer]
    (places,) = find_places(layers, edit, given.z, unseen, given.batch_size, given.steps)
    return places, sorted(showing, key=lambda pair: pair[0].name != places.layer.name)


def _wanted(
    places: Places,
    edit: Edit,
    latents: Tensor,
    showing: Sequence[tuple[BoundLayer, tuple[int, ...]]],
    span: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Wanted | None]:
    """The window of the (first) paste as it is [C, h, w]; what of a window most contexts and what any of them covers
    [h, w], 0 or 1; and how pictures should move there."""
    window, marked = places.window, edit.pastes or tuple(edit.where)
    before = {paste.index: to_unit(places.layer.render(latents[paste.index][None]), span)[0] for paste in marked}
    size = before[marked[0].index].shape[1:]

    def cut(picture: Tensor, corner: tuple[int, int]) -> Tensor:
        rows, columns = window.box(corner, size)
        return picture[..., rows, columns]

    masks = [(selection.area(tuple(size)), window.corner(selection.area(window.grid))) for selection in edit.where]
    share = torch.stack([cut(*mask) for mask in masks]).mean(0)
    area, around = (share >= min(0.5, share.max().item())).float(), (share > 0).float()
    corners = [window.corner(paste.area(window.grid)) for paste in marked]
    looks = cut(before[marked[0].index], corners[0])
    if not showing:
        return looks, area, around, None
    return looks, area, around, Wanted(showing, edit, latents, span, before, cut, corners, area)


# --- the numbers -----------------------------------------------------------------------------------------------------


class _Measuring:
    """One way through the pictures."""

    def __init__(self, scene: Scene, wanted: Tensor | None, given: Given, look: Look):
        self._scene, self._wanted, self._given, self._look = scene, wanted, given, look
        self._window = scene.places.window

    def _seen(
        self, latents: Tensor, rows: Sequence[int], label: str, shared: bool = False
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(row, before, after) of each row, [C, H, W] in 0..1. `shared`: of whole batches, this process's own alone."""
        step, steps = self._given.batch_size, self._given.steps
        batches = [list(rows[i : i + step]) for i in range(0, len(rows), step)]
        for some in steps.over(steps.own(batches) if shared else batches, label):
            with steps.turn():
                before, after = (to_unit(images, self._given.span) for images in self._look(latents, some))
            if before.ndim != 4:
                raise RewriteCoreError(f"The generator makes {list(before.shape)}, not images [N, C, H, W].")
            yield from zip(some, before, after, strict=True)

    def _crop(self, picture: Tensor, corner: tuple[int, int]) -> Tensor:
        rows, columns = self._window.box(corner, picture.shape[1:])
        return picture[:, rows, columns] * self._scene.area

    def _aligned(self, before: Tensor, corner: tuple[int, int]) -> tuple[slice, slice]:
        """The window at a corner, moved by up to a cell to where the picture looks most like the paste's."""
        scene, size = self._scene, before.shape[1:]
        rows, columns = self._window.box(corner, size)
        cell = max(side // cells for side, cells in zip(size, self._window.grid, strict=True))
        top, left = best_shift(before, rows.start, columns.start, scene.looks, scene.area, cell)
        height, width = scene.area.shape
        return slice(top, top + height), slice(left, left + width)

    def _own(self) -> tuple[Tensor, float | None, float, list[Pair]]:
        """The wanted movement, how far the paste itself got, how large that is, and the edit's own pictures."""
        scene = self._scene
        marked = scene.edit.pastes or tuple(scene.edit.where)
        rows = list(dict.fromkeys(selection.index for selection in marked))
        pictures = {row: (before, after) for row, before, after in self._seen(scene.latents, rows, "own pictures")}
        moves, pairs = [], []
        for selection in marked:
            before, after = pictures[selection.index]
            corner = self._window.corner(selection.area(self._window.grid))
            moves.append(self._crop(after - before, corner))
            pairs.append(Pair("edit", selection.index, before, after, selection.area(tuple(before.shape[1:]))))
        moved = torch.stack(moves).mean(0)
        wanted = moved if self._wanted is None else self._wanted
        size = (wanted.abs().sum() / (len(wanted) * scene.area.sum())).item()
        paste = None if self._wanted is None else _progress(moved, wanted)[0]
        return wanted, paste, size, pairs

    def report(self, sizes: tuple[float | None, float | None]) -> Report:
        scene = self._scene
        wanted, paste, size, pairs = self._own()
        still = size < _STILL and self._wanted is None
        moved, elsewhere, best, worst, most = self._unseen(wanted, still)
        ends = {pair.row: pair for pair in (*best.pairs, *reversed(worst.pairs))}
        return Report(
            reach=_mean([each.far >= _FOLLOWED for each in moved]),
            agreement=_mean([each.cosine for each in moved]),
            paste=paste,
            inside=_mean([each.inside for each in moved]),
            outside=_mean([each.outside for each in moved]),
            unrelated=_mean([change for _, change in elsewhere]),
            size=sizes[0],
            weight_size=sizes[1],
            layer=scene.places.layer.name,
            matching=[each.row for each in moved],
            moved=[each.far for each in moved],
            unrelated_rows=[scene.rows[i] for i in scene.unrelated],
            most_changed=[pair.row for pair in most.pairs],
            wanted=size,
            distinct=scene.places.distinct,
            pairs=[*pairs, *ends.values(), *most.pairs],
        )

    def _unseen(self, wanted: Tensor, still: bool) -> tuple[list[_Far], list[tuple[int, float]], _Best, _Best, _Best]:
        """The unseen pictures: how far those with the context moved; the others, and how much they changed; and which
        of them followed best, worst, and changed most."""
        scene, places, steps = self._scene, self._scene.places, self._given.steps
        numbers = {scene.rows[i]: i for i in (*scene.matching, *scene.unrelated)}
        others = {scene.rows[i] for i in scene.unrelated}
        best, worst, most = _Best(), _Best(), _Best()
        moved: list[_Far] = []
        elsewhere: list[tuple[int, float]] = []
        for row, before, after in self._seen(scene.unseen, list(numbers), "measure", shared=True):
            change = (after - before).abs().mean(0)
            if row in others:
                elsewhere.append((row, change.mean().item()))
                most.add(elsewhere[-1][1], Pair("unseen", row, before, after))
                continue
            rows, columns = self._aligned(before, places.best(numbers[row]))
            mine = self._covered(numbers[row], change.shape)
            mine[rows, columns] = torch.maximum(mine[rows, columns], scene.around)
            inside = (change * mine).sum().item() / mine.sum().item()
            outside = (change * (1 - mine)).sum().item() / max(1.0, (1 - mine).sum().item())
            far, cosine = _progress((after - before)[:, rows, columns] * scene.area, wanted)
            moved.append(_Far(row, inside, outside, *((0.0, 0.0) if still else (far, cosine))))
            pair = Pair("unseen", row, before, after, mine, moved[-1].far)
            best.add(moved[-1].far, pair)
            worst.add(-moved[-1].far, pair)
        for kept in (best, worst, most):
            kept.share(steps)
        return steps.all(moved, "moved"), steps.all(elsewhere, "elsewhere"), best, worst, most

    def _covered(self, number: int, size: Sequence[int]) -> Tensor:
        """The areas of all places of a picture but the best, [H, W], 0 or 1."""
        covered = torch.zeros(tuple(size))
        for corner in self._scene.places.all_in(number)[1:]:
            box = self._window.box(corner, size)
            covered[box] = torch.maximum(covered[box], self._scene.around)
        return covered


@dataclasses.dataclass(frozen=True)
class _Far:
    """An unseen picture with the context: its mean change inside and outside, how far it moved, and in what direction
    (a cosine)."""

    row: int
    inside: float
    outside: float
    far: float
    cosine: float


class _Best:
    """The pairs of highest score, best first; of equal ones the first that came."""

    def __init__(self) -> None:
        self._found: list[tuple[float, Pair]] = []

    def add(self, score: float, pair: Pair) -> None:
        self._keep([*self._found, (-score, pair)])

    def share(self, steps: Steps) -> None:
        """Those of all processes that share the work."""
        if steps.shard is not None:  # a picture of a batch would take the batch along
            self._found = [(score, pair.alone()) for score, pair in self._found]
        self._keep(steps.all(self._found, "pictures"))

    def _keep(self, found: list[tuple[float, Pair]]) -> None:
        self._found = sorted(found, key=lambda one: one[0])[:SHOWN]

    @property
    def pairs(self) -> list[Pair]:
        return [pair for _, pair in self._found]


def _progress(moved: Tensor, wanted: Tensor) -> tuple[float, float]:
    """How far a movement [C, h, w] goes along the wanted one, which is 1 far, and the cosine of the two."""
    along, whole = (moved * wanted).sum().item(), wanted.square().sum().item()
    length = moved.norm().item() * wanted.norm().item()
    return along / whole if whole else 0.0, along / length if length else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _size(on: BoundLayer, given: Given, scene: Scene) -> tuple[float | None, float | None]:
    """Of the largest of the rewrites: its size on keys, and |dW| / |W|."""
    sizes = []
    for change in given.changes:
        bound = change._bind(on.generator)
        moment = given.moment
        if moment is None or (moment.layer is not None and moment.layer != bound.name):
            bound = bind(on.generator, bound.name, forward=on.own_forward)
            latents = scene.unseen[scene.rows]
            (moment,) = moments_of([bound], latents, given.batch_size, given.steps)
        with given.steps.turn():
            sizes.append((change.size_on_keys(moment, bound), change._size_on(bound.parameter)()))
    if not sizes:
        return None, None
    largest = max(sizes)
    return largest[0] * abs(given.strength), largest[1] * abs(given.strength)
