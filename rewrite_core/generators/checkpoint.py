"""A generator made from a checkpoint's state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, quoted

Module = TypeVar("Module", bound=nn.Module)


PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's


def without_prefixes(state: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """A state dict without the prefixes that wrappers of the generator put on all its keys, but for those with which a
    key is `wanted`."""
    state, left = dict(state), True
    while left:
        left = False
        for prefix in PREFIXES:
            if state and all(key.startswith(prefix) for key in state) and not any(map(wanted, state)):
                state, left = {key.removeprefix(prefix): value for key, value in state.items()}, True
    return state


def build(make: Callable[[], Module], state: Mapping[str, Tensor]) -> Module:
    """The module `make` describes, on the CPU and filled with a copy of `state`.

    The random numbers a fresh module starts with are never drawn, and no memory is taken before every shape is found to
    be that of a tensor in `state`. Raises FileFormatError naming the first key of `state` that is missing, unexpected
    or of a wrong shape.
    """
    model = described(make)
    check_state(model, state)
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def described(make: Callable[[], Module]) -> Module:
    """The module that `make` describes, on the meta device: shapes, and no memory. Raises FileFormatError where
    there are no such shapes."""
    try:
        with torch.device("meta"):
            return make()
    except RuntimeError as error:  # more numbers than torch counts
        raise FileFormatError(f"The shapes of this checkpoint do not go together ({error}).") from error


def check_state(model: nn.Module, state: Mapping[str, Tensor], optional: str = "") -> None:
    """Raises FileFormatError where `state` does not have the keys and shapes of a model (on the meta device). Keys that
    begin with `optional` may be missing, all of them."""
    expected = model.state_dict()
    if optional and not any(key.startswith(optional) for key in state):
        expected = {key: value for key, value in expected.items() if not key.startswith(optional)}
    kind = type(model).__name__
    for key, value in expected.items():
        if key not in state:
            raise FileFormatError(
                f"{quoted(key)} is missing from the {kind} checkpoint; give the whole state dict as published."
            )
        if state[key].shape != value.shape:
            raise FileFormatError(
                f"{quoted(key)} has shape {list(state[key].shape)} where the other shapes of the {kind} "
                f"checkpoint ask for {list(value.shape)}; give the state dict as published."
            )
    for key in state:
        if key not in expected:
            raise FileFormatError(
                f"{quoted(key)} does not belong in a {kind} checkpoint; give the generator's state dict alone."
            )


def size_of(state: Mapping[str, Tensor], key: str, axis: int, ndim: int) -> int:
    """The size of a tensor in `state` that has `ndim` axes. Raises FileFormatError where it has others, or is empty."""
    if state[key].ndim != ndim:
        raise FileFormatError(f"{quoted(key)} must have {ndim} dimensions, got {list(state[key].shape)}.")
    if not state[key].numel():
        raise FileFormatError(
            f"{quoted(key)} is empty ({list(state[key].shape)}); give the whole state dict as published."
        )
    return state[key].shape[axis]
