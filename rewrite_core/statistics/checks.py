"""What public functions are given, told apart before it is used: each raises ArgumentError with what to pass
instead."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers.binding import BoundLayer
from ..layers.latents import check_latents
from .second_moment import SecondMoment


def _what(given: object) -> str:
    return f"the generator ({type(given).__name__})" if isinstance(given, nn.Module) else type(given).__name__


def check_inputs(layer: BoundLayer, moment: SecondMoment, latents: Tensor | None = None) -> None:
    """The first arguments that the functions of an edit have in common; no latents, no check of them."""
    check_layer(layer)
    check_moment(moment)
    if latents is not None:
        check_latents(latents)


def check_layer(layer: BoundLayer) -> None:
    if not isinstance(layer, BoundLayer):
        raise ArgumentError(f"layer is what rc.bind(generator, name) returns, not {_what(layer)}.")


def check_moment(moment: SecondMoment) -> None:
    if not isinstance(moment, SecondMoment):
        raise ArgumentError(
            f"moment is what rc.collect_second_moment(layer, latents) returns, or rc.SecondMoment.load(path), not "
            f"{_what(moment)}."
        )


def check_keys(keys: Tensor, name: str = "keys") -> None:
    if not isinstance(keys, Tensor) or not keys.is_floating_point():
        what = keys.dtype if isinstance(keys, Tensor) else _what(keys)
        raise ArgumentError(f"{name} must be a floating-point tensor of key vectors, not {what}: use torch.as_tensor.")
