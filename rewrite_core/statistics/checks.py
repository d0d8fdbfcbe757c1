"""What public functions are given, told apart before it is used: each raises ArgumentError with what to pass
instead."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers.bound import BoundLayer


def what_is(given: object) -> str:
    """What was given in place of something else, for a message."""
    return f"the generator ({type(given).__name__})" if isinstance(given, nn.Module) else type(given).__name__


def check_layer(layer: BoundLayer) -> None:
    """Raises ArgumentError for anything but a bound layer."""
    if not isinstance(layer, BoundLayer):
        raise ArgumentError(f"layer is what rc.bind(generator, name) returns, not {what_is(layer)}.")


def check_keys(keys: Tensor, name: str = "keys") -> None:
    """Raises ArgumentError for anything but a floating-point tensor."""
    if not isinstance(keys, Tensor) or not keys.is_floating_point():
        what = keys.dtype if isinstance(keys, Tensor) else what_is(keys)
        raise ArgumentError(f"{name} must be a floating-point tensor of key vectors, not {what}: use torch.as_tensor.")
