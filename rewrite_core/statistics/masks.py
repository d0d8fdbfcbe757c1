"""Masks of keys: which positions of a layer's maps count, where some are padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from ..errors import ArgumentError, RewriteCoreError

Mask: TypeAlias = "Tensor | Callable[[Tensor], Tensor]"
"""Booleans, or whole numbers of which 0 does not count: [N, *map] for N latents, or what makes them of a batch."""


def check_mask(mask: object, latents: Tensor) -> None:
    """Raises ArgumentError or RewriteCoreError where `mask` can be none of so many latents."""
    if mask is None or (callable(mask) and not isinstance(mask, Tensor)):
        return
    if not isinstance(mask, Tensor):
        raise ArgumentError(
            f"mask is a tensor [N, *map], or a function that makes one of a batch of latents, not "
            f"{type(mask).__name__}."
        )
    if mask.ndim == 0 or len(mask) != len(latents):
        raise RewriteCoreError(f"mask is {list(mask.shape)} for {len(latents)} latents; give a row for each.")


def batch_mask(mask: Mask | None, first: int, batch: Tensor) -> Tensor | None:
    """The mask of a batch, the latents from `first` on."""
    if mask is None or isinstance(mask, Tensor):
        return None if mask is None else mask[first : first + len(batch)]
    return mask(batch)


def positions_that_count(features: Tensor, mask: Tensor) -> Tensor:
    """`mask` as booleans [N, *map] on the device of features [N, C, *map].

    Raises ArgumentError for another type, RewriteCoreError for another shape.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(
            f"mask must be a tensor of booleans or whole numbers, 0 for what does not count, not {what}."
        )
    shape = (len(features), *features.shape[2:])
    if mask.shape != shape:
        raise RewriteCoreError(
            f"The mask of features {list(features.shape)} is {list(shape)}, a number for each position, not "
            f"{list(mask.shape)}."
        )
    return mask.to(features.device, non_blocking=True) != 0
