"""The parts of a step that kernels share: products with the directions, and Adam's update."""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops.fit_projected_op.problem import BETA1, BETA2, EPSILON

RANKS = 16  # directions of a tile
_RANKS = tl.constexpr(RANKS)
# one minus a rounded beta would be off by 5e-5
_REST1, _BETA2, _REST2, _EPSILON = map(tl.constexpr, (1 - BETA1, BETA2, 1 - BETA2, EPSILON))


@triton.jit
def turned(directions, part, i, inputs):
    """Directions part, part + 1, ... at inputs i: [RANKS, inputs]."""
    rank = part + tl.arange(0, _RANKS)
    return tl.load(directions + rank[:, None] * inputs + i[None, :])


@triton.jit
def parts_of(array, channel, tap, part, ranks, weights, inputs):
    """Where coefficients part, part + 1, ... of these channels and a tap are in an array [channels, taps, ranks]."""
    rank = part + tl.arange(0, _RANKS)
    taps = weights // inputs
    return array + (channel[:, None].to(tl.int64) * taps + tap) * ranks + rank[None, :]


@triton.jit
def spread(
    array, directions, channel, tap, i, ranks, weights, inputs,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The directions times an array [channels, taps, ranks] of coefficients, at a tap's inputs i."""
    total = tl.zeros((CHANNELS, ROWS), tl.float32)
    for part in range(0, ranks, _RANKS):
        some = tl.load(parts_of(array, channel, tap, part, ranks, weights, inputs))
        total = tl.dot(some, turned(directions, part, i, inputs), total, input_precision=PRECISION)
    return total


@triton.jit
def descend(mean, power, before, gradient, rate, correction):
    """Adam's step of a tile of weights: its new mean, power and change."""
    mean += _REST1 * (gradient - mean)
    power = _BETA2 * power + _REST2 * gradient * gradient
    return mean, power, before - rate * mean / (tl.sqrt_rn(power) * correction + _EPSILON)
