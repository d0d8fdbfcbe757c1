"""The two kernels of every step: new weights with what they add to the outputs, and outputs with their slopes."""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import descend, spread

TOGETHER = 8  # slices that are read at once
_TOGETHER = tl.constexpr(TOGETHER)


# As many parameters as there are: Triton launches with numbers and pointers. weights, inputs, width and span are
# multiples of 16 by the launch: only where Triton is told does it read 16 bytes at a time.
@triton.jit(do_not_specialize=["ranks", "step"])
def update_kernel(
    maps,  # [taps, inputs, width]: the operator; inputs and pixels padded with zeros to whole tiles
    change,  # [channels, taps, inputs], as the two that follow; channels padded to whole tiles
    mean,  # Adam's running mean of the gradient
    power,  # and of its square
    slopes,  # [channels, width]: the loss's gradient by the linear output
    bend,  # [channels]: by the squared norm, twice
    weight,  # [channels, taps, inputs]
    square,  # [inputs]: the squared style
    directions,  # [ranks, inputs]
    leaning,  # [channels, taps, ranks]: the gradient's products with the directions
    rates,  # [steps, 2]: the step size, and one over the root of the second bias correction
    partial,  # [slices, channels, width]: what the slice adds to the outputs
    norms,  # [slices, channels]: and to demodulation's norm
    weights,  # taps times inputs
    inputs,
    ranks,
    width,
    span,  # weights of a slice
    step,  # from 1 on; 0 where there is nothing to update
    DEMODULATED: tl.constexpr,
    PROJECTS_GRADIENT: tl.constexpr,
    ONE_TILE: tl.constexpr,  # of pixels
    CHANNELS: tl.constexpr,  # of a program
    ROWS: tl.constexpr,  # weights of a tile
    PIXELS: tl.constexpr,  # of a tile
    FEW: tl.constexpr,  # pixels of a tile of the gradient
    PRECISION: tl.constexpr,
):
    """Some channels and a slice of their weights: Adam's step, and what the new weights add."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    own = channel[:, None].to(tl.int64) * weights
    pixel = tl.arange(0, PIXELS)
    few = tl.arange(0, FEW)
    of_channel = channel[:, None].to(tl.int64) * width + pixel[None, :]
    out = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * CHANNELS
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, weights)
    rate = 0.0
    correction = 0.0
    if step > 0:
        rate = tl.load(rates + 2 * (step - 1))
        correction = tl.load(rates + 2 * (step - 1) + 1)
    if DEMODULATED:
        pull = tl.load(bend + channel)
        norm = tl.zeros((CHANNELS, ROWS), tl.float32)
    if ONE_TILE:
        total = tl.zeros((CHANNELS, PIXELS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        at = own + row[None, :]
        tap = start // inputs
        i = row - tap * inputs
        after = tl.load(change + at)
        if DEMODULATED:
            factor = tl.load(square + i)[None, :]
            original = tl.load(weight + at)
        if step > 0:
            m = tl.load(mean + at)  # so early, as what follows waits for other loads
            v = tl.load(power + at)
            if PROJECTS_GRADIENT:
                gradient = spread(
                    leaning, directions, channel, tap, i, ranks, weights, inputs, CHANNELS, ROWS, PRECISION
                )
            else:
                gradient = tl.zeros((CHANNELS, ROWS), tl.float32)
                for p in range(0, width, FEW):  # few pixels at a time: more, in two parts each, fill the registers
                    some = tl.load(maps + row[:, None].to(tl.int64) * width + p + few[None, :])
                    steep = tl.load(slopes + channel[:, None].to(tl.int64) * width + p + few[None, :])
                    gradient = tl.dot(steep, tl.trans(some), gradient, input_precision=PRECISION)
                if DEMODULATED:
                    gradient += pull[:, None] * factor * (original + after)
            m, v, after = descend(m, v, after, gradient, rate, correction)
            tl.debug_barrier()  # a number may be held by several threads: all have read it before one writes
            tl.store(mean + at, m)
            tl.store(power + at, v)
            tl.store(change + at, after)
        if DEMODULATED:
            whole = after + original
            norm += factor * (whole * whole)
        if ONE_TILE:
            tile = tl.load(maps + row[:, None].to(tl.int64) * width + pixel[None, :])
            total = tl.dot(after, tile, total, input_precision=PRECISION)
    if DEMODULATED:
        tl.store(norms + out + channel, tl.sum(norm, 1))
    if ONE_TILE:
        tl.store(partial + out * width + of_channel, total)
    else:
        tl.debug_barrier()  # the new weights are read by other threads than wrote them
        for p in range(0, width, PIXELS):
            total = tl.zeros((CHANNELS, PIXELS), tl.float32)
            for start in range(first, last, ROWS):
                row = start + tl.arange(0, ROWS)
                tile = tl.load(maps + row[:, None].to(tl.int64) * width + p + pixel[None, :])
                total = tl.dot(tl.load(change + own + row[None, :]), tile, total, input_precision=PRECISION)
            tl.store(partial + out * width + of_channel + p, total)


@triton.jit
def norm_factor(norms, slices, channel, there, padded, eps, CHANNELS: tl.constexpr):
    """m, by which the linear output of each channel is multiplied."""
    norm = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, slices, _TOGETHER):
        for more in tl.static_range(_TOGETHER):
            number = first + more + tl.zeros_like(channel)
            norm += tl.load(norms + number * padded + channel, mask=there & (number < slices), other=0.0)
    return 1.0 / tl.sqrt_rn(norm + eps)


@triton.jit(do_not_specialize=["slices", "channels", "pixels", "shift_channel", "shift_pixel", "steps", "step"])
def compare_kernel(
    partial,
    norms,
    base,  # [channels, pixels], as the next four
    target,
    value,
    shift,  # of any strides
    goal,  # [channels, width], padded to whole tiles
    slopes,
    bend,
    losses,  # float64 [programs, steps]: the sums over channels and pixels before each step
    slices,
    channels,
    padded,  # channels in whole tiles
    pixels,
    width,
    shift_channel,
    shift_pixel,
    steps,
    share,  # what a pixel counts in the loss
    eps,
    slope,
    gain,
    step,
    ABSOLUTE: tl.constexpr,  # the loss is l1
    DEMODULATED: tl.constexpr,
    SHIFT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Few channels, all pixels: outputs, loss and slopes before a step."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    m = tl.full((CHANNELS,), 1.0, tl.float32)
    if DEMODULATED:
        m = norm_factor(norms, slices, channel, there, padded, eps, CHANNELS)
    along = tl.zeros((CHANNELS,), tl.float32)  # slopes . linear output
    loss = tl.zeros((), tl.float64)
    for start in range(0, width, PIXELS):
        p = start + tl.arange(0, PIXELS)
        inside = there[:, None] & (p < pixels)[None, :]
        place = channel[:, None].to(tl.int64) * pixels + p[None, :]
        at = channel[:, None].to(tl.int64) * width + p[None, :]
        total = tl.zeros((CHANNELS, PIXELS), tl.float32)
        for first in range(0, slices, _TOGETHER):
            for more in tl.static_range(_TOGETHER):
                number = (first + more + tl.zeros_like(channel))[:, None]
                behind = number.to(tl.int64) * padded * width
                total += tl.load(partial + behind + at, mask=number < slices, other=0.0)
        lin = tl.load(base + place, mask=inside, other=0.0) + total
        pre = m[:, None] * lin
        if SHIFT:
            moved = channel[:, None].to(tl.int64) * shift_channel + p[None, :].to(tl.int64) * shift_pixel
            pre += tl.load(shift + moved, mask=inside, other=0.0)
        steep = tl.where(pre > 0.0, gain, gain * slope)
        ours = steep * pre
        # Where the goal is the layer's own value, to the bit, it must not differ from ours by rounding: the l1
        # gradient there would be the sign of that.
        wanted = tl.load(target + place, mask=inside, other=0.0)
        own_value = tl.load(value + place, mask=inside, other=0.0)
        if step == 0:
            tl.store(goal + at, tl.where(wanted == own_value, ours, wanted))
            tl.debug_barrier()
        kept = tl.load(goal + at)
        r = tl.where(ours == kept, 0.0, ours - kept)
        r = tl.where(inside, r, 0.0)
        if ABSOLUTE:
            turn = tl.where(r > 0.0, share, tl.where(r < 0.0, -share, r * 0.0))  # NaN stays NaN
            loss += tl.sum(tl.sum(tl.abs(r), 1), 0).to(tl.float64)
        else:
            turn = 2.0 * share * r
            loss += tl.sum(tl.sum(r * r, 1), 0).to(tl.float64)
        turn = turn * steep
        along += tl.sum(tl.where(inside, turn * lin, 0.0), 1)
        tl.store(slopes + at, tl.where(inside, turn * m[:, None], 0.0))
    if DEMODULATED:
        tl.store(bend + channel, tl.where(there, -along * m * m * m, 0.0))
    tl.store(losses + tl.program_id(0).to(tl.int64) * steps + step, loss)
