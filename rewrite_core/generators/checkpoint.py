"""A generator made from a checkpoint's state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import FileFormatError

Module = TypeVar("Module", bound=nn.Module)


def build(make: Callable[[], Module], state: Mapping[str, Tensor]) -> Module:
    """The module `make` describes, on the CPU and filled with a copy of `state`.

    The random numbers a fresh module starts with are never drawn. Raises FileFormatError naming the
    first key of `state` that is missing, unexpected or of a wrong shape.
    """
    with torch.device("meta"):
        model = make()
    expected = model.state_dict()
    kind = type(model).__name__
    for key, value in expected.items():
        if key not in state:
            raise FileFormatError(
                f"{key!r} is missing from the {kind} checkpoint; give the whole state dict as published."
            )
        if state[key].shape != value.shape:
            raise FileFormatError(
                f"{key!r} has shape {list(state[key].shape)} where the other shapes of the {kind} "
                f"checkpoint ask for {list(value.shape)}; give the state dict as published."
            )
    for key in state:
        if key not in expected:
            raise FileFormatError(
                f"{key!r} does not belong in a {kind} checkpoint; give the generator's state dict alone."
            )
    model.to_empty(device="cpu").load_state_dict(state)
    return model
