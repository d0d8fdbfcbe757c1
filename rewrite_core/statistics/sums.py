"""What one update adds to a second moment: the sum over its keys, and a note of what is in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import ArgumentError, NonFiniteError, RewriteCoreError
from . import blocks
from .masks import positions_that_count


def square(matrix: Tensor) -> Tensor:
    """The squared Frobenius norm, without a matrix of squares."""
    return torch.dot(matrix.flatten(), matrix.flatten())


@dataclass(frozen=True)
class Keys:
    """What is known of an update's features [images, C, *map] before anything is computed."""

    dtype: torch.dtype
    skip_nonfinite: bool


@dataclass(frozen=True)
class Note:
    """What is in an update: whether its sum is finite, that sum's squared norm, how many images were left out for NaN
    or infinity, the largest magnitude of a feature that was summed, and how many keys were."""

    finite: bool
    square: float
    bad: int
    largest: float
    count: int

    @classmethod
    def read(cls, numbers: Tensor) -> Note:
        """From the five numbers that :func:`measured` leaves, float64 [5]; waits for them where they are on a GPU."""
        finite, square, bad, largest, count = numbers.tolist()
        return cls(bool(finite), square, int(bad), largest, int(count))

    def check(self, keys: Keys) -> None:
        """Raises NonFiniteError where the sum is not finite."""
        if self.finite:
            return
        if math.isfinite(self.largest):
            raise NonFiniteError(
                f"The features are as large as {self.largest:.0e} and their squares overflow {keys.dtype}; "
                "scale them down or pass them as float64."
            )
        raise NonFiniteError(
            "The features hold NaN or infinity; leave those images out with skip_nonfinite=True.",
            advice={"skip_nonfinite": True},
        )


def checked(features: Tensor, channels: int) -> Tensor:
    """`features`, detached, where they are [N, channels, *map]."""
    if not isinstance(features, Tensor):
        raise ArgumentError(f"Features must be a torch tensor, not {type(features).__name__}; use torch.as_tensor.")
    if features.is_nested:
        raise ArgumentError("Features must be a plain tensor, not a nested one; update with its parts, one at a time.")
    if features.ndim < 2 or features.shape[1] != channels:
        raise RewriteCoreError(
            f"This second moment takes features [N, {channels}, *map] or [N, {channels}], not {list(features.shape)}."
        )
    return features.detach()


def masked(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of the features [N, C, *map] that is zero where `mask` [N, *map] is, and how many positions of each image
    count, int64 [N], on the features' device.

    Zeros add nothing to a sum, so nothing has to be gathered, and a GPU is not waited for.
    """
    counting = positions_that_count(features, mask)
    counts = counting.view(len(counting), -1).sum(1)
    return features.masked_fill(counting.logical_not()[:, None], 0), counts


def sum_of(features: Tensor, groups: int) -> Tensor:
    """The sum over the keys of features [N, C, *map], float64 [C, C], or [G, C/G, C/G] within several groups. The
    operation takes rows and images."""
    maps = features.flatten(2)[..., None] if features.ndim == 3 or features.ndim > 4 else features
    return ops.second_moment(maps, groups=groups)


def is_finite(part: Tensor) -> Tensor:
    """Whether a sum is finite: exactly when every channel's sum of squares is."""
    return blocks.diagonal(part).isfinite().all()


def positions(features: Tensor) -> int:
    """How many keys one image of features [N, C, *map] has."""
    return math.prod(features.shape[2:])


def measured(features: Tensor, counts: Tensor | None, skip_nonfinite: bool, groups: int) -> tuple[Tensor, Tensor]:
    """:func:`sum_of` an update's keys, and the numbers of its :class:`Note`, float64 [5].

    `counts` are the positions of each image that count, where not all do; the others are zero.
    All on the features' device, whose results are not waited for: so images are not left out but set to zero.
    """
    with torch.autocast(features.device.type, enabled=False):  # it would widen 16-bit features
        axes = tuple(range(1, features.ndim))
        if features.numel():
            largest = torch.linalg.vector_norm(features, math.inf, axes)  # one read; NaN stays
        else:
            largest = features.new_zeros(len(features))
        good = largest.isfinite()
        bad = good.logical_not()
        if skip_nonfinite:
            features = features.masked_fill(bad.view(-1, *[1 for _ in axes]), 0)
            largest = largest.masked_fill(bad, 0)
        part = sum_of(features, groups)
        finite = is_finite(part)
        largest = largest.max() if len(largest) else finite
        count = good.sum() * positions(features) if counts is None else (good * counts).sum()
        numbers = (finite, square(part), bad.sum(), largest, count)
        return part, torch.stack([each.double() for each in numbers])
