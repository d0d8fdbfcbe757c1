"""What is on one module's weight: the rewrites, and the weight before and after them.

Kept as an attribute of the module itself: no global state, and it is copied, pickled and dropped with the module. Plain
containers of plain tensors, so that none of that needs this library, a Rewrite or its generator.

A write is recorded before it is made, beside what was recorded before it. So an interrupt at any moment leaves a record
that says what is on the weight: the weight itself tells which of the two it is (:func:`read`).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapters.base import LayerAdapter
from ..errors import MismatchError, NonFiniteError
from ..layers.bound import BoundLayer
from ..layers.memory import blocks
from ..ops.finite import all_finite
from ..solvers.problem import combine

NAME = "_rewrite_core_stack"
_CACHED = 1 << 19  # numbers: float64 products of so many or fewer stay in the cache


class Change(NamedTuple):
    """One rewrite on a weight: W0 + strength Lambda D. protected: rows [k, I] that later ones must keep, too."""

    directions: Tensor
    coefficients: Tensor
    strength: float
    protected: Tensor | None = None


class Stack(TypedDict, total=False):
    """The record on a module."""

    base: Tensor  # the weight before the first rewrite, as the module stored it then
    weight: Tensor  # the weight with all of them, to notice when something else changes it
    rewrites: dict[str, tuple]  # content id: the fields of a Change, in the order applied
    before: Stack | None  # while a write is made: what was recorded before it (None: nothing)


def delta(directions: Tensor, coefficients: Tensor, strength: float = 1.0) -> Tensor:
    """strength Lambda D, [O, I, *kernel], computed in float64, in the coefficients' dtype."""
    outputs, _, *kernel = coefficients.shape
    result = coefficients.new_empty(outputs, directions.shape[1], *kernel)
    for block in blocks(result, _CACHED):
        part = combine(coefficients[block].double(), directions.double())
        result[block] = part if strength == 1 else strength * part
    return result


def plus(bound: BoundLayer, weight: Tensor, change: Change) -> Tensor:
    """A weight in native layout with a change on it. A float16 or bfloat16 weight is added to in the coefficients'
    float32 and rounded once."""
    added = bound.to_native(delta(*change[:3])).to(weight.device)
    wide = added.dtype == torch.promote_types(added.dtype, weight.dtype)
    return (added.add_(weight) if wide else weight + added).to(weight.dtype)


# --- one thread at a time, and nothing derived is left -------------------------------------------------------------

_guard = threading.Lock()
_locks: weakref.WeakValueDictionary[tuple, Any] = weakref.WeakValueDictionary()  # those in use


def _lock(place: tuple) -> Any:
    with _guard:
        return _locks.setdefault(place, threading.RLock())


def module_lock(module: nn.Module) -> Any:
    """The lock of a module. With it held, this thread alone folds the weight and reads and writes the record.

    A plain lock, to be taken in the ``with`` statement itself: an interrupt could come between a Python function that
    takes it and the block.
    """
    return _lock(("module", id(module)))


def weight_lock(layer: LayerAdapter) -> Any:
    """The lock of the memory of a stored weight, which other modules may share; to be taken after the module's."""
    if layer.computed is not None:
        return module_lock(layer.module)
    return _lock(("memory", layer.weight.untyped_storage().data_ptr()))


def clear_derived() -> None:
    """Drop what torch keeps of weights as they were: autocast's casts, and what ``parametrize.cached()`` computed."""
    torch.clear_autocast_cache()
    getattr(parametrize, "_cache", {}).clear()


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Afterwards nothing is left that was derived from the weight as it was."""
    try:
        yield
    finally:
        clear_derived()


# --- the record ------------------------------------------------------------------------------------------------------


def holds(bound: BoundLayer, weight: Tensor) -> bool:
    """Whether the layer's parameter is `weight`, wherever the generator was moved or cast to since."""
    parameter = bound.parameter.detach()
    return torch.equal(parameter, weight.to(parameter))


def read(bound: BoundLayer) -> Stack | None:
    """What is on the layer's weight, on the weight's device; None where nothing is, or where the weight has been put
    back by other means (load_state_dict)."""
    stack: Stack | None = getattr(bound.module, NAME, None)
    if stack is not None and "before" in stack and not holds(bound, stack["weight"]):
        stack = stack["before"]  # the write was not made
    if stack is None or not stack["rewrites"]:
        return None
    if holds(bound, stack["base"]) and not holds(bound, stack["weight"]):
        return None
    device = bound.parameter.device
    return {**stack, "base": stack["base"].to(device), "weight": stack["weight"].to(device)}


def changes(stack: Stack) -> dict[str, Change]:
    """The rewrites of a record, in order; those that an earlier version recorded have strength 1."""
    return {key: Change(*fields[:2], *(fields[2:] or (1.0,))) for key, fields in stack["rewrites"].items()}


def protected(bound: BoundLayer) -> list[Tensor]:
    """What the rewrites on the layer's weight protect: rows [k, I] of each that protects something."""
    if not hasattr(bound.module, NAME):
        return []
    with module_lock(bound.module), weight_lock(bound._adapter):
        stack = read(bound)
    own = [] if stack is None else [change.protected for change in changes(stack).values()]
    return [rows for rows in own if rows is not None]


def settle(bound: BoundLayer) -> Stack | None:
    """:func:`read`, and what an interrupt left half done on the module is finished or undone."""
    stack: Stack | None = getattr(bound.module, NAME, None)
    if stack is not None and ("before" in stack or not stack["rewrites"]):
        found = read(bound)
        if found is None:
            _clear(bound)
        else:
            setattr(bound.module, NAME, {key: found[key] for key in ("base", "weight", "rewrites")})
    return read(bound)


def _clear(bound: BoundLayer) -> None:
    bound.unfold()
    if hasattr(bound.module, NAME):
        delattr(bound.module, NAME)


def write(bound: BoundLayer, base: Tensor, weight: Tensor, rewrites: dict[str, Change]) -> None:
    """Make the layer's parameter `weight`, which is `base` with `rewrites` on it; without any, nothing is left on the
    module. Call it inside :func:`writing`, with the locks held, after :func:`settle`."""
    record = {key: tuple(change) for key, change in rewrites.items()}
    stack: Stack = {"base": base, "weight": weight, "rewrites": record}
    setattr(bound.module, NAME, {**stack, "before": getattr(bound.module, NAME, None)})
    if rewrites:
        bound.fold()
    # a parameter made in inference mode can only be changed in inference mode
    with torch.inference_mode(bound.parameter.is_inference()), torch.no_grad():
        bound.parameter.copy_(weight)
    if rewrites:
        setattr(bound.module, NAME, stack)
    else:
        _clear(bound)


def check_untouched(bound: BoundLayer, stack: Stack, remedy: str) -> None:
    """Raise MismatchError, which ends in `remedy`, where something else has changed the weight since the record was
    made."""
    if holds(bound, stack["weight"]):
        return
    was, now = stack["weight"].dtype, bound.parameter.dtype
    tied = [
        name
        for name, module in bound.generator.named_modules()
        if module is not bound.module and hasattr(module, NAME)
        if any(parameter is bound.parameter for parameter in module.parameters(recurse=False))
    ]
    if tied:
        reason = f"is shared with {tied[0]!r}, which has been rewritten too; revert that rewrite first"
    elif was != now:
        reason = f"was {was} when a rewrite was applied and is {now} with other values now"
    else:
        reason = "was changed by something else since a rewrite was applied (trained, or loaded over)"
    raise MismatchError(f"The weight of {bound.name!r} {reason}; {remedy}.", advice={"force": True})


def check_stored(bound: BoundLayer) -> None:
    """Raise MismatchError where the weight became computed over the rewrites: what is written to it would be lost."""
    computed = bound._adapter.computed
    if computed is not None and not computed.folded:
        raise MismatchError(
            f"The weight of {bound.name!r} is computed by a parametrization or norm that was put on it after this "
            "rewrite was applied; take that off first."
        )


def check_finite(bound: BoundLayer, weight: Tensor) -> None:
    """Raise NonFiniteError where `weight` overflows the parameter's precision."""
    if not all_finite(weight.to(bound.parameter.dtype)):
        raise NonFiniteError(
            f"With this rewrite the weight of {bound.name!r} would hold NaN or infinity in "
            f"{bound.parameter.dtype}, so nothing was changed; use a generator of a wider type."
        )
