"""Rewriting: turn an edit into a rank-R change of one layer's weight, and the change itself."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from .binding import BoundLayer, bind
from .directions import (
    UnitQuantiles, collect_unit_quantiles, context_directions, context_keys, latent_of, rank_units,
)  # fmt: skip
from .editing import Edit, Selection
from .errors import (
    FileFormatError, MismatchError, NonFiniteError, RewriteCoreError, SelectionError, SolverError,
    UnderdeterminedWarning,
)  # fmt: skip
from .families import Box, Capture, window
from .files import load_record, save_record
from .fingerprints import tensor_fingerprint
from .moments import SecondMoment
from .parametrization import LowRankChange, attach
from .solvers import (
    LOSSES, SOLVERS, Problem, combine, generic_second_moment, solve_adam, solve_lm, solve_projected,
    solve_unconstrained,
)  # fmt: skip

_VERSION = 1
_GENERIC_IMAGES = 32  # ordinary images that the preserve term is estimated from


# --- goals: what the layer's value should become ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """The keys of the pasted region and the value they should have (paper, figure 3)."""

    capture: Capture  # cropped to the region where tight
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
    options = {"dtype": torch.float64, "device": key.device}
    kernel = torch.arange(1, math.prod(layer.kernel_size) + 1, **options).reshape(1, 1, *layer.kernel_size)
    return torch.zeros(1, 1, *key.shape[2:], **options), kernel


def _value_size(layer: BoundLayer, key: Tensor) -> tuple[int, ...]:
    return tuple(layer.linear(*_probe(layer, key)).shape[2:])


def _agrees(layer: BoundLayer, whole: Tensor, kernel: Tensor, key_box: Box, wanted: Tensor, inner: Box | None) -> bool:
    """Whether the linear operator on a crop of `whole` makes `wanted`, or has it in its `inner` box."""
    try:
        found = layer.linear(whole[window(key_box)], kernel)
    except RuntimeError:  # torch: the crop is smaller than the kernel or than the padding
        return False
    found = found if inner is None else found[window(inner)]
    return found.shape == wanted.shape and torch.allclose(found, wanted)


def _crops(layer: BoundLayer, key: Tensor, key_box: Box, value_box: Box) -> bool:
    """Whether the layer's linear operator on a crop of its key is what it would be on the whole key with zeros
    outside the crop: not so where it pads with anything but zeros, not at all, or unevenly."""
    whole, kernel = _probe(layer, key)
    part = whole[window(key_box)]
    part.copy_(torch.arange(1, part.numel() + 1).reshape(part.shape))
    return _agrees(layer, whole, kernel, key_box, layer.linear(whole, kernel)[window(value_box)], None)


def _shifted(box: Box, origin: Box) -> Box:
    """A box in the coordinates of a crop that begins where `origin` does."""
    axes = len(box) // 2
    return tuple(place - origin[i % axes] for i, place in enumerate(box))


def _value(layer: BoundLayer, capture: Capture, size: tuple[int, ...], box: Box | None = None) -> Tensor:
    """The value of a capture, [1, O, *map] of `size`, or a copy of a box of it. A box is computed from the keys around
    it alone, where the layer's linear operator on one channel shows that to be the same."""
    weight = layer.weight.to(capture.key.dtype)
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
        if boxes is not None and layer.post_operation(capture) is not None:
            whole, kernel = _probe(layer, capture.key)
            whole.copy_(torch.arange(1, whole.numel() + 1).reshape(whole.shape))
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
            f"{size}, and a crop is padded with zeros); use tight=False."
        )
    cropped = layer.crop(capture, *boxes)
    extra = {name: part.clone() for name, part in cropped.extra.items()}
    return Capture(cropped.key.clone(), extra), boxes[1]


def _capture_one(layer: BoundLayer, selection, latents: Tensor) -> Capture:
    capture = layer.capture_each(latent_of(selection, latents))
    if not torch.isfinite(capture.key).all():
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


def paste_goals(layer: BoundLayer, edit: Edit, latents: Tensor, tight: bool = True, alpha: bool = True) -> list[Goal]:
    """The goals of a copy and paste: the copied value patch composited at the centre of each paste. A place given twice
    counts once.

    Args:
        tight: fit the pasted boxes only (the convolution then zero-pads at their edges), a goal each; not the whole map
            of every picture that is pasted into.
        alpha: composite through the copy's mask, not its bounding box.
    """
    if edit.copy is None or not edit.pastes:
        missing = "copy ('object')" if edit.copy is None else "paste"
        raise SelectionError(f"This edit has no {missing} selection; add one, or use rc.erase or rc.zero.")
    goals, patch = [], None
    for pastes in _by_picture(edit):
        capture = _capture_one(layer, pastes[0], latents)
        if patch is None:
            source = _capture_one(layer, edit.copy, latents)
            size = _value_size(layer, capture.key)
            area, axes = edit.copy.area(size), len(size)
            copy_box = bounding_box(area)
            patch = _value(layer, source, size, copy_box)
            area = area[window(copy_box)[2:]] if alpha else torch.ones_like(area[window(copy_box)[2:]])
            cover = area.to(capture.key)  # the area itself stays where looking at it waits for no GPU
        boxes = []
        for paste in pastes:
            around, place = bounding_box(paste.area(size)), []
            for axis, extent in enumerate(patch.shape[2:]):
                centre = (around[axis] + around[axis + axes]) // 2
                place.append(max(0, min(size[axis] - extent, centre - extent // 2)))
            box = (*place, *(start + extent for start, extent in zip(place, patch.shape[2:])))
            if box not in boxes:
                boxes.append(box)
        _check_apart(boxes, area, pastes[0].index)
        crops = [_crop(layer, capture, size, box) for box in boxes] if tight else [(capture, None)]
        for cropped, fitted in crops:
            target, region = _value(layer, capture, size, fitted), fitted or (*[0] * axes, *size)
            for box in boxes:
                _composite(target, region, box, patch, cover)
            goals.append(Goal(cropped, target, fitted))
    return goals


def erase_goals(
    layer: BoundLayer, moment: SecondMoment, edit: Edit, latents: Tensor, units: int = 30, tight: bool = False
) -> list[Goal]:
    """The goals of an erasure: the layer's own output with the `units` key channels of highest mean
    k^2 / E[k^2] in the context zeroed; at each paste, or on the map of every picture that has one."""
    if not edit.pastes:
        raise SelectionError("This edit has no paste selection; an erasure needs one to say what goes.")
    if not 1 <= units <= layer.in_channels:
        raise RewriteCoreError(f"units must be from 1 to the {layer.in_channels} key channels, not {units}.")
    keys, weights = context_keys(layer, edit.keys, latents)
    gone = rank_units(moment, keys, weights)[:units]
    goals = []
    for pastes in _by_picture(edit):
        capture = _capture_one(layer, pastes[0], latents)
        size = _value_size(layer, capture.key)
        without = capture.key.clone()
        without[:, gone.to(without.device)] = 0
        without = dataclasses.replace(capture, key=without)
        boxes = dict.fromkeys(bounding_box(paste.area(size)) for paste in pastes) if tight else [None]
        for box in boxes:
            part, fitted = (capture, None) if box is None else _crop(layer, capture, size, box)
            goals.append(Goal(part, _value(layer, without, size, fitted), fitted))
    return goals


# --- the change ------------------------------------------------------------------------------------------


class _Stack(TypedDict):
    """The rewrites that are on one module's weight, and that weight before and after them.

    Kept as an attribute of the module itself: no global state, and it is copied, pickled and dropped with the
    module. Plain containers of plain tensors, so that none of that needs this library, a Rewrite or its generator.
    """

    base: Tensor  # the weight before the first rewrite, as the module stored it then
    weight: Tensor  # the weight with all of them, to notice when something else changes it
    rewrites: dict[str, tuple[Tensor, Tensor]]  # content id: directions and coefficients, in the order applied


_STACK = "_rewrite_core_stack"


def _holds(bound: BoundLayer, weight: Tensor) -> bool:
    """Whether the layer's parameter is `weight`, wherever the generator was moved or cast to since."""
    parameter = bound.parameter.detach()
    return torch.equal(parameter, weight.to(parameter))


def _stack_of(bound: BoundLayer) -> _Stack | None:
    """What is on the layer's weight, on the weight's device; None where nothing is, or where the weight has been put
    back by other means (load_state_dict)."""
    stack: _Stack | None = getattr(bound.module, _STACK, None)
    if stack is None or (_holds(bound, stack["base"]) and not _holds(bound, stack["weight"])):
        return None
    device = bound.parameter.device
    return {**stack, "base": stack["base"].to(device), "weight": stack["weight"].to(device)}


def _delta(directions: Tensor, coefficients: Tensor) -> Tensor:
    return combine(coefficients.double(), directions.double()).to(coefficients.dtype)


def _plus(bound: BoundLayer, weight: Tensor, directions: Tensor, coefficients: Tensor) -> Tensor:
    """A weight in native layout with a rewrite on it. A float16 or bfloat16 weight is added to in the coefficients'
    float32 and rounded once."""
    delta = bound.to_native(_delta(directions, coefficients)).to(weight.device)
    return (weight + delta).to(weight.dtype)


def _check_untouched(bound: BoundLayer, stack: _Stack) -> None:
    if _holds(bound, stack["weight"]):
        return
    was, now = stack["weight"].dtype, bound.parameter.dtype
    tied = [
        name
        for name, module in bound.generator.named_modules()
        if module is not bound.module and hasattr(module, _STACK)
        if any(parameter is bound.parameter for parameter in module.parameters(recurse=False))
    ]
    if tied:
        reason = f"is shared with {tied[0]!r}, which has been rewritten too; revert that rewrite first, or use"
    elif was != now:
        reason = f"was {was} when a rewrite was applied and is {now} with other values now; restore it, or use"
    else:
        reason = "was changed by something else since a rewrite was applied; restore it, or use"
    raise MismatchError(
        f"The weight of {bound.name!r} {reason} revert(force=True) to go back to the weight recorded then."
    )


def _write(bound: BoundLayer, weight: Tensor) -> None:
    # a parameter made in inference mode can only be changed in inference mode
    with torch.inference_mode(bound.parameter.is_inference()), torch.no_grad():
        bound.parameter.copy_(weight)


class Rewrite:
    """A rank-R change of one layer's weight: ``W1 = W0 + Lambda D``.

    Attributes:
        directions: D, [R, I], orthonormal rows.
        coefficients: Lambda, [O, R, *kernel].
        losses: the loss before the first step, then one entry per step ("lm": before and after).
        final_loss: the loss of the finished change over the region it was fitted to, in float32 at least; None where
            nothing was fitted (zero). Applied, a float16 or bfloat16 weight is rounded, and a tight region has the rest
            of its map around it instead of zeros: the loss measured then differs by that.
        solver: what really ran: "lm", "closed_form", "adam", "projected", "unconstrained" or "zero".
        status: for "lm", how many output channels ended in each status; for "projected" and "unconstrained", how many
            ran as what: "fused" in one kernel call, or step by step through "autograd".
        seconds: wall time of each stage, none counted twice: "generator" (its forward passes up to the layer), "check"
            (whether the moment is the layer's; it has forward passes of its own), "directions", "goal", "preserve" and
            "fit".
        layer, rank, edit, box: the layer's name, R, the edit, the fitted box of the value map (where several regions
            are fitted, a tuple of theirs, picture by picture).
    """

    def __init__(
        self,
        layer: str,
        directions: Tensor,
        coefficients: Tensor,
        fitted_to: str,
        solver: str,
        losses: Sequence[float] = (),
        final_loss: float | None = None,
        edit: Edit | None = None,
        status: dict[str, int] | None = None,
        seconds: dict[str, float] | None = None,
        box: Box | tuple[Box, ...] | None = None,
        bound: BoundLayer | None = None,
    ):
        self.layer = layer
        self.directions = directions
        self.coefficients = coefficients
        self.fitted_to = fitted_to  # fingerprint of the weight the change was fitted to
        self.solver = solver
        self.losses = list(losses)
        self.final_loss = final_loss
        self.edit = edit
        self.status = status or {}
        self.seconds = seconds or {}
        self.box = box
        # where apply() acts by default comes last, after the other layers this is still applied to
        self._layers = [] if bound is None else [bound]
        self._entered: list[BoundLayer] = []  # one for each `with` block that is open

    def __getstate__(self) -> dict:
        """A copied or pickled rewrite knows no generator: it must not take a copy of one along."""
        return self.__dict__ | {"_layers": [], "_entered": []}

    @property
    def rank(self) -> int:
        return len(self.directions)

    def __repr__(self) -> str:
        loss = f", loss {self.losses[0]:.4g} -> {self.final_loss:.4g}" if self.losses else ""
        return f"Rewrite({self.layer!r}, rank {self.rank}, {self.solver}{loss})"

    def weight_delta(self) -> Tensor:
        """Lambda D, [O, I, *kernel], in the coefficients' dtype; of rank at most R as [O kh kw, I]."""
        return _delta(self.directions, self.coefficients)

    @property
    def _id(self) -> str:
        """What this change is, by its bits: a saved and loaded one, or a copy, is the same change."""
        return tensor_fingerprint(self.directions) + tensor_fingerprint(self.coefficients)

    def _bind(self, generator: nn.Module | BoundLayer) -> BoundLayer:
        bound = generator if isinstance(generator, BoundLayer) else bind(generator, self.layer)
        if bound.name != self.layer:
            raise MismatchError(f"This rewrite is of layer {self.layer!r}, not {bound.name!r}.")
        wanted = (self.coefficients.shape[0], self.directions.shape[1], *self.coefficients.shape[2:])
        if tuple(bound.weight.shape) != wanted:
            raise MismatchError(
                f"This rewrite changes a weight of shape {list(wanted)} and {self.layer!r} has "
                f"{list(bound.weight.shape)}; it was made for another generator."
            )
        return bound

    def _is_on(self, bound: BoundLayer) -> bool:
        stack = _stack_of(bound)
        return stack is not None and self._id in stack["rewrites"]

    @torch.inference_mode(False)  # what is kept on the module outlives the caller's inference mode
    def apply(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> Rewrite:
        """Change the weight in place; returns self. Rewrites stack, on one layer or on several.

        Args:
            generator: by default the one that the rewrite was made on, or applied to last.
            force: apply it also where the layer's weight is not the one it was fitted to (a finetuned copy). Rewrites
                that something else has changed the weight over are then part of it, and can no longer be reverted.

        Raises:
            MismatchError: the weight is not the one that this was fitted to, this or its equal is applied already, or
                the weight was changed by something else since other rewrites were applied.
            NonFiniteError: the weight would overflow its precision. Nothing is changed then.
        """
        if generator is None and not self._layers:
            raise MismatchError("This rewrite was loaded or copied; name the generator to change: apply(G).")
        bound = self._bind(self._layers[-1] if generator is None else generator)
        stack = _stack_of(bound)
        if stack is not None and self._id in stack["rewrites"]:
            raise MismatchError("This rewrite is applied already; revert it first.")
        if stack is not None and not force:
            _check_untouched(bound, stack)
        if stack is None or not _holds(bound, stack["weight"]):
            base = bound.parameter.detach().clone()
            stack = _Stack(base=base, weight=base, rewrites={})
        below = (bound._layer.canonical(stack[name].to(bound.parameter.dtype)) for name in ("base", "weight"))
        if not force and all(bound.weight_fingerprint(weight) != self.fitted_to for weight in below):
            raise MismatchError(
                f"The weight of {self.layer!r} is not the one this rewrite was fitted to (another model, or other "
                "edits below it); apply those first, or pass force=True."
            )
        record = self.directions.detach().clone(), self.coefficients.detach().clone()
        weight = _plus(bound, stack["weight"], *record)
        if not torch.isfinite(weight.to(bound.parameter.dtype)).all():
            raise NonFiniteError(
                f"With this rewrite the weight of {self.layer!r} would hold NaN or infinity in "
                f"{bound.parameter.dtype}, so nothing was changed; use a generator of a wider type."
            )
        bound.fold()
        _write(bound, weight)
        rewrites = stack["rewrites"] | {self._id: record}
        setattr(bound.module, _STACK, _Stack(base=stack["base"], weight=weight, rewrites=rewrites))
        self._layers = [other for other in self._layers if other.module is not bound.module and self._is_on(other)]
        self._layers.append(bound)
        return self

    @torch.inference_mode(False)
    def revert(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> Rewrite:
        """Undo :meth:`apply`, bit for bit; other rewrites on the layer stay. Returns self.

        A generator that was moved or cast since goes back to its original weight, moved or cast. Layers that share one
        weight are reverted in the opposite order of applying.

        Args:
            generator: where to revert, for instance a copy of a rewritten generator. By default the one that this
                object was last applied to and is still on: after apply(A) and apply(B), first B, then A.
            force: revert also where something else has changed the weight since, which is lost then.

        Raises MismatchError where this rewrite is not applied, or something else has changed the weight.
        """
        places = self._layers if generator is None else [self._bind(generator)]
        bound = next((place for place in reversed(places) if self._is_on(place)), None)
        if bound is None:
            raise MismatchError("This rewrite is not applied, so there is nothing to revert; on a copy, use revert(G).")
        stack = _stack_of(bound)
        if not force:
            _check_untouched(bound, stack)
        rest = {key: change for key, change in stack["rewrites"].items() if key != self._id}
        weight = stack["base"]
        for record in rest.values():
            weight = _plus(bound, weight, *record)
        _write(bound, weight)
        if rest:
            setattr(bound.module, _STACK, _Stack(base=stack["base"], weight=weight, rewrites=rest))
        else:
            delattr(bound.module, _STACK)
            bound.unfold()
        return self

    @property
    def applied(self) -> bool:
        """Whether this change is on a generator that this object was made on or applied to."""
        return any(map(self._is_on, self._layers))

    def __enter__(self) -> Rewrite:
        """Apply, unless it is applied already; leaving the outermost `with` block reverts in either case, so
        ``with change:`` and ``with change.apply(G):`` are alike."""
        if not (self._layers and self._is_on(self._layers[-1])):
            self.apply()
        self._entered.append(self._layers[-1])
        return self

    def __exit__(self, *_) -> None:
        bound = self._entered.pop()
        inner = any(outer.module is bound.module for outer in self._entered)
        if not inner and self._is_on(bound):
            self.revert(bound)

    # --- in the forms that other tools take

    def state_dict(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> dict[str, Tensor]:
        """The generator's plain state dict with this change in it (and those that are applied); a copy. The generator
        is left as it is. Of a generator in torch.compile or DataParallel it is that of the module inside.

        A weight that was computed (spectral norm, parametrizations) is in it under its plain name, as it is used: load
        it into the generator with that norm left out. Otherwise it loads where the original did.

        Arguments and errors are those of :meth:`apply`.
        """
        if generator is None and not self._layers:
            raise MismatchError("This rewrite was loaded or copied; name the generator: state_dict(G).")
        bound = self._bind(self._layers[-1] if generator is None else generator)
        on, places = self._is_on(bound), list(self._layers)
        if not on:
            self.apply(bound, force)
        try:
            state = {key: value.detach().clone() for key, value in bound.generator.state_dict().items()}
            name, weight = bound._layer.weight_name, bound.parameter.detach().clone()
        finally:
            if not on:
                self.revert(bound)
                self._layers = places
        prefix = f"{bound.name}." if bound.name else ""
        state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}parametrizations.{name}.")}
        return state | {f"{prefix}{name}": weight}

    def lora(self) -> tuple[Tensor, Tensor]:
        """The change as a LoRA-style pair (A, B), with B A = Lambda D and no further scale.

        Of a linear layer A is D, [R, I], and B is Lambda, [O, R]. Of a convolution with t taps A is [R t, I, *kernel],
        the weight of a convolution like the layer's, and B [O, R t, 1, ...], of a 1x1 one after it: rank R for 1x1
        layers.

        Raises SolverError for a grouped convolution, which uses parts of Lambda D only.
        """
        if any(bound.groups > 1 for bound in self._layers):
            raise SolverError(f"{self.layer!r} is a grouped convolution, which one pair of factors does not describe.")
        kernel = self.coefficients.shape[2:]
        taps = math.prod(kernel)
        one_hot = torch.eye(taps, dtype=self.directions.dtype, device=self.directions.device)
        a = torch.einsum("ri,st->rsit", self.directions, one_hot).reshape(self.rank * taps, -1, *kernel)
        return a, self.coefficients.reshape(len(self.coefficients), -1, *[1] * len(kernel)).clone()

    def parametrize(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> LowRankChange:
        """Register the change as a ``torch.nn.utils.parametrize`` parametrization instead of applying it.

        ``.enabled = False`` on what is returned switches it off, ``.remove()`` takes it off again;
        ``torch.nn.utils.parametrize.remove_parametrizations`` leaves it in the weight for good.

        Raises:
            MismatchError: as :meth:`apply`; and for a weight that is computed by a hook or a method.
        """
        if generator is None and not self._layers:
            raise MismatchError("This rewrite was loaded or copied; name the generator to change: parametrize(G).")
        bound = self._bind(self._layers[-1] if generator is None else generator)
        if self._is_on(bound):
            raise MismatchError("This rewrite is applied already; revert it first, or use either way alone.")
        if not force and bound.weight_fingerprint(bound.weight) != self.fitted_to:
            raise MismatchError(
                f"The weight of {self.layer!r} is not the one this rewrite was fitted to (another model, or other "
                "edits below it); apply those first, or pass force=True."
            )
        return attach(bound, self.directions, self.coefficients)

    def save(self, path: str | os.PathLike) -> None:
        """Write directions and coefficients as safetensors, with the layer, the fingerprint of the weight they
        were fitted to, the solver and the edit; all or nothing."""
        metadata = {
            "layer": self.layer,
            "rank": self.rank,
            "solver": self.solver,
            "weight_layout": "OIHW",
            "fitted_to": self.fitted_to,
            "loss": [self.losses[0], self.final_loss] if self.losses else [],
            "edit": None if self.edit is None else self.edit.to_json(),
        }
        tensors = {"directions": self.directions.cpu(), "coefficients": self.coefficients.cpu()}
        save_record(path, "rewrite", _VERSION, tensors, metadata)


def load_rewrite(path: str | os.PathLike) -> Rewrite:
    """Read a saved rewrite; ``load_rewrite(path).apply(G)`` changes G as the original did, bit for bit.

    Raises FileFormatError on a truncated or foreign file, MaskError or SelectionError on a bad edit in it.
    """
    name = os.fspath(path)
    tensors, metadata = load_record(path, "rewrite", _VERSION)
    directions, coefficients = tensors.get("directions"), tensors.get("coefficients")
    metadata = metadata if isinstance(metadata, dict) else {}
    texts = [metadata.get(field) for field in ("layer", "fitted_to", "solver")]
    losses, edit = metadata.get("loss", []), metadata.get("edit")
    if (
        directions is None
        or coefficients is None
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(losses, list)
        or not all(isinstance(loss, (int, float)) for loss in losses)
        or not isinstance(edit, str | None)
    ):
        raise FileFormatError(f"{name} is not a whole rewrite; make it again.")
    if directions.ndim != 2 or coefficients.ndim < 2 or coefficients.shape[1] != len(directions):
        raise FileFormatError(f"{name} holds directions and coefficients that do not match; make it again.")
    if not all(part.is_floating_point() and part.isfinite().all() for part in (directions, coefficients)):
        raise FileFormatError(f"{name} holds NaN, infinity or no floating-point numbers; make it again.")
    try:
        edit = None if edit is None else Edit.from_json(edit)
    except RewriteCoreError as error:
        raise type(error)(f"{name}: {error}") from error
    layer, fitted_to, solver = texts
    final_loss = losses[-1] if losses else None
    return Rewrite(layer, directions, coefficients, fitted_to, solver, losses, final_loss, edit)


# --- making changes --------------------------------------------------------------------------------------


class _Clock:
    """Wall time by stage; a stage within a stage counts for itself alone."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # what the open stage spent in others

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner
            self._inner = outer + took

    def watch(self, layer: BoundLayer) -> BoundLayer:
        """The same layer, whose forward passes of the generator are a stage of their own."""
        watched = copy.copy(layer)

        def capture(latents: Tensor) -> Capture:
            with self.stage("generator"):
                return layer.capture(latents)

        watched.capture = capture
        return watched


@contextlib.contextmanager
def _plain_arithmetic(layer: BoundLayer) -> Iterator[None]:
    """Whatever modes the caller is in: no autocast, which would round what is solved for, and no inference mode, whose
    tensors autograd refuses. The generator's own forward function may still set its own."""
    with contextlib.ExitStack() as modes:
        for kind in {"cpu", layer.parameter.device.type}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        yield


def _checked(edits: Iterable[Edit]) -> list[Edit]:
    if isinstance(edits, Edit):
        raise SelectionError("rewrite_many takes a list of edits, not one Edit; use rc.rewrite for one.")
    edits = list(edits)
    if not edits:
        raise SelectionError("There is no edit to make; give at least one.")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise SelectionError(f"An edit is an rc.Edit (rc.Edit.load reads a file), not {type(edit).__name__}.")
    return edits


def _directions(layer, moment, edit, latents, rank, method, quantiles: UnitQuantiles | None) -> Tensor:
    # GAN Dissection scores whole pictures: a unit at its maximum anywhere in them counts
    keys, weights = context_keys(layer, edit.keys, latents, inside_only=method != "units")
    moment = moment.within_groups(layer.groups)
    return context_directions(moment, keys, weights, rank=rank, method=method, quantiles=quantiles)


def _quantiles(layer, latents, method, progress) -> UnitQuantiles | None:
    return collect_unit_quantiles(layer, latents, progress=progress) if method == "units" else None


def _change(
    layer: BoundLayer, edit: Edit | None, directions: Tensor, coefficients: Tensor, fitted_to: str, **details
) -> Rewrite:
    """The change of `layer`, in float32 at least."""
    if not torch.isfinite(coefficients).all():
        raise NonFiniteError(
            f"The change of {layer.name!r} holds NaN or infinity; check the generator's weights at this layer."
        )
    dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
    return Rewrite(
        layer=layer.name,
        directions=directions.to(dtype),
        coefficients=coefficients.to(dtype),
        fitted_to=fitted_to,
        edit=edit,
        bound=layer,
        **details,
    )


def _solve_goals(
    layer, moment, edits, latents, make_goals, *, rank, solver, loss, method, preserve, steps, lr, project_every,
    project_gradient, progress, backend,
) -> list[Rewrite]:  # fmt: skip
    if solver not in SOLVERS:
        raise SolverError(f"There is no solver {solver!r}; choose from {list(SOLVERS)}.")
    if loss not in LOSSES:
        raise SolverError(f"There is no loss {loss!r}; choose from {list(LOSSES)}.")
    if not 0 <= preserve < float("inf"):
        raise RewriteCoreError(f"preserve is a finite weight of 0 or more, not {preserve}.")
    edits = _checked(edits)
    clock = _Clock()
    problems, boxes = [], []
    bound, layer = layer, clock.watch(layer)
    with _plain_arithmetic(layer):
        with clock.stage("check"):
            moment.check(bound, latents)
        if solver == "unconstrained":  # no directions: all input channels, whatever the rank and the context
            rows = torch.eye(layer.in_channels, device=layer.parameter.device)
        else:
            with clock.stage("directions"):
                quantiles = _quantiles(layer, latents, method, progress)
        for edit in edits:
            with clock.stage("goal"):
                goal, *more = make_goals(layer, edit)
            if solver != "unconstrained":
                with clock.stage("directions"):
                    rows = _directions(layer, moment, edit, latents, rank, method, quantiles)
            directions, generic = rows.to(goal.target), None
            if preserve and solver in ("lm", "adam"):  # the others refuse it
                with clock.stage("preserve"):
                    sample = latents[:_GENERIC_IMAGES]
                    generic = generic_second_moment(layer, directions, sample, moment.matrix())
            boxes.append(tuple(each.box for each in (goal, *more)) if more and goal.box else goal.box)
            problems.append(
                Problem(
                    layer, goal.capture, goal.target, directions, loss, float(preserve), generic,
                    tuple((each.capture, each.target) for each in more),
                )
            )  # fmt: skip
        with clock.stage("fit"):
            if solver == "lm":
                solutions = solve_lm(problems, backend)
            elif solver == "adam":
                solutions = [solve_adam(problem, steps, lr, progress) for problem in problems]
            elif solver == "projected":
                solutions = [
                    solve_projected(problem, steps, lr, project_every, project_gradient, progress, backend)
                    for problem in problems
                ]
            else:
                solutions = [solve_unconstrained(problem, steps, lr, progress, backend) for problem in problems]
        with clock.stage("check"):
            fitted_to = bound.weight_fingerprint(bound.weight)
        return [
            _change(
                bound, edit, problem.directions, solution.coefficients, fitted_to, solver=solution.solver,
                losses=solution.losses, final_loss=solution.final_loss, status=solution.status,
                seconds=dict(clock.seconds), box=box,
            )
            for edit, box, problem, solution in zip(edits, boxes, problems, solutions, strict=True)
        ]  # fmt: skip


def rewrite_many(
    layer: BoundLayer,
    moment: SecondMoment,
    edits: Sequence[Edit],
    latents: Tensor,
    *,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l1",
    method: str = "whitened",
    preserve: float = 0.0,
    tight: bool = True,
    alpha: bool = True,
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: bool = False,
    backend: str = "auto",
) -> list[Rewrite]:
    """Solve several edits of one layer, each against the weight as it is now; "lm" fits them in one batch.

    Arguments and errors are those of :func:`rewrite`. ``change.seconds`` holds the times of the whole batch.
    """
    return _solve_goals(
        layer, moment, edits, latents, lambda layer, edit: paste_goals(layer, edit, latents, tight, alpha),
        rank=rank, solver=solver, loss=loss, method=method, preserve=preserve, steps=steps, lr=lr,
        project_every=project_every, project_gradient=project_gradient, progress=progress, backend=backend,
    )  # fmt: skip


def rewrite(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l1",
    method: str = "whitened",
    preserve: float = 0.0,
    tight: bool = True,
    alpha: bool = True,
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Solve one edit: the rank-R change of the layer that makes the pasted region come out as the copied one.

    The generator is not changed until ``change.apply()`` (paper, section 3; algorithm in appendix D). An edit with
    several pastes has one change that is fitted to all of them: the loss is the mean over the pixels of all.

    Args:
        layer: from :func:`rewrite_core.bind`.
        moment: second moment of that layer's keys.
        edit: copy, paste and context; its selections index the rows of `latents`.
        latents: [N, ...], the set the edit was made on.
        rank: R, 1 to the number of key channels. "unconstrained" needs neither rank nor context.
        solver: "lm" (default), "projected" (the reference's algorithm), "adam", or "unconstrained".
        loss: "l1" (the reference's) or "l2", the mean over the region.
        method: how directions are found, see :func:`rewrite_core.context_directions`.
        preserve: weight of the paper's L_smooth, the mean squared change that the rewrite makes to the values of
            ordinary images before the activation, at the demodulation that the unchanged weight has; 0 is the
            reference's objective. For "lm" and "adam".
        tight: fit the pasted box, zero-padded at its edge, as the reference does; else the whole map. SolverError
            where the layer cannot be run so: other padding than zeros, or map sizes that are no multiples.
        alpha: composite through the copy's mask; else its bounding box.
        steps, lr, project_every, project_gradient: for the stepwise solvers.

    Raises:
        MismatchError: the moment is of another layer or model.
        SelectionError: a selection is missing, or two pastes of one picture overlap.
        MaskError, RankError, NonFiniteError, SolverError: as their names say.
    """
    return rewrite_many(
        layer, moment, [edit], latents,
        rank=rank, solver=solver, loss=loss, method=method, preserve=preserve, tight=tight, alpha=alpha, steps=steps,
        lr=lr, project_every=project_every, project_gradient=project_gradient, progress=progress, backend=backend,
    )[0]  # fmt: skip


def erase(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    units: int = 30,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l1",
    method: str = "whitened",
    preserve: float = 0.0,
    tight: bool = False,
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Solve an erasure: the pasted region should come out as if the `units` key channels most typical of the
    context were silent. Needs a paste, not a copy; otherwise like :func:`rewrite`, but for `tight`: the reference
    fits an erasure on the whole map, so that is the default."""
    return _solve_goals(
        layer, moment, [edit], latents, lambda layer, edit: erase_goals(layer, moment, edit, latents, units, tight),
        rank=rank, solver=solver, loss=loss, method=method, preserve=preserve, steps=steps, lr=lr,
        project_every=project_every, project_gradient=project_gradient, progress=progress, backend=backend,
    )[0]  # fmt: skip


def insert(
    layer: BoundLayer,
    moment: SecondMoment,
    keys: Tensor,
    values: Tensor,
    *,
    context: Tensor | None = None,
    weights: Tensor | None = None,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l2",
    method: str = "whitened",
    preserve: float = 0.0,
    steps: int = 2001,
    lr: float = 0.05,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Insert key -> value pairs directly (paper, eq. 6 to 9), without pictures: the rank-R change of a linear or 1x1
    layer that makes its output at `keys` come out as `values`. The language-model case: keys and values are vectors at
    tokens.

    Args:
        keys: rows [n, I], such as ``layer.keys(z)[0].T[positions]``.
        values: rows [n, O], what the layer should put out there, bias included.
        context: rows [m, I] that say where the rule applies, reduced to `rank` directions; by default `keys`.
        weights: of the rows that directions are made of, [m]; default 1.
        rank: R. With rank n, or with n = 1, and independent keys the values are met exactly.
        solver: "lm" (exact for "l2") or "adam". The others are those of :func:`rewrite`; preserve needs a linear or 1x1
            layer's second moment and nothing else.

    Raises:
        SolverError: the layer's output at a position depends on more than the key there.
        RewriteCoreError: shapes that do not fit. MismatchError, RankError, NonFiniteError: as their names say.
    """
    if solver not in ("lm", "adam"):
        raise SolverError(f"insert has the solvers 'lm' and 'adam', not {solver!r}.")
    if loss not in LOSSES:
        raise SolverError(f"There is no loss {loss!r}; choose from {list(LOSSES)}.")
    if not layer._layer.pointwise:
        raise SolverError(
            f"{layer.name!r} does not compute its value from one key vector (it has a kernel, a stride, padding or a "
            "style); use rc.rewrite with selections there, or insert at a linear or 1x1 layer."
        )
    clock = _Clock()
    with _plain_arithmetic(layer):
        moment.check(layer)
        for name, rows, channels in (("keys", keys, layer.in_channels), ("values", values, layer.out_channels)):
            if rows.ndim != 2 or rows.shape[1] != channels or len(rows) != len(keys) or len(rows) == 0:
                raise RewriteCoreError(f"{name} must be rows [{len(keys)}, {channels}], not {list(rows.shape)}.")
            if not torch.isfinite(rows).all():
                raise NonFiniteError(f"The {name} hold NaN or infinity.")
        with clock.stage("directions"):
            own = moment.within_groups(layer.groups)
            rows = context_directions(own, keys if context is None else context, weights, rank=rank, method=method)
        dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
        place = {"device": layer.parameter.device, "dtype": dtype}
        axes = [1] * (len(layer.kernel_size) - 1)
        maps = [part.detach().to(**place).T.reshape(1, part.shape[1], -1, *axes) for part in (keys, values)]
        directions, generic = rows.to(**place), None
        if preserve:
            generic = generic_second_moment(layer, directions, keys[:0], moment.matrix())
        problem = Problem(layer, Capture(maps[0]), maps[1], directions, loss, float(preserve), generic)
        with clock.stage("fit"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnderdeterminedWarning)  # to meet the values is the point here
            solution = solve_lm([problem], backend)[0] if solver == "lm" else solve_adam(problem, steps, lr, progress)
        with clock.stage("check"):
            fitted_to = layer.weight_fingerprint(layer.weight)
        return _change(
            layer, None, directions, solution.coefficients, fitted_to, solver=solution.solver, losses=solution.losses,
            final_loss=solution.final_loss, status=solution.status, seconds=dict(clock.seconds),
        )  # fmt: skip


def zero(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    rank: int = 1,
    amount: float = 0.0,
    method: str = "whitened",
) -> Rewrite:
    """The change that removes the weight's projection on the context's directions: ``Lambda = -W0 D^T``.

    `amount` adds that multiple of the projection of an all-ones weight in its place, as in the reference.
    """
    _checked([edit])
    clock = _Clock()
    with _plain_arithmetic(layer):
        with clock.stage("check"):
            moment.check(layer, latents)
            fitted_to = layer.weight_fingerprint(layer.weight)
        with clock.stage("directions"):
            watched = clock.watch(layer)
            quantiles = _quantiles(watched, latents, method, progress=False)
            rows = _directions(watched, moment, edit, latents, rank, method, quantiles)
        weight = layer.weight.double()
        change = amount * torch.ones_like(weight) - weight
        rows = rows.to(weight.device)
        parts = zip(change.chunk(layer.groups), rows.chunk(layer.groups, 1))
        coefficients = torch.cat([  # a group has its own part of the directions, orthonormal where it is all of them
            torch.einsum("oi...,ir->or...", part.unflatten(1, (layer.groups, -1))[:, j], torch.linalg.pinv(own))
            for j, (part, own) in enumerate(parts)
        ])  # fmt: skip
        return _change(layer, edit, rows, coefficients, fitted_to, solver="zero", seconds=clock.seconds)
