"""What an edit asks for, in pictures: the pasted pixels, and what the pasted value renders at a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits.edit import Edit
from ..edits.goals import bounding_box, landing, paste_goals
from ..edits.selection import Selection
from ..layers.bound import BoundLayer
from ..pictures import to_unit


@dataclasses.dataclass(frozen=True)
class Visibility:
    """What of a paste a layer can show.

    layer: its name. shown: how far the picture that the pasted value renders gets from the picture as it is to the
    pasted pixels, inside the pasted area: 0 is nothing, 1 all of it. outside: mean change of that picture outside,
    0..1. elsewhere: the share of all its change that lies outside.
    """

    layer: str
    shown: float
    outside: float
    elsewhere: float


def composite(
    edit: Edit, paste: Selection, copied: Tensor, picture: Tensor, on: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """The copied pixels on a picture, as :func:`rewrite_core.edits.goals.paste_goals` places values.

    Args:
        copied, picture: [C, H, W]: where the copy comes from, and where it goes.
        on: the size of a layer's map: the patch lands where it does there, to the nearest pixel.

    Returns the picture with the patch on it [C, H, W], and where the patch covers it, [H, W] in 0..1.
    """
    assert edit.copy is not None  # callers look
    size = tuple(picture.shape[1:])
    area = edit.copy.area(size)
    top, left, bottom, right = bounding_box(area)
    first_row, first_column, last_row, last_column = landing(edit.copy, paste, size, on)
    place = slice(first_row, last_row), slice(first_column, last_column)
    cover, patch = torch.zeros(size), torch.zeros_like(picture)
    cover[place] = area[top:bottom, left:right]
    patch[:, place[0], place[1]] = copied[:, top:bottom, left:right]
    return picture + cover * (patch - picture), cover


@dataclasses.dataclass(frozen=True)
class Rendered:
    """What the pasted value renders at a layer. pictures: {row: [C, H, W] in 0..1}, each that is pasted into. size: of
    the layer's value map."""

    pictures: dict[int, Tensor]
    size: tuple[int, ...]


def rendered_goals(
    layer: BoundLayer,
    edit: Edit,
    latents: Tensor,
    span: tuple[float, float],
    on: tuple[int, ...] | None = None,
) -> Rendered:
    """What the pasted value renders at a layer; where `on` is the size of another layer's map, with the patch where it
    lands there."""
    rows = list(dict.fromkeys(paste.index for paste in edit.pastes))
    goals = paste_goals(layer, edit, latents, region="map", on=on)
    pictures = {
        row: to_unit(layer.render(latents[row][None], goal.target.to(layer.parameter.dtype)), span)[0]
        for row, goal in zip(rows, goals, strict=True)
    }
    return Rendered(pictures, tuple(goals[0].target.shape[2:]))


def visibility(
    layers: Sequence[BoundLayer], edit: Edit, latents: Tensor, span: tuple[float, float] = (-1.0, 1.0)
) -> list[Visibility]:
    """What of an edit's paste each layer can show: it takes a few renders for each.

    Raises:
        SelectionError: the edit has no copy or no paste. MaskError: a mask vanishes on a layer's map.
    """
    return [seen for seen, _ in seen_goals(layers, edit, latents, span)]


def seen_goals(
    layers: Sequence[BoundLayer], edit: Edit, latents: Tensor, span: tuple[float, float]
) -> list[tuple[Visibility, Rendered]]:
    """:func:`visibility` of each layer, and its :func:`rendered_goals`."""
    found: list[tuple[Visibility, Rendered]] = []
    own: dict[int, Tensor] = {}
    for layer in layers:
        rendered = rendered_goals(layer, edit, latents, span)  # says what the edit lacks
        goals = rendered.pictures
        assert edit.copy is not None
        for row in (edit.copy.index, *goals):
            if row not in own:
                own[row] = to_unit(layer.render(latents[row][None]), span)[0]
        wanted: dict[int, Tensor] = {row: own[row] for row in goals}
        covers: dict[int, Tensor] = {row: torch.zeros(own[row].shape[1:]) for row in goals}
        for paste in edit.pastes:
            mixed = composite(edit, paste, own[edit.copy.index], wanted[paste.index], on=rendered.size)
            wanted[paste.index], cover = mixed
            covers[paste.index] = torch.maximum(covers[paste.index], cover)
        found.append((_seen(layer.name, own, wanted, covers, goals), rendered))
    return found


def _seen(
    layer: str, own: dict[int, Tensor], wanted: dict[int, Tensor], covers: dict[int, Tensor], goals: dict[int, Tensor]
) -> Visibility:
    """What the goals show of what was wanted, where it is covered; all by row."""
    along = whole = inside = outside = pixels = 0.0
    for row, goal in goals.items():
        cover, pasted, moved = covers[row], wanted[row] - own[row], goal - own[row]
        along += (cover * pasted * moved).sum().item()
        whole += (cover * pasted.square()).sum().item()
        inside += (cover * moved.abs()).sum().item()
        outside += ((1 - cover) * moved.abs()).sum().item()
        pixels += len(moved) * (1 - cover).sum().item()
    moving = inside + outside
    return Visibility(
        layer,
        shown=along / whole if whole else 0.0,
        outside=outside / pixels if pixels else 0.0,
        elsewhere=outside / moving if moving else 0.0,
    )
