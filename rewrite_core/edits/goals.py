"""Goals: what a layer's value should become, from the places an edit marks (paper, section 3.1 and figure 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.base import Box, Capture, window
from ..errors import NonFiniteError, SelectionError, SolverError, choice, warn, whole_number
from ..layers.bound import BoundLayer
from ..ops.finite import all_finite
from ..statistics.checks import check_layer
from ..statistics.second_moment import SecondMoment
from ..waits import likely, on_gpu, sent
from .directions import marked_keys, rank_units
from .edit import Edit
from .selection import Selection

REGIONS = ("box", "map")  # what is fitted
BLENDS = ("mask", "box")  # through what the copy is pasted


@dataclasses.dataclass(frozen=True)
class Goal:
    """The keys of the pasted region and the value they should have (paper, figure 3)."""

    capture: Capture  # cropped to the box, where one is fitted
    target: Tensor  # [1, O, *map]; a whole one can be previewed with BoundLayer.render
    box: Box | None  # of the value map; None for the whole map


def bounding_box(area: Tensor) -> Box:
    """The smallest box around the positive entries of area [*map]."""
    places = (area > 0).nonzero()
    return *places.amin(0).tolist(), *(places.amax(0) + 1).tolist()


def _fit_boxes(box: Box, key_size: tuple[int, ...], value_size: tuple[int, ...]) -> tuple[Box, Box] | None:
    """The smallest box of the key map that covers `box` of the value map, and the value box it makes; None where
    one map's size is no multiple of the other's, so that no box of pixels matches a box of pixels."""
    axes = len(key_size)
    key_box, value_box = [0] * 2 * axes, [0] * 2 * axes
    for axis in range(axes):
        k, v = key_size[axis], value_size[axis]
        if v % k and k % v:
            return None
        start, stop = box[axis], box[axis + axes]
        if v >= k:  # same size or upsampling, v / k value pixels to a key pixel
            ratio = v // k
            key_box[axis], key_box[axis + axes] = start // ratio, min(k, -(-stop // ratio))
            value_box[axis], value_box[axis + axes] = key_box[axis] * ratio, min(v, key_box[axis + axes] * ratio)
        else:
            ratio = k // v
            value_box[axis], value_box[axis + axes] = start, stop
            key_box[axis], key_box[axis + axes] = start * ratio, min(k, stop * ratio)
    return tuple(key_box), tuple(value_box)


def _probe(layer: BoundLayer, key: Tensor) -> tuple[Tensor, Tensor]:
    """One channel of zeros for the key map and a kernel of 1, 2, 3, ...; what the layer's linear operator does with
    them shows what it does with every channel. float64: exact enough for any order of additions."""
    dtype, device = torch.float64, key.device
    kernel = torch.arange(1, math.prod(layer.kernel_size) + 1, dtype=dtype, device=device)
    return torch.zeros(1, 1, *key.shape[2:], dtype=dtype, device=device), kernel.reshape(1, 1, *layer.kernel_size)


def _value_size(layer: BoundLayer, capture: Capture) -> tuple[int, ...]:
    if layer.known:
        return tuple(layer.linear(*_probe(layer, capture.key)).shape[2:])
    with torch.no_grad():
        return tuple(layer.value(capture).shape[2:])


def _agrees(layer: BoundLayer, whole: Tensor, kernel: Tensor, key_box: Box, wanted: Tensor, inner: Box | None) -> bool:
    """Whether the linear operator on a crop of `whole` makes `wanted`, or has it in its `inner` box."""
    try:
        found = layer.linear(whole[window(key_box)], kernel)
    except RuntimeError:  # torch: the crop is smaller than the kernel or than the padding
        return False
    found = found if inner is None else found[window(inner)]
    return found.shape == wanted.shape and likely(torch.isclose(found, wanted).all())


def _crops(layer: BoundLayer, key: Tensor, key_box: Box, value_box: Box) -> bool:
    """Whether the layer's linear operator on a crop of its key is what it would be on the whole key with zeros
    outside the crop: not so where it pads with anything but zeros, not at all, or unevenly."""
    whole, kernel = _probe(layer, key)
    part = whole[window(key_box)]
    part.copy_(torch.arange(1, part.numel() + 1, device=part.device).reshape(part.shape))
    return _agrees(layer, whole, kernel, key_box, layer.linear(whole, kernel)[window(value_box)], None)


def _shifted(box: Box, origin: Box) -> Box:
    """A box in the coordinates of a crop that begins where `origin` does."""
    axes = len(box) // 2
    return tuple(place - origin[i % axes] for i, place in enumerate(box))


def _value(layer: BoundLayer, capture: Capture, size: tuple[int, ...], box: Box | None = None) -> Tensor:
    """The value of a capture, [1, O, *map] of `size`, or a copy of a box of it. A box is computed from the keys around
    it alone, where the layer's linear operator on one channel shows that to be the same; on a GPU from all of them,
    which is done sooner than the look."""
    weight = layer.own_weight.to(capture.key.dtype)
    with torch.no_grad():
        if box is None:
            return layer.value(capture, weight)
        axes = len(size)
        kernel_size = layer.kernel_size or [1] * axes  # a linear layer has no kernel
        margins = [k * max(1, v // n) for k, v, n in zip(kernel_size, size, capture.key.shape[2:])]
        around = (
            *(max(0, box[i] - margins[i]) for i in range(axes)),
            *(min(size[i], box[axes + i] + margins[i]) for i in range(axes)),
        )
        boxes = _fit_boxes(around, tuple(capture.key.shape[2:]), size)
        if boxes is not None and not on_gpu(capture.key) and layer.post_operation(capture) is not None:
            whole, kernel = _probe(layer, capture.key)
            whole.copy_(torch.arange(1, whole.numel() + 1, device=whole.device).reshape(whole.shape))
            inner = _shifted(box, boxes[1])
            if _agrees(layer, whole, kernel, boxes[0], layer.linear(whole, kernel)[window(box)], inner):
                return layer.value(layer.crop(capture, *boxes), weight)[window(inner)].clone()
        return layer.value(capture, weight)[window(box)].clone()


def _crop(layer: BoundLayer, capture: Capture, size: tuple[int, ...], box: Box) -> tuple[Capture, Box]:
    """The capture in the smallest region around `box` that the layer can be run on by itself, and that region of the
    value map. Copies: a view would keep the whole map alive."""
    boxes = _fit_boxes(box, tuple(capture.key.shape[2:]), size)
    if boxes is None or not _crops(layer, capture.key, *boxes):
        raise SolverError(
            f"Layer {layer.name!r} cannot be run on a crop of its map (its maps are {tuple(capture.key.shape[2:])} and "
            f"{size}, and a crop is padded with zeros); use region='map'.",
            advice={"region": "map"},
        )
    cropped = layer.crop(capture, *boxes)
    whole = capture.extra  # what is not cropped stays the same tensor, by which pastes of one picture are known
    extra = {name: part if part is whole[name] else part.clone() for name, part in cropped.extra.items()}
    return Capture(cropped.key.clone(), extra), boxes[1]


def _capture_one(layer: BoundLayer, selection: Selection, latents: Tensor) -> Capture:
    capture = layer.capture_each(selection.latent(latents))
    if not all_finite(capture.key):
        raise NonFiniteError(
            f"The keys of {layer.name!r} hold NaN or infinity for latent {selection.index}; choose another picture."
        )
    # solve in float32 at least, whatever the generator's own precision
    capture = capture.to_dtype(torch.promote_types(capture.key.dtype, torch.float32))
    if capture.key.is_inference():  # a view of latents made in inference mode, which autograd refuses
        capture = dataclasses.replace(capture, key=capture.key.clone())
    return capture


def _by_picture(edit: Edit) -> list[list[Selection]]:
    """The pastes of each picture together."""
    pictures: dict[int, list[Selection]] = {}
    for paste in edit.pastes:
        pictures.setdefault(paste.index, []).append(paste)
    return list(pictures.values())


def _common(box: Box, other: Box) -> Box | None:
    """What two boxes have in common."""
    axes = len(box) // 2
    common = *map(max, box[:axes], other[:axes]), *map(min, box[axes:], other[axes:])
    return common if all(common[axis] < common[axis + axes] for axis in range(axes)) else None


def _composite(target: Tensor, region: Box, box: Box, patch: Tensor, area: Tensor) -> None:
    """Put a patch that belongs to `box` of the value map on `target`, which is `region` of it, through `area`."""
    common = _common(region, box)
    if common is None:
        return
    place, own = window(_shifted(common, region)), window(_shifted(common, box))
    cover, pasted = area[own[2:]], target[place]
    pasted.copy_((1 - cover) * pasted + cover * patch[own])


def _once(boxes: Sequence[Box], index: int) -> list[Box]:
    """Each box once; a warning where one was there twice."""
    once = list(dict.fromkeys(boxes))
    if len(once) < len(boxes):
        warn(f"Two pastes of picture {index} fall on the same place of the map, and count once.")
    return once


def _check_apart(boxes: Sequence[Box], area: Tensor, index: int) -> None:
    """Pastes of one picture may not want two values of one pixel."""
    for number, box in enumerate(boxes):
        for other in boxes[:number]:
            common = _common(box, other)
            if common and (area[window(_shifted(common, box))[2:]] * area[window(_shifted(common, other))[2:]]).any():
                raise SelectionError(
                    f"Two pastes of picture {index} overlap where the copied patch lands (value map boxes {other} and "
                    f"{box}); move them apart, or make an edit of each and apply one after the other."
                )


def map_size(layer: BoundLayer, selection: Selection, latents: Tensor) -> tuple[int, ...]:
    """The size of a layer's value map, as a selection's picture has it."""
    return _value_size(layer, _capture_one(layer, selection, latents))


def landing(copy: Selection, paste: Selection, size: tuple[int, ...], on: tuple[int, ...] | None = None) -> Box:
    """The box of a map of `size` where the copied patch lands: centred on the paste. `on`: the size of another map; the
    patch lands where it does there, to the nearest cell of this one."""
    copied, axes = bounding_box(copy.area(size)), len(size)
    extents = [copied[axis + axes] - copied[axis] for axis in range(axes)]
    if on is None or tuple(on) == tuple(size):
        around = bounding_box(paste.area(size))
        starts = [(around[axis] + around[axis + axes]) // 2 - extents[axis] // 2 for axis in range(axes)]
    else:
        there, first = landing(copy, paste, on), bounding_box(copy.area(on))
        starts = [copied[axis] + round((there[axis] - first[axis]) * size[axis] / on[axis]) for axis in range(axes)]
    place = [max(0, min(size[axis] - extents[axis], starts[axis])) for axis in range(axes)]
    return *place, *(start + extent for start, extent in zip(place, extents))


def paste_goals(
    layer: BoundLayer,
    edit: Edit,
    latents: Tensor,
    region: str = "box",
    blend: str = "mask",
    on: tuple[int, ...] | None = None,
) -> list[Goal]:
    """The goals of a copy and paste: the copied value patch composited at the centre of each paste. A place given twice
    counts once.

    Args:
        region: "box": fit the pasted boxes only (the convolution then zero-pads at their edges), a goal each; "map":
            the whole map of every picture that is pasted into.
        blend: "mask": composite through the copy's mask; "box": its bounding box.
        on: the size of another layer's map: the patches land where they do there, to the nearest cell.
    """
    choice("region", region, REGIONS)
    choice("blend", blend, BLENDS)
    if edit.copy is None or not edit.pastes:
        missing = "copy ('object')" if edit.copy is None else "paste"
        raise SelectionError(
            f"This edit has no {missing} selection; add one, or use rc.erase or rc.zero.",
            advice={"rc.erase": None, "rc.zero": None},
        )
    goals, patch = [], None
    for pastes in _by_picture(edit):
        capture = _capture_one(layer, pastes[0], latents)
        if patch is None:
            source = _capture_one(layer, edit.copy, latents)
            size = _value_size(layer, capture)
            area, axes = edit.copy.area(size), len(size)
            copy_box = bounding_box(area)
            patch = _value(layer, source, size, copy_box)
            area = area[window(copy_box)[2:]] if blend == "mask" else torch.ones_like(area[window(copy_box)[2:]])
            # the area itself stays where looking at it waits for no GPU
            cover = sent(area, capture.key.device, capture.key.dtype)
        boxes = _once([landing(edit.copy, paste, size, on) for paste in pastes], pastes[0].index)
        _check_apart(boxes, area, pastes[0].index)
        crops = [_crop(layer, capture, size, box) for box in boxes] if region == "box" else [(capture, None)]
        for cropped, fitted in crops:
            target, whole = _value(layer, capture, size, fitted), fitted or (*[0] * axes, *size)
            for box in boxes:
                _composite(target, whole, box, patch, cover)
            goals.append(Goal(cropped, target, fitted))
    return goals


def preview(layer: BoundLayer, edit: Edit, latents: Tensor, *, blend: str = "mask") -> Tensor:
    """What the paste renders before any fit: the pictures that follow from the layer's value with the copied patch in
    it (paper, figure 3). Where they do not show the rule, no change of this layer will.

    Args:
        layer, edit, latents, blend: those of :func:`rewrite_core.rewrite`.

    Returns images [n, C, *size] as the generator makes them, of each picture that the edit pastes into, in its order.

    Raises:
        SelectionError: there is no copy or no paste, or two pastes of one picture overlap.
        MaskError, MismatchError, NonFiniteError: as their names say.
    """
    check_layer(layer)
    edit.check(latents)
    goals = paste_goals(layer, edit, latents, "map", blend)
    rows = [pastes[0].index for pastes in _by_picture(edit)]
    return torch.cat([layer.render(latents[[row]], goal.target) for row, goal in zip(rows, goals, strict=True)])


def erase_goals(
    layer: BoundLayer, moment: SecondMoment, edit: Edit, latents: Tensor, units: int = 30, region: str = "map"
) -> list[Goal]:
    """The goals of an erasure: the layer's own output with the `units` key channels of highest mean
    k^2 / E[k^2] in the context zeroed; at each paste (region "box"), or on the map of every picture that has one."""
    choice("region", region, REGIONS)
    if not edit.pastes:
        raise SelectionError("This edit has no paste selection; an erasure needs one to say what goes.")
    units = whole_number("units", units, most=layer.in_channels)
    keys, weights = marked_keys(layer, edit.where, latents)
    gone = rank_units(moment, keys, weights)[:units]
    goals = []
    for pastes in _by_picture(edit):
        capture = _capture_one(layer, pastes[0], latents)
        size = _value_size(layer, capture)
        silent = capture.key.clone()
        silent[:, gone.to(silent.device)] = 0
        without = dataclasses.replace(capture, key=silent)
        found = [bounding_box(paste.area(size)) for paste in pastes]
        for box in _once(found, pastes[0].index) if region == "box" else [None]:
            part, fitted = (capture, None) if box is None else _crop(layer, capture, size, box)
            goals.append(Goal(part, _value(layer, without, size, fitted), fitted))
    return goals
