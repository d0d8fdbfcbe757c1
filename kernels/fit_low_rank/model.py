"""The model: value, objective and derivatives of one channel."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import REACH


@triton.jit
def basis_tile(channel, j, p, sizes):
    """Entries of the basis maps in their own scale; j and p broadcast to a tile."""
    inside = (j < sizes.unknowns) & (p < sizes.pixels)
    return tl.load(channel.basis + j.to(tl.int64) * sizes.pixels + p, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def pixel_tile(channel, p, sizes, mode):
    """Target, weight and shift of a tile of pixels."""
    inside = p < sizes.pixels
    target = tl.load(channel.target + p, mask=inside, other=0.0).to(tl.float64)
    weight = tl.load(channel.weights + p, mask=inside, other=0.0)
    shift = 0.0 * weight
    if mode.SHIFT:
        at = channel.shift + p.to(tl.int64) * channel.shift_pixel
        shift = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    return target, weight, shift


@triton.jit
def value_of(lin, m, shift, kink, channel, mode):
    """The value and two derivatives of it by m lin, its kink rounded over a width."""
    pre = m * lin + shift
    if mode.ROUNDED:
        up = 0.5 * channel.gain * (1.0 + channel.slope)
        down = 0.5 * channel.gain * (1.0 - channel.slope)
        square = pre * pre + kink * kink
        flat = tl.rsqrt(square)
        sine = pre * flat
        value = up * pre + down * (square * flat)
        steep = up + down * sine
        bend = (down * kink * kink) * (flat * flat * flat)
    else:
        value = channel.gain * pre
        steep = channel.gain + 0.0 * pre
        bend = 0.0 * pre
    return value, steep, bend


@triton.jit
def true_loss(lin, m, pixels, slope, gain, ABSOLUTE: tl.constexpr):
    """The loss itself of a tile of pixels, its kink sharp; pixels: what pixel_tile gives."""
    target, weight, shift = pixels
    pre = m * lin + shift
    r = tl.where(pre > 0.0, gain * pre, gain * slope * pre) - target
    if ABSOLUTE:
        data = tl.sum(weight * tl.abs(r), 0)
    else:
        data = tl.sum(weight * (r * r), 0)
    return data


@triton.jit
def smooth_loss(lin, m, pixels, smoothing, kink, channel, mode):
    """Of a tile of pixels, kink and absolute value rounded."""
    target, weight, shift = pixels
    value, _, _ = value_of(lin, m, shift, kink, channel, mode)
    r = value - target
    if mode.ABSOLUTE:
        square = r * r + smoothing * smoothing
        smooth = tl.sum(weight * (square * tl.rsqrt(square)), 0)
    else:
        smooth = tl.sum(weight * (r * r), 0)
    return smooth


@triton.jit
def derivatives(lin, m, pixels, dual, smoothing, kink, channel, mode):
    """Of a tile of pixels: r, 1 / eta (l1), steep, slopes and curvature at the present point; the smooth loss."""
    target, weight, shift = pixels
    value, steep, bend = value_of(lin, m, shift, kink, channel, mode)
    r = value - target
    if mode.ABSOLUTE:
        square = r * r + smoothing * smoothing
        inverse = tl.rsqrt(square)
        ratio = r * inverse
        smooth = tl.sum(weight * (square * inverse), 0)
        slopes = weight * ratio
        curvature = weight * (1.0 - dual * ratio) * inverse
    else:
        inverse = r
        smooth = tl.sum(weight * (r * r), 0)
        slopes = 2.0 * weight * r
        curvature = 2.0 * weight
    curvature = curvature * (steep * steep)
    if mode.ROUNDED:  # the kink bends the value: the half of its curvature that is convex
        more = slopes * bend
        curvature += tl.where(more > 0.0, more, 0.0)
    return r, inverse, steep, slopes * steep, curvature, smooth


@triton.jit
def product(matrix, x, out, unknowns, blocks, BLOCK: tl.constexpr):
    """out = matrix @ x for a matrix [unknowns, unknowns]; returns x . out."""
    index = tl.arange(0, BLOCK)
    square = tl.zeros((), tl.float64)
    for i in range(0, blocks):
        row = i * BLOCK + index
        total = tl.zeros((BLOCK,), tl.float64)
        for k in range(0, blocks):
            column = k * BLOCK + index
            inside = (row < unknowns)[:, None] & (column < unknowns)[None, :]
            tile = tl.load(matrix + row[:, None] * unknowns + column[None, :], mask=inside, other=0.0)
            total += tl.sum(tile * tl.load(x + column)[None, :], 1)
        tl.store(out + row, total)
        square += tl.sum(total * tl.load(x + row), 0)
    return square


@triton.jit
def slant_of(channel, j, sizes):
    """Demodulation's linear term in scaled unknowns, for unknowns j."""
    return tl.load(channel.linear + j, mask=j < sizes.unknowns, other=0.0) * tl.load(channel.inverse_size + j)


@triton.jit
def linearise(channel, scratch, point, new_point, sizes, mode):
    """Move `new_point` to scratch.trial_x, back where W0 still counts: x, dm and penalty x of it, but not lin.

    Returns x^T quadratic x over its largest allowed value; the penalty; m; and dm . step, with dm of `point`."""
    index = tl.arange(0, mode.BLOCK)
    zero = tl.zeros((), tl.float64)
    reach = zero
    shorten = zero + 1.0
    square = zero
    if mode.DEMODULATED:
        square = product(
            channel.quadratic, scratch.trial_x, scratch.quadratic_x, sizes.unknowns, sizes.blocks, mode.BLOCK
        )
        reach = square / (REACH * REACH * channel.constant)
        shorten = tl.where(reach > 1.0, tl.rsqrt(reach), 1.0)
        reach = tl.where(reach > 1.0, 1.0, reach)
    extra = zero
    if mode.PENALISED:
        extra = (
            channel.penalty_scale
            * shorten
            * shorten
            * product(channel.penalty, scratch.trial_x, scratch.penalty_x, sizes.unknowns, sizes.blocks, mode.BLOCK)
        )
    tl.debug_barrier()
    new_m = zero + 1.0
    turn = zero
    if mode.DEMODULATED:
        slanted = zero
        for i in range(0, sizes.blocks):
            j = i * mode.BLOCK + index
            slanted += tl.sum(slant_of(channel, j, sizes) * tl.load(scratch.trial_x + j), 0)
        new_m = tl.rsqrt(channel.constant + 2.0 * shorten * slanted + shorten * shorten * square)
    for i in range(0, sizes.blocks):
        j = i * mode.BLOCK + index
        new_x = shorten * tl.load(scratch.trial_x + j)
        tl.store(new_point.x + j, new_x)
        if mode.DEMODULATED:
            turn += tl.sum(tl.load(point.dm + j) * (new_x - tl.load(point.x + j)), 0)
            slant = slant_of(channel, j, sizes)
            slant += shorten * tl.load(scratch.quadratic_x + j)
            tl.store(new_point.dm + j, -(new_m * new_m * new_m) * slant)
        if mode.PENALISED:
            tl.store(new_point.penalised + j, shorten * tl.load(scratch.penalty_x + j))
    tl.debug_barrier()
    return reach, extra, new_m, turn


@triton.jit
def lin_tile(channel, x, p, sizes, BLOCK: tl.constexpr):
    """The linear output at x of a tile of pixels."""
    index = tl.arange(0, BLOCK)
    lin = tl.load(channel.base + p, mask=p < sizes.pixels, other=0.0).to(tl.float64)
    for i in range(0, sizes.blocks):
        j = i * BLOCK + index
        scaled = tl.load(x + j) * tl.load(channel.inverse_size + j)
        lin += tl.sum(basis_tile(channel, j[:, None], p[None, :], sizes) * scaled[:, None], 0)
    return lin


@triton.jit
def objectives(channel, new_point, m, smoothing, kink, extra, sizes, mode):
    """lin of a point, and there the smooth objective (with the penalty, `extra`) and the loss itself."""
    smooth = extra
    data = tl.zeros((), tl.float64)
    for tile in range(0, sizes.tiles):
        p = tile * mode.PIXELS + tl.arange(0, mode.PIXELS)
        lin = lin_tile(channel, new_point.x, p, sizes, mode.BLOCK)
        pixels = pixel_tile(channel, p, sizes, mode)
        smooth += smooth_loss(lin, m, pixels, smoothing, kink, channel, mode)
        data += true_loss(lin, m, pixels, channel.slope, channel.gain, mode.ABSOLUTE)
        tl.store(new_point.lin + p, lin)
    tl.debug_barrier()
    return smooth, data


@triton.jit
def derive(channel, scratch, point, m, smoothing, kink, extra, sizes, mode):
    """Slopes and curvature of all pixels; returns the smooth objective, slopes . lin and lin . curvature lin."""
    now = extra
    along = tl.zeros((), tl.float64)
    bent = tl.zeros((), tl.float64)
    for tile in range(0, sizes.tiles):
        p = tile * mode.PIXELS + tl.arange(0, mode.PIXELS)
        lin = tl.load(point.lin + p)
        pixels = pixel_tile(channel, p, sizes, mode)
        dual = tl.load(scratch.dual + p)
        _, _, _, slopes, curvature, smooth = derivatives(lin, m, pixels, dual, smoothing, kink, channel, mode)
        now += smooth
        if mode.DEMODULATED:
            along += tl.sum(slopes * lin, 0)
            bent += tl.sum(curvature * lin * lin, 0)
        tl.store(scratch.slopes + p, slopes)
        tl.store(scratch.curvature + p, curvature)
    tl.debug_barrier()
    return now, along, bent


@triton.jit
def follow(channel, scratch, point, new_point, m, turn, smoothing, kink, sizes, mode):
    """The running estimate of r / eta moves with the step that was taken."""
    for tile in range(0, sizes.tiles):
        p = tile * mode.PIXELS + tl.arange(0, mode.PIXELS)
        lin = tl.load(point.lin + p)
        pixels = pixel_tile(channel, p, sizes, mode)
        dual = tl.load(scratch.dual + p)
        r, inverse, steep, _, _, _ = derivatives(lin, m, pixels, dual, smoothing, kink, channel, mode)
        change = (m * (tl.load(new_point.lin + p) - lin) + turn * lin) * steep
        dual = (r + change - dual * (r * inverse) * change) * inverse
        tl.store(scratch.dual + p, tl.minimum(tl.maximum(dual, -1.0), 1.0))
    tl.debug_barrier()
