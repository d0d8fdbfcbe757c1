"""Where a copied patch goes besides its first paste: to every place of the context, and to places that search finds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SelectionError, warn
from ..layers.bound import BoundLayer
from ..layers.latents import check_latents
from ..statistics.second_moment import SecondMoment, check_inputs
from .matches import search
from .selection import Selection

SLACK = 0.25  # of a cell


def _centre(area: Tensor) -> list[float]:
    """The centre of a mask [*map], in cells of the map."""
    total = area.sum()
    axes = range(area.ndim)
    return [
        ((area.sum([a for a in axes if a != axis]) * _middles(area.shape[axis])).sum() / total).item() for axis in axes
    ]


def _middles(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32, device="cpu") + 0.5


def _moved(selection: Selection, index: int, steps: Sequence[int], size: tuple[int, ...]) -> Selection | None:
    """The mask of a selection, moved by whole cells of a map of `size`, on another picture; None where it would leave
    the picture. At its own resolution where cells are whole pixels of it, else at the map's."""
    mask = torch.from_numpy(selection.mask)
    if len(size) == 1:
        mask = mask.reshape(-1)
    if mask.ndim != len(size) or any(pixels % cells for pixels, cells in zip(mask.shape, size)):
        mask = selection.area(size)
    pixels = [step * (length // cells) for step, length, cells in zip(steps, mask.shape, size)]
    inside = (mask > 0).nonzero()
    first, last = inside.amin(0) + torch.tensor(pixels), inside.amax(0) + torch.tensor(pixels)
    if (first < 0).any() or (last >= torch.tensor(mask.shape)).any():
        return None
    return Selection(index, torch.roll(mask, pixels, list(range(mask.ndim))))


def aligned(copy: Selection, place: Selection, size: tuple[int, ...], slack: float) -> Selection | None:
    """Where the copied patch lands on `place`: the copy's own mask, moved by whole cells so that the centres of both
    masks meet as nearly as they can. None where more than `slack` of a cell is left between them on some axis, or where
    the patch would leave the picture."""
    apart = [to - of for to, of in zip(_centre(place.area(size)), _centre(copy.area(size)))]
    steps = [round(cells) for cells in apart]
    if any(abs(cells - step) > slack for cells, step in zip(apart, steps)):
        return None
    return _moved(copy, place.index, steps, size)


def _overlap(one: Selection, other: Selection, size: tuple[int, ...]) -> bool:
    return one.index == other.index and bool(((one.area(size) > 0) & (other.area(size) > 0)).any())


def spread_pastes(
    copy: Selection, pastes: Sequence[Selection], places: Sequence[Selection], size: tuple[int, ...], slack: float
) -> list[Selection]:
    """The pastes, and one at each of `places` that is free of them.

    Warns where some places are left out; raises SelectionError where all of them are.
    """
    spread, left = list(pastes), 0
    free = [place for place in places if not any(_overlap(place, paste, size) for paste in pastes)]
    for place in free:
        landing = aligned(copy, place, size, slack)
        if landing is None or any(_overlap(landing, paste, size) for paste in spread):
            left += 1
        else:
            spread.append(landing)
    cells = "x".join(map(str, size))
    if left == len(free) > 0:
        raise SelectionError(
            f"No place of the context lies where the copied patch can land, which moves by whole cells of the {cells} "
            "map: choose a layer with a larger map, or mark more places."
        )
    if left:
        warn(
            f"{left} of {len(free)} places were left out: the patch moves by whole cells of the {cells} map, and would "
            f"land more than {slack:g} of a cell beside the mask, over another paste, or outside the picture."
        )
    return spread


def find_places(
    layer: BoundLayer,
    moment: SecondMoment,
    like: Selection,
    known: Sequence[Selection],
    latents: Tensor,
    count: int,
    progress: bool = False,
) -> list[Selection]:
    """The places of the `count` best matches of `like` among the pictures that none of `known` selects from: its mask,
    moved by whole cells of the key map to where the keys agree best in all of it.

    Raises SelectionError where there are fewer other pictures.
    """
    check_inputs(layer, moment, latents)
    check_latents(latents)
    taken = {selection.index for selection in known}
    if count > len(latents) - len({index for index in taken if index < len(latents)}):
        raise SelectionError(
            f"There are {len(latents)} pictures, {len(taken)} of them in the edit, so no {count} others; ask for fewer."
        )
    found = search(layer, moment, like, latents, top=count + len(taken), progress=progress)
    rows = [row for row in found.indices.tolist() if row not in taken][:count]
    key = layer.keys(like.latent(latents))[0]
    area = like.area(tuple(key.shape[1:]))
    inside = (area > 0).nonzero()
    marked = key.flatten(1).T.cpu().double()[area.flatten() > 0]  # [n, I]
    query = moment.solve(marked).cpu() * area[area > 0].double()[:, None]
    places = []
    for row in rows:
        keys = layer.keys(latents[row : row + 1])[0].cpu().double()
        steps = _best_steps(query, inside, keys)
        place = _moved(like, row, steps, tuple(keys.shape[1:]))
        places.append(Selection(row, _at(area, steps)) if place is None else place)
    return places


def _best_steps(query: Tensor, inside: Tensor, keys: Tensor) -> list[int]:
    """By how many cells of keys [I, *map] the marked places [n, axes] move to where ``sum query . key`` is highest."""
    size = torch.tensor(keys.shape[1:])
    ranges = [range(-int(low), int(length - high)) for low, high, length in zip(inside.amin(0), inside.amax(0), size)]
    heat, sums = torch.einsum("ni,i...->n...", query, keys), torch.zeros(())
    for scores, place in zip(heat, inside.tolist()):
        sums = sums + scores[tuple(slice(at + each.start, at + each.stop) for at, each in zip(place, ranges))]
    return [each[int(n)] for each, n in zip(ranges, torch.unravel_index(sums.argmax(), sums.shape))]


def _at(area: Tensor, steps: Sequence[int]) -> Tensor:
    """An area [*map] moved by whole cells, which leave no marked one outside."""
    return torch.roll(area, list(steps), list(range(area.ndim)))
