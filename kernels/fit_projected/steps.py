"""The parts of a step: gradient, Adam's update, projection, outputs and loss of a program's channels."""

from __future__ import annotations

import triton
import triton.language as tl

from ...ops.fit_projected_op.problem import BETA1, BETA2, EPSILON
from .structs import own_channels, own_rows

RANKS = 16  # directions of a tile
_RANKS = tl.constexpr(RANKS)
# one minus a rounded beta would be off by 5e-5
_REST1, _BETA2, _REST2, _EPSILON = map(tl.constexpr, (1 - BETA1, BETA2, 1 - BETA2, EPSILON))


@triton.jit
def weight_rows(given, row, mode):
    """The layer's own weights of these rows."""
    channel, there = own_channels(given, mode)
    at = row[:, None].to(tl.int64) * given.channels + channel[None, :]
    return tl.load(given.weight + at, mask=there[None, :], other=0.0)


@triton.jit
def map_rows(maps, row, p, width):
    """Pixels p of these rows of maps [rows, width]."""
    return tl.load(maps + row[:, None].to(tl.int64) * width + p[None, :])


@triton.jit
def outputs(maps, array, rows, first, given, COUNT: tl.constexpr, mode):
    """sum over rows of maps[row, p] array[row, c] for a tile of pixels from `first` on."""
    total = tl.zeros((mode.PIXELS, mode.CHANNELS), tl.float32)
    p = first + tl.arange(0, mode.PIXELS)
    for start in range(0, rows, COUNT):
        tile = map_rows(maps, start + tl.arange(0, COUNT), p, given.width)
        part = tl.load(own_rows(array, start, COUNT, mode))
        total = tl.dot(tl.trans(tile), part, total, input_precision=mode.PRECISION)
    return total


@triton.jit
def clear(given, state, mode):
    for start in range(0, given.taps * given.inputs, mode.ROWS):
        zeros = tl.zeros((mode.ROWS, mode.CHANNELS), tl.float32)
        tl.store(own_rows(state.change, start, mode.ROWS, mode), zeros)
        tl.store(own_rows(state.mean, start, mode.ROWS, mode), zeros)
        tl.store(own_rows(state.power, start, mode.ROWS, mode), zeros)
    tl.debug_barrier()


@triton.jit
def lean(given, state, bend, mode):
    """The gradient's products with the directions, without the gradient."""
    for part in range(0, given.taps * given.ranks, _RANKS):
        tap = part // given.ranks
        rank = part - tap * given.ranks + tl.arange(0, _RANKS)
        turn = tl.zeros((_RANKS, mode.CHANNELS), tl.float32)
        for first in range(0, given.pixels, mode.PIXELS):
            p = first + tl.arange(0, mode.PIXELS)
            tile = map_rows(given.basis, part + tl.arange(0, _RANKS), p, given.width)
            slopes = tl.load(own_rows(state.slopes, first, mode.PIXELS, mode))
            turn = tl.dot(tile, slopes, turn, input_precision=mode.PRECISION)
        if mode.DEMODULATED:
            slant = tl.zeros((_RANKS, mode.CHANNELS), tl.float32)
            for start in range(0, given.inputs, mode.ROWS):
                i = start + tl.arange(0, mode.ROWS)
                tile = tl.load(given.directions + rank[:, None] * given.inputs + i[None, :])
                whole = weight_rows(given, tap * given.inputs + i, mode)
                whole += tl.load(own_rows(state.change, tap * given.inputs + start, mode.ROWS, mode))
                weighted = tl.load(given.square + i)[:, None] * whole
                slant = tl.dot(tile, weighted, slant, input_precision=mode.PRECISION)
            turn += bend[None, :] * slant
        tl.store(own_rows(state.leaning, part, _RANKS, mode), turn)
    tl.debug_barrier()


@triton.jit
def spread(array, start, given, mode):
    """The directions times an array [taps, ranks] of coefficients: a tile of weights from `start` on."""
    tap = start // given.inputs
    i = start - tap * given.inputs + tl.arange(0, mode.ROWS)
    total = tl.zeros((mode.ROWS, mode.CHANNELS), tl.float32)
    for part in range(0, given.ranks, _RANKS):
        rank = part + tl.arange(0, _RANKS)
        turned = tl.load(given.directions + rank[None, :] * given.inputs + i[:, None])
        some = tl.load(own_rows(array, tap * given.ranks + part, _RANKS, mode))
        total = tl.dot(turned, some, total, input_precision=mode.PRECISION)
    return total


@triton.jit
def gradient_rows(given, state, start, mode):
    """The gradient of a tile of weights but for demodulation's part, and their maps where all pixels are one tile."""
    row = start + tl.arange(0, mode.ROWS)
    gradient = tl.zeros((mode.ROWS, mode.CHANNELS), tl.float32)
    tile = tl.zeros((mode.ROWS, mode.PIXELS), tl.float32)
    if mode.PROJECTS_GRADIENT:
        gradient = spread(state.leaning, start, given, mode)
        if mode.ONE_TILE:
            tile = map_rows(given.maps, row, tl.arange(0, mode.PIXELS), given.width)
    else:
        for first in range(0, given.pixels, mode.PIXELS):
            tile = map_rows(given.maps, row, first + tl.arange(0, mode.PIXELS), given.width)
            slopes = tl.load(own_rows(state.slopes, first, mode.PIXELS, mode))
            gradient = tl.dot(tile, slopes, gradient, input_precision=mode.PRECISION)
    return gradient, tile


@triton.jit
def update(given, state, step, bend, total, mode):
    """Adam's step for all weights; returns `total` and, where all pixels are one tile, their outputs."""
    rate = tl.load(given.rates + 2 * (step - 1))
    correction = tl.load(given.rates + 2 * (step - 1) + 1)
    for start in range(0, given.taps * given.inputs, mode.ROWS):
        row = start + tl.arange(0, mode.ROWS)
        gradient, tile = gradient_rows(given, state, start, mode)
        before = tl.load(own_rows(state.change, start, mode.ROWS, mode))
        if mode.DEMODULATED:
            if not mode.PROJECTS_GRADIENT:
                i = row - start // given.inputs * given.inputs
                whole = before + weight_rows(given, row, mode)
                gradient += bend[None, :] * tl.load(given.square + i)[:, None] * whole
        mean = tl.load(own_rows(state.mean, start, mode.ROWS, mode))
        power = tl.load(own_rows(state.power, start, mode.ROWS, mode))
        mean += _REST1 * (gradient - mean)
        power = _BETA2 * power + _REST2 * gradient * gradient
        after = before - rate * mean / (tl.sqrt_rn(power) * correction + _EPSILON)
        tl.debug_barrier()  # a number may be held by several threads: all have read it before one writes
        tl.store(own_rows(state.mean, start, mode.ROWS, mode), mean)
        tl.store(own_rows(state.power, start, mode.ROWS, mode), power)
        tl.store(own_rows(state.change, start, mode.ROWS, mode), after)
        if mode.ONE_TILE:
            total = tl.dot(tl.trans(tile), after, total, input_precision=mode.PRECISION)
    tl.debug_barrier()
    return total


@triton.jit
def project(given, state, mode):
    """The change becomes its projection on the directions, and state.combined its coefficients."""
    for part in range(0, given.taps * given.ranks, _RANKS):
        tap = part // given.ranks
        rank = part - tap * given.ranks + tl.arange(0, _RANKS)
        some = tl.zeros((_RANKS, mode.CHANNELS), tl.float32)
        for start in range(0, given.inputs, mode.ROWS):
            i = start + tl.arange(0, mode.ROWS)
            tile = tl.load(given.directions + rank[:, None] * given.inputs + i[None, :])
            own = tl.load(own_rows(state.change, tap * given.inputs + start, mode.ROWS, mode))
            some = tl.dot(tile, own, some, input_precision=mode.PRECISION)
        tl.store(own_rows(state.combined, part, _RANKS, mode), some)
    tl.debug_barrier()
    for start in range(0, given.taps * given.inputs, mode.ROWS):
        tl.store(own_rows(state.change, start, mode.ROWS, mode), spread(state.combined, start, given, mode))
    tl.debug_barrier()


@triton.jit
def demodulate(given, state, mode):
    """m, by which the linear output of each channel is multiplied."""
    m = tl.full((mode.CHANNELS,), 1.0, tl.float32)
    if mode.DEMODULATED:
        norm = tl.zeros((mode.ROWS, mode.CHANNELS), tl.float32)
        for start in range(0, given.taps * given.inputs, mode.ROWS):
            row = start + tl.arange(0, mode.ROWS)
            whole = tl.load(own_rows(state.change, start, mode.ROWS, mode)) + weight_rows(given, row, mode)
            norm += tl.load(given.square + row % given.inputs)[:, None] * (whole * whole)
        m = 1.0 / tl.sqrt_rn(tl.sum(norm, 0) + given.eps)
    return m


@triton.jit
def compare(given, state, step, total, m, mode):
    """Slopes of all pixels; returns the loss, and slopes . linear output. total: the outputs if they are one tile."""
    channel, there = own_channels(given, mode)
    along = tl.zeros((mode.CHANNELS,), tl.float32)
    loss = tl.zeros((), tl.float64)
    for first in range(0, given.pixels, mode.PIXELS):
        p = first + tl.arange(0, mode.PIXELS)
        inside = (p < given.pixels)[:, None] & there[None, :]
        place = channel[None, :].to(tl.int64) * given.pixels + p[:, None]
        if not mode.ONE_TILE:
            rows = given.taps * given.inputs
            total = outputs(given.maps, state.change, rows, first, given, mode.ROWS, mode)
        lin = tl.load(given.base + place, mask=inside, other=0.0) + total
        pre = m[None, :] * lin
        if mode.SHIFT:
            at = channel[None, :].to(tl.int64) * given.shift_channel + p[:, None].to(tl.int64) * given.shift_pixel
            pre += tl.load(given.shift + at, mask=inside, other=0.0)
        steep = tl.where(pre > 0.0, given.gain, given.gain * given.slope)
        ours = steep * pre
        # Where the goal is the layer's own value, to the bit, it must not differ from ours by rounding: the l1
        # gradient there would be the sign of that.
        wanted = tl.load(given.target + place, mask=inside, other=0.0)
        own_value = tl.load(given.value + place, mask=inside, other=0.0)
        goals = own_rows(state.goal, first, mode.PIXELS, mode)
        if step == 0:
            tl.store(goals, tl.where(wanted == own_value, ours, wanted))
            tl.debug_barrier()
        goal = tl.load(goals)
        r = tl.where(ours == goal, 0.0, ours - goal)
        r = tl.where(inside, r, 0.0)
        if mode.ABSOLUTE:
            turn = tl.where(r > 0.0, given.share, tl.where(r < 0.0, -given.share, r * 0.0))  # NaN stays NaN
            loss += tl.sum(tl.sum(tl.abs(r), 0), 0).to(tl.float64)
        else:
            turn = 2.0 * given.share * r
            loss += tl.sum(tl.sum(r * r, 0), 0).to(tl.float64)
        turn = turn * steep
        along += tl.sum(tl.where(inside, turn * lin, 0.0), 0)
        tl.store(own_rows(state.slopes, first, mode.PIXELS, mode), turn * m[None, :])
    return loss, along
