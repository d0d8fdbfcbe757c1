"""The two kernels for directions: the projection of the change, and the gradient's products with the directions."""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import RANKS, parts_of, spread, turned

_RANKS = tl.constexpr(RANKS)


@triton.jit(do_not_specialize=["ranks"])
def project_kernel(
    change,  # [channels, taps, inputs]
    directions,  # [ranks, inputs], padded with zeros to whole tiles
    combined,  # [channels, taps, ranks]: the change's products with the directions: the coefficients
    weights,
    inputs,
    ranks,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some channels of a tap: their change becomes its projection on the directions."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.program_id(1)
    own = change + channel[:, None].to(tl.int64) * weights + tap * inputs
    for part in range(0, ranks, _RANKS):
        some = tl.zeros((CHANNELS, _RANKS), tl.float32)
        for start in range(0, inputs, ROWS):
            i = start + tl.arange(0, ROWS)
            tile = tl.trans(turned(directions, part, i, inputs))
            some = tl.dot(tl.load(own + i[None, :]), tile, some, input_precision=PRECISION)
        tl.store(parts_of(combined, channel, tap, part, ranks, weights, inputs), some)
    tl.debug_barrier()  # all have read the change, and all coefficients are there
    for start in range(0, inputs, ROWS):
        i = start + tl.arange(0, ROWS)
        new = spread(combined, directions, channel, tap, i, ranks, weights, inputs, CHANNELS, ROWS, PRECISION)
        tl.store(own + i[None, :], new)


@triton.jit(do_not_specialize=["ranks"])
def lean_kernel(
    slopes,
    bend,
    change,
    weight,
    square,
    directions,
    basis,  # [taps, ranks, width]: the directions' maps
    leaning,  # [channels, taps, ranks]: the gradient's products with the directions
    weights,
    inputs,
    ranks,
    width,
    DEMODULATED: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some channels of a tap: the gradient's products with the directions, without the gradient."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.program_id(1)
    own = channel[:, None].to(tl.int64) * weights + tap * inputs
    for part in range(0, ranks, _RANKS):
        row = tap * ranks + part + tl.arange(0, _RANKS)
        turn = tl.zeros((CHANNELS, _RANKS), tl.float32)
        for first in range(0, width, PIXELS):
            p = first + tl.arange(0, PIXELS)
            tile = tl.trans(tl.load(basis + row[:, None].to(tl.int64) * width + p[None, :]))
            steep = tl.load(slopes + channel[:, None].to(tl.int64) * width + p[None, :])
            turn = tl.dot(steep, tile, turn, input_precision=PRECISION)
        if DEMODULATED:
            slant = tl.zeros((CHANNELS, _RANKS), tl.float32)
            for start in range(0, inputs, ROWS):
                i = start + tl.arange(0, ROWS)
                whole = tl.load(weight + own + i[None, :]) + tl.load(change + own + i[None, :])
                tile = tl.trans(turned(directions, part, i, inputs))
                slant = tl.dot(tl.load(square + i)[None, :] * whole, tile, slant, input_precision=PRECISION)
            turn += tl.load(bend + channel)[:, None] * slant
        tl.store(parts_of(leaning, channel, tap, part, ranks, weights, inputs), turn)
