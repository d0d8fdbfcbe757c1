"""The coefficients of a rank-R change on a GPU: one program per (edit, output channel), all iterations inside it.

The algorithm, its constants and its status codes are those of rewrite_core/ops/fit_low_rank.py, name for name, and all
arithmetic is float64: what a fit reads is small, and what it needs is that CPU and GPU take the same path.

**Work.** As many programs as fit the GPU each take every n-th channel. What they share, the unknowns' sizes and the
quadratic forms in scaled unknowns, a few torch operations make before the launch; nothing waits for the GPU. Ours to
keep is little (some vectors of pixels and of unknowns, the matrix and its factor), it lies in a piece of global memory
per program, and a multiprocessor's own cache serves it. Pixels are walked in tiles, unknowns in blocks of BLOCK, so
neither rank nor region has a limit but that memory.

**Linear systems** are over unknowns, or over pixels where these are fewer (and there is no penalty): L D L^T by blocks,
left-looking. A block on the diagonal is eliminated in registers together with the identity, which becomes L^-1, so that
everything else is products of tiles. These are float64 tensor-core products where the GPU has them and Triton makes
them: 3.9 does for sm_80, sm_90 and sm_100 (m8n8k4), 3.6 for sm_80 (m8n8k4) and sm_90 (m16n8k16), while for sm_100 it
multiplies in registers.

**Floor**, J unknowns, P pixels, O channels, S the smaller of J and P: P J (S + 5) + S^3 / 3 + 2 S^2 operations per step
and channel, 4 bytes per number read and written. At 512 channels, 3x3, 10x10 and rank 1 that is 0.3 GFLOP for 40
steps: nothing beside the latency of some ten dependent passes per step, so the time to expect is that of one program's
steps, about 10^4 cycles each, as all 512 run at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.fit_low_rank_op.problem import (
    BOUNDED,
    CONVERGED,
    DAMPING_DOWN,
    DAMPING_MIN,
    DAMPING_STALL,
    DAMPING_START,
    DAMPING_UP,
    DEGENERATE,
    GOOD,
    KINK,
    MAX_ITERATIONS,
    NONFINITE,
    PIVOT,
    POOR,
    REACH,
    REACHED,
    SHIFTED,
    SLOW_SHARE,
    SMOOTHING_END,
    SMOOTHING_FAST,
    SMOOTHING_RATE,
    SMOOTHING_SLOW,
    ZERO_RESIDUAL,
    FitLowRankProblem,
    Outputs,
    empty_outputs,
)
from .launching import launch_kernel
from .tuning import choose, multiprocessors_of

# What a kernel reads from outside must be wrapped.
_CONVERGED, _MAX_ITERATIONS, _ZERO_RESIDUAL = map(tl.constexpr, (CONVERGED, MAX_ITERATIONS, ZERO_RESIDUAL))
_DEGENERATE, _NONFINITE, _BOUNDED, _SHIFTED = map(tl.constexpr, (DEGENERATE, NONFINITE, BOUNDED, SHIFTED))
_DAMPING_START, _DAMPING_MIN, _DAMPING_STALL = map(tl.constexpr, (DAMPING_START, DAMPING_MIN, DAMPING_STALL))
_DAMPING_UP, _DAMPING_DOWN, _GOOD, _POOR = map(tl.constexpr, (DAMPING_UP, DAMPING_DOWN, GOOD, POOR))
_SMOOTHING_END, _SMOOTHING_RATE, _SMOOTHING_SLOW = map(tl.constexpr, (SMOOTHING_END, SMOOTHING_RATE, SMOOTHING_SLOW))
_KINK, _REACH2, _REACHED, _PIVOT = map(tl.constexpr, (KINK, REACH**2, REACHED, PIVOT))

# A program's piece of global memory, in float64: two squares of tiles, then vectors in this order. Of those that come
# in pairs one belongs to the present point and one to the trial, and they change places when it is taken.
ORDER_VECTORS = 4  # right-hand side, pivots, half-way solution, solution
UNKNOWN_VECTORS = 13  # x, dm, penalty x (pairs); step, best x, gradient, lean, trial x, Q trial x, penalty trial x
PIXEL_VECTORS = 6  # lin (pair), dual, slopes, curvature, turned
_ORDER_VECTORS, _UNKNOWN_VECTORS = tl.constexpr(ORDER_VECTORS), tl.constexpr(UNKNOWN_VECTORS)


# --- linear systems: matrix and factor are squares of BLOCK x BLOCK tiles, of which the lower ones are used ------------


@triton.jit
def _tile_at(i, k, blocks, BLOCK: tl.constexpr):
    """Offsets of the numbers of tile (i, k)."""
    index = tl.arange(0, BLOCK)
    return (i * blocks + k) * (BLOCK * BLOCK) + index[:, None] * BLOCK + index[None, :]


@triton.jit
def _transposed_at(i, k, blocks, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    return (i * blocks + k) * (BLOCK * BLOCK) + index[None, :] * BLOCK + index[:, None]


@triton.jit
def _eliminate(tile, count, least, BLOCK: tl.constexpr):
    """tile = L D L^T for a symmetric tile of `count` rows and columns: L^-1, D, and whether all of D is above `least`."""
    index = tl.arange(0, BLOCK)
    rows = index[:, None]
    columns = index[None, :]
    inverse = (rows == columns).to(tl.float64)
    pivots = tl.full((BLOCK,), 1.0, tl.float64)
    good = count > 0
    for k in range(0, count):
        row = tl.sum(tl.where(rows == k, tile, 0.0), 0)
        column = tl.sum(tl.where(columns == k, tile, 0.0), 1)
        under = tl.sum(tl.where(rows == k, inverse, 0.0), 0)
        pivot = tl.sum(tl.where(index == k, row, 0.0), 0)
        good = good & (pivot > least) & (pivot - pivot == 0.0)
        factor = tl.where(index > k, column * (1.0 / pivot), 0.0)
        tile -= factor[:, None] * row[None, :]
        inverse -= factor[:, None] * under[None, :]
        pivots = tl.where(index == k, pivot, pivots)
    return inverse, pivots, good


@triton.jit
def _left_over(matrix, factor, pivots, i, k, blocks, BLOCK: tl.constexpr):
    """Tile (i, k) of the matrix less what the columns before k account for."""
    tile = tl.load(matrix + _tile_at(i, k, blocks, BLOCK))
    for j in range(0, k):
        left = tl.load(factor + _tile_at(i, j, blocks, BLOCK))
        right = tl.load(factor + _transposed_at(k, j, blocks, BLOCK))
        scale = tl.load(pivots + j * BLOCK + tl.arange(0, BLOCK))
        tile -= tl.dot(left / scale[None, :], right, input_precision="ieee", out_dtype=tl.float64)
    return tile


@triton.jit
def _factorise(matrix, factor, pivots, order, blocks, shift, least, BLOCK: tl.constexpr):
    """matrix + shift I = L D L^T: L^-1 of the diagonal tiles, and L D below. Whether all pivots are above `least`."""
    index = tl.arange(0, BLOCK)
    good = order > 0
    for k in range(0, blocks):
        tile = _left_over(matrix, factor, pivots, k, k, blocks, BLOCK)
        tile += tl.where(index[:, None] == index[None, :], shift, 0.0)
        inverse, values, fine = _eliminate(tile, tl.minimum(order - k * BLOCK, BLOCK), least, BLOCK)
        good = good & fine
        tl.store(factor + _tile_at(k, k, blocks, BLOCK), inverse)
        tl.store(pivots + k * BLOCK + index, values)
        tl.debug_barrier()
        for i in range(k + 1, blocks):
            tile = _left_over(matrix, factor, pivots, i, k, blocks, BLOCK)
            turned = tl.load(factor + _transposed_at(k, k, blocks, BLOCK))
            tile = tl.dot(tile, turned, input_precision="ieee", out_dtype=tl.float64)
            tl.store(factor + _tile_at(i, k, blocks, BLOCK), tile)
        tl.debug_barrier()
    return good


@triton.jit
def _solve(factor, pivots, right, half, solution, blocks, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    for k in range(0, blocks):
        value = tl.load(right + k * BLOCK + index)
        for j in range(0, k):
            before = tl.load(half + j * BLOCK + index) / tl.load(pivots + j * BLOCK + index)
            value -= tl.sum(tl.load(factor + _tile_at(k, j, blocks, BLOCK)) * before[None, :], 1)
        tl.store(half + k * BLOCK + index, tl.sum(tl.load(factor + _tile_at(k, k, blocks, BLOCK)) * value[None, :], 1))
        tl.debug_barrier()
    for step in range(0, blocks):
        k = blocks - 1 - step
        value = tl.load(half + k * BLOCK + index)
        for i in range(k + 1, blocks):
            after = tl.load(solution + i * BLOCK + index)
            value -= tl.sum(tl.load(factor + _tile_at(i, k, blocks, BLOCK)) * after[:, None], 0)
        value = value / tl.load(pivots + k * BLOCK + index)
        inverse = tl.load(factor + _tile_at(k, k, blocks, BLOCK))
        tl.store(solution + k * BLOCK + index, tl.sum(inverse * value[:, None], 0))
        tl.debug_barrier()


# --- the model: value, residual and derivatives of one channel ---------------------------------------------------------


@triton.jit
def _maps(basis, j, p, unknowns, pixels):
    """Entries of the basis maps in their own scale; j and p broadcast to a tile."""
    inside = (j < unknowns) & (p < pixels)
    return tl.load(basis + j.to(tl.int64) * pixels + p, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _pixels(target, weights, shift, shift_pixel, p, pixels, SHIFT: tl.constexpr):
    """Target, weight and shift of a tile of pixels."""
    inside = p < pixels
    goal = tl.load(target + p, mask=inside, other=0.0).to(tl.float64)
    weight = tl.load(weights + p, mask=inside, other=0.0)
    moved_by = 0.0 * weight
    if SHIFT:
        moved_by = tl.load(shift + p.to(tl.int64) * shift_pixel, mask=inside, other=0.0).to(tl.float64)
    return goal, weight, moved_by


@triton.jit
def _value(lin, m, shift, kink, slope, gain, ROUNDED: tl.constexpr):
    """The value and two derivatives of it by m lin, its kink rounded over a width."""
    pre = m * lin + shift
    if ROUNDED:
        up = 0.5 * gain * (1.0 + slope)
        down = 0.5 * gain * (1.0 - slope)
        square = pre * pre + kink * kink
        flat = tl.rsqrt(square)
        sine = pre * flat
        value = up * pre + down * (square * flat)
        steep = up + down * sine
        bend = (down * kink * kink) * (flat * flat * flat)
    else:
        value = gain * pre
        steep = gain + 0.0 * pre
        bend = 0.0 * pre
    return value, steep, bend


@triton.jit
def _loss(lin, m, shift, target, weight, slope, gain, ABSOLUTE: tl.constexpr):
    """Of a tile of pixels, its kink sharp."""
    pre = m * lin + shift
    r = tl.where(pre > 0.0, gain * pre, gain * slope * pre) - target
    if ABSOLUTE:
        data = tl.sum(weight * tl.abs(r), 0)
    else:
        data = tl.sum(weight * (r * r), 0)
    return data


@triton.jit
def _objective(
    lin, m, shift, target, weight, smoothing, kink, slope, gain, ABSOLUTE: tl.constexpr, ROUNDED: tl.constexpr
):
    """Of a tile of pixels, kink and absolute value rounded."""
    value, _, _ = _value(lin, m, shift, kink, slope, gain, ROUNDED)
    r = value - target
    if ABSOLUTE:
        square = r * r + smoothing * smoothing
        smooth = tl.sum(weight * (square * tl.rsqrt(square)), 0)
    else:
        smooth = tl.sum(weight * (r * r), 0)
    return smooth


@triton.jit
def _derive(
    lin, m, shift, target, weight, dual, smoothing, kink, slope, gain, ABSOLUTE: tl.constexpr, ROUNDED: tl.constexpr
):
    """Of a tile of pixels: r, 1 / eta (l1), steep, slopes and curvature at the present point; the rounded objective."""
    value, steep, bend = _value(lin, m, shift, kink, slope, gain, ROUNDED)
    r = value - target
    if ABSOLUTE:
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
    if ROUNDED:  # the kink bends the value: the half of its curvature that is convex
        more = slopes * bend
        curvature += tl.where(more > 0.0, more, 0.0)
    return r, inverse, steep, slopes * steep, curvature, smooth


@triton.jit
def _product(matrix, x, out, unknowns, blocks, BLOCK: tl.constexpr):
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
def _gram_tile(basis, curvature, i, k, inverse_size, unknowns, pixels, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """sum_p curvature_p basis_ip basis_kp in scaled unknowns, a tile of it."""
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = k * BLOCK + tl.arange(0, BLOCK)
    tile = tl.zeros((BLOCK, BLOCK), tl.float64)
    for first in range(0, pixels, TILE):
        p = first + tl.arange(0, TILE)
        left = _maps(basis, rows[:, None], p[None, :], unknowns, pixels) * tl.load(curvature + p)[None, :]
        right = _maps(basis, columns[None, :], p[:, None], unknowns, pixels)
        tile = tl.dot(left, right, tile, input_precision="ieee", out_dtype=tl.float64)
    return tile * tl.load(inverse_size + rows)[:, None] * tl.load(inverse_size + columns)[None, :]


@triton.jit
def _assemble(
    basis,
    inverse_size,
    penalty,
    matrix,
    slopes,
    curvature,
    lin,
    dm,
    penalised,
    gradient,
    leaning,
    m,
    along,
    bent,
    scale,
    unknowns,
    pixels,
    blocks,
    DEMODULATED: tl.constexpr,
    PENALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Matrix and gradient over unknowns; returns the matrix's trace. The Jacobian m basis + dm lin^T is never formed."""
    index = tl.arange(0, BLOCK)
    for i in range(0, blocks):
        rows = i * BLOCK + index
        turn = tl.zeros((BLOCK,), tl.float64)
        lean = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, pixels, TILE):
            p = first + tl.arange(0, TILE)
            part = _maps(basis, rows[:, None], p[None, :], unknowns, pixels)
            turn += tl.sum(part * tl.load(slopes + p)[None, :], 1)
            if DEMODULATED:
                lean += tl.sum(part * (tl.load(curvature + p) * tl.load(lin + p))[None, :], 1)
        inverse = tl.load(inverse_size + rows)
        turn *= m * inverse
        if DEMODULATED:
            turn += along * tl.load(dm + rows)
            tl.store(leaning + rows, lean * inverse)
        if PENALISED:
            turn += 2.0 * scale * tl.load(penalised + rows)
        tl.store(gradient + rows, turn)
    tl.debug_barrier()
    trace = tl.zeros((), tl.float64)
    for i in range(0, blocks):
        for k in range(0, i + 1):
            rows = i * BLOCK + index
            columns = k * BLOCK + index
            tile = _gram_tile(basis, curvature, i, k, inverse_size, unknowns, pixels, BLOCK, TILE)
            if DEMODULATED:
                left = tl.load(dm + rows)[:, None]
                top = tl.load(dm + columns)[None, :]
                leans = tl.load(leaning + rows)[:, None]
                tile = m * m * tile + m * left * tl.load(leaning + columns)[None, :] + (m * leans + bent * left) * top
            if PENALISED:
                inside = (rows < unknowns)[:, None] & (columns < unknowns)[None, :]
                at = penalty + rows[:, None] * unknowns + columns[None, :]
                tile += 2.0 * scale * tl.load(at, mask=inside, other=0.0)
            tl.store(matrix + _tile_at(i, k, blocks, BLOCK), tile)
            trace += tl.sum(tl.sum(tl.where(rows[:, None] == columns[None, :], tile, 0.0), 1), 0)
    return trace


@triton.jit
def _assemble_over_pixels(
    basis,
    inverse_size,
    products,
    matrix,
    right,
    slopes,
    curvature,
    lin,
    turned,
    dm,
    gradient,
    m,
    along,
    unknowns,
    pixels,
    blocks,
    order_blocks,
    DEMODULATED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same over pixels: S rows^T rows S with S = sqrt(curvature), right-hand side S^-1 slopes; rows = m basis +
    dm lin^T, and products [pixels, pixels] = basis^T basis in scaled unknowns."""
    index = tl.arange(0, BLOCK)
    length = tl.zeros((), tl.float64)
    for i in range(0, blocks):
        rows = i * BLOCK + index
        turn = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, pixels, TILE):
            p = first + tl.arange(0, TILE)
            part = _maps(basis, rows[:, None], p[None, :], unknowns, pixels)
            turn += tl.sum(part * tl.load(slopes + p)[None, :], 1)
        turn *= m * tl.load(inverse_size + rows)
        if DEMODULATED:
            slant = tl.load(dm + rows)
            turn += along * slant
            length += tl.sum(slant * slant, 0)
        tl.store(gradient + rows, turn)
    for i in range(0, order_blocks):
        p = i * BLOCK + index
        root = tl.sqrt(tl.load(curvature + p))
        tl.store(right + p, tl.where(root > 0.0, tl.load(slopes + p) / root, 0.0))
        if DEMODULATED:
            sum_ = tl.zeros((BLOCK,), tl.float64)
            for k in range(0, blocks):
                rows = k * BLOCK + index
                scaled = tl.load(dm + rows) * tl.load(inverse_size + rows)
                sum_ += tl.sum(_maps(basis, rows[:, None], p[None, :], unknowns, pixels) * scaled[:, None], 0)
            tl.store(turned + p, sum_)
    tl.debug_barrier()
    trace = tl.zeros((), tl.float64)
    for i in range(0, order_blocks):
        for k in range(0, i + 1):
            p = i * BLOCK + index
            q = k * BLOCK + index
            inside = (p < pixels)[:, None] & (q < pixels)[None, :]
            tile = tl.load(products + p[:, None] * pixels + q[None, :], mask=inside, other=0.0) * (m * m)
            if DEMODULATED:
                mine = tl.load(lin + p)[:, None]
                other = tl.load(lin + q)[None, :]
                tile += (
                    m * mine * tl.load(turned + q)[None, :] + (m * tl.load(turned + p)[:, None] + length * mine) * other
                )
            tile *= tl.sqrt(tl.load(curvature + p))[:, None] * tl.sqrt(tl.load(curvature + q))[None, :]
            tl.store(matrix + _tile_at(i, k, order_blocks, BLOCK), tile)
            trace += tl.sum(tl.sum(tl.where(p[:, None] == q[None, :], tile, 0.0), 1), 0)
    return trace


# --- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _write(best, inverse_size, coefficients, unknowns, blocks, BLOCK: tl.constexpr):
    """The coefficients in their own scale and type; whether that holds them, or else zeros."""
    index = tl.arange(0, BLOCK)
    wild = tl.zeros((), tl.float64)
    for i in range(0, blocks):
        j = i * BLOCK + index
        out = (tl.load(best + j) * tl.load(inverse_size + j)).to(coefficients.dtype.element_ty)
        wild += tl.sum(tl.where(j < unknowns, out - out, 0.0).to(tl.float64), 0)  # NaN of infinity and NaN
        tl.store(coefficients + j, out, mask=j < unknowns)
    fits = wild == 0.0
    if not fits:
        tl.debug_barrier()
        for i in range(0, blocks):
            j = i * BLOCK + index
            tl.store(coefficients + j, tl.zeros((BLOCK,), coefficients.dtype.element_ty), mask=j < unknowns)
    return fits


@triton.jit(
    do_not_specialize=[
        "tasks",
        "channels",
        "unknowns",
        "pixels",
        "weight_stride",
        "shift_edit",
        "shift_channel",
        "shift_pixel",
        "max_iterations",
        "stride",
    ]
)
def fit_kernel(
    basis,
    base,
    target,
    shift,  # pointers, as rewrite_core/ops/fit_low_rank.py names and shapes them
    constant,
    linear,
    quadratic,  # quadratic in scaled unknowns
    weights,  # float64 [edits, pixels], sum 1
    penalty,
    penalty_scale,  # penalty in scaled unknowns
    inverse_size,  # float64 [edits, blocks * BLOCK]
    products,  # float64 [edits, pixels, pixels], with OVER_PIXELS
    scratch,  # float64 [programs, stride]
    coefficients,
    losses,
    initials,
    iterations,
    statuses,
    tasks,
    channels,
    unknowns,
    pixels,
    weight_stride,
    shift_edit,
    shift_channel,
    shift_pixel,
    slope: tl.float64,
    gain: tl.float64,
    tolerance: tl.float64,
    slow_rate: tl.float64,
    slow_rate_well: tl.float64,
    fast_rate_well: tl.float64,
    max_iterations,
    stride,
    ABSOLUTE: tl.constexpr,
    ROUNDED: tl.constexpr,
    DEMODULATED: tl.constexpr,
    PENALISED: tl.constexpr,
    SHIFT: tl.constexpr,
    OVER_PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    none = tl.zeros((), tl.float64)
    slope = none + slope
    gain = none + gain
    tolerance = none + tolerance
    slow_rate = none + slow_rate
    slow_rate_well = none + slow_rate_well
    fast_rate_well = none + fast_rate_well
    blocks = tl.cdiv(unknowns, BLOCK)
    order = pixels if OVER_PIXELS else unknowns
    order_blocks = tl.cdiv(order, BLOCK)
    tiles = tl.cdiv(pixels, PIXELS)
    order_size = order_blocks * BLOCK
    size = blocks * BLOCK
    extent = tiles * PIXELS
    matrix = scratch + tl.program_id(0).to(tl.int64) * stride
    factor = matrix + order_size * order_size
    right = factor + order_size * order_size
    pivots = right + order_size
    half = pivots + order_size
    solution = half + order_size
    xs = right + _ORDER_VECTORS * order_size
    dms = xs + 2 * size
    penaliseds = dms + 2 * size
    step = penaliseds + 2 * size
    best_x = step + size
    gradient = best_x + size
    leaning = gradient + size
    trial_x = leaning + size
    trial_q = trial_x + size
    trial_p = trial_q + size
    lins = xs + _UNKNOWN_VECTORS * size
    duals = lins + 2 * extent
    slopes_at = duals + extent
    curvature_at = slopes_at + extent
    turned = curvature_at + extent

    for number in range(0, tl.cdiv(tasks - tl.program_id(0), tl.num_programs(0))):
        task = tl.program_id(0) + number * tl.num_programs(0)
        edit = (task // channels).to(tl.int64)
        channel = (task % channels).to(tl.int64)
        at = task.to(tl.int64)
        maps = basis + edit * unknowns * pixels
        sizes = inverse_size + edit * size
        weight_at = weights + edit * weight_stride
        base_at = base + at * pixels
        target_at = target + at * pixels
        shift_at = base_at  # where there is none
        if SHIFT:
            shift_at = shift + edit * shift_edit + channel * shift_channel
        quadratic_at = weights
        penalty_at = weights
        products_at = weights
        linear_at = weights
        limit = none + 1.0
        scale = none
        if DEMODULATED:
            quadratic_at = quadratic + edit * unknowns * unknowns
            linear_at = linear + at * unknowns
            limit = tl.load(constant + at)
        if PENALISED:
            penalty_at = penalty + edit * unknowns * unknowns
            scale = tl.load(penalty_scale + at)
        if OVER_PIXELS:
            products_at = products + edit * pixels * pixels

        # no change: x = 0
        m = none + 1.0
        if DEMODULATED:
            m = tl.rsqrt(limit)
        for i in range(0, blocks):
            j = i * BLOCK + index
            tl.store(xs + j, tl.zeros((BLOCK,), tl.float64))
            tl.store(best_x + j, tl.zeros((BLOCK,), tl.float64))
            tl.store(penaliseds + j, tl.zeros((BLOCK,), tl.float64))
            if DEMODULATED:
                slant = tl.load(linear_at + j, mask=j < unknowns, other=0.0) * tl.load(sizes + j)
                tl.store(dms + j, -(m * m * m) * slant)
        initial = none
        level = none
        counted = none
        for tile in range(0, tiles):
            p = tile * PIXELS + tl.arange(0, PIXELS)
            inside = p < pixels
            lin = tl.load(base_at + p, mask=inside, other=0.0).to(tl.float64)
            goal, weight, moved_by = _pixels(target_at, weight_at, shift_at, shift_pixel, p, pixels, SHIFT)
            initial += _loss(lin, m, moved_by, goal, weight, slope, gain, ABSOLUTE)
            level += tl.sum(weight * tl.abs(goal), 0)
            counted += tl.sum(weight, 0)
            tl.store(lins + p, lin)
            tl.store(duals + p, tl.zeros((PIXELS,), tl.float64))
        tl.debug_barrier()

        typical = initial
        if not ABSOLUTE:
            typical = tl.sqrt(initial)
        # not the reverse comparisons: NaN
        status = tl.where(counted > 0.0, _MAX_ITERATIONS, _DEGENERATE)
        status = tl.where(gain == 0.0, _DEGENERATE, status)
        status = tl.where((counted > 0.0) & ((typical > 1e-15 * level) == 0), _ZERO_RESIDUAL, status)
        finite = (initial - initial == 0.0) & (level - level == 0.0) & (counted - counted == 0.0)
        status = tl.where(finite, status, _NONFINITE)

        loss = initial
        best = initial
        best_reach = none
        smoothing_end = _SMOOTHING_END * typical
        smoothing = typical
        if not (ABSOLUTE or ROUNDED):
            smoothing = smoothing_end
        damping = none + _DAMPING_START
        growth = none + _DAMPING_UP
        now = none
        mean = none
        extra_now = none  # the penalty at the present point
        flip = status * 0
        tried = status * 0
        moved = status == status
        running = status == _MAX_ITERATIONS
        while running & (tried < max_iterations):
            x = xs + flip * size
            dm = dms + flip * size
            lin_at = lins + flip * extent
            new_x = xs + (1 - flip) * size
            new_dm = dms + (1 - flip) * size
            new_lin_at = lins + (1 - flip) * extent
            kink = _KINK / tl.abs(gain) * smoothing
            if moved:
                now = extra_now
                along = none
                bent = none
                for tile in range(0, tiles):
                    p = tile * PIXELS + tl.arange(0, PIXELS)
                    lin = tl.load(lin_at + p)
                    goal, weight, moved_by = _pixels(target_at, weight_at, shift_at, shift_pixel, p, pixels, SHIFT)
                    _, _, _, slopes, curvature, smooth = _derive(
                        lin,
                        m,
                        moved_by,
                        goal,
                        weight,
                        tl.load(duals + p),
                        smoothing,
                        kink,
                        slope,
                        gain,
                        ABSOLUTE,
                        ROUNDED,
                    )
                    now += smooth
                    if DEMODULATED:
                        along += tl.sum(slopes * lin, 0)
                        bent += tl.sum(curvature * lin * lin, 0)
                    tl.store(slopes_at + p, slopes)
                    tl.store(curvature_at + p, curvature)
                tl.debug_barrier()
                if OVER_PIXELS:
                    trace = _assemble_over_pixels(
                        maps,
                        sizes,
                        products_at,
                        matrix,
                        right,
                        slopes_at,
                        curvature_at,
                        lin_at,
                        turned,
                        dm,
                        gradient,
                        m,
                        along,
                        unknowns,
                        pixels,
                        blocks,
                        order_blocks,
                        DEMODULATED,
                        BLOCK,
                        TILE,
                    )
                else:
                    trace = _assemble(
                        maps,
                        sizes,
                        penalty_at,
                        matrix,
                        slopes_at,
                        curvature_at,
                        lin_at,
                        dm,
                        penaliseds + flip * size,
                        gradient,
                        leaning,
                        m,
                        along,
                        bent,
                        scale,
                        unknowns,
                        pixels,
                        blocks,
                        DEMODULATED,
                        PENALISED,
                        BLOCK,
                        TILE,
                    )
                mean = trace / unknowns
                tl.debug_barrier()
                finite = (mean - mean == 0.0) & (now - now == 0.0)
                # with nothing that bends no coefficient matters here
                status = tl.where(mean == 0.0, tl.where(tried == 0, _DEGENERATE, _CONVERGED), status)
                status = tl.where(finite, status, _NONFINITE)
                running = finite & (mean != 0.0)
            if running:
                tried += 1
                mu = damping * mean
                good = _factorise(matrix, factor, pivots, order, order_blocks, mu, none, BLOCK)
                if OVER_PIXELS:
                    _solve(factor, pivots, right, half, solution, order_blocks, BLOCK)
                    turn = none
                    for i in range(0, order_blocks):  # the step is unknowns times this
                        p = i * BLOCK + index
                        y = -tl.load(solution + p) * tl.sqrt(tl.load(curvature_at + p))
                        tl.store(half + p, y)
                        turn += tl.sum(y * tl.load(lin_at + p), 0)
                    tl.debug_barrier()
                    for i in range(0, blocks):
                        j = i * BLOCK + index
                        total = tl.zeros((BLOCK,), tl.float64)
                        for k in range(0, order_blocks):
                            p = k * BLOCK + index
                            part = _maps(maps, j[:, None], p[None, :], unknowns, pixels)
                            total += tl.sum(part * tl.load(half + p)[None, :], 1)
                        total *= m * tl.load(sizes + j)
                        if DEMODULATED:
                            total += turn * tl.load(dm + j)
                        tl.store(step + j, total)
                else:
                    _solve(factor, pivots, gradient, half, solution, order_blocks, BLOCK)
                    for i in range(0, blocks):
                        tl.store(step + i * BLOCK + index, -tl.load(solution + i * BLOCK + index))
                tl.debug_barrier()
                predicted = none
                wild = none
                for i in range(0, blocks):
                    j = i * BLOCK + index
                    way = tl.load(step + j)
                    wild += tl.sum(way - way, 0)  # NaN of infinity and NaN
                    predicted += 0.5 * tl.sum(mu * way * way - tl.load(gradient + j) * way, 0)
                    tl.store(trial_x + j, tl.load(x + j) + way)
                good = good & (wild == 0.0)
                tl.debug_barrier()

                # the trial point, back where W0 still counts
                reach = none
                shorten = none + 1.0
                square = none
                if DEMODULATED:
                    square = _product(quadratic_at, trial_x, trial_q, unknowns, blocks, BLOCK)
                    reach = square / (_REACH2 * limit)
                    shorten = tl.where(reach > 1.0, tl.rsqrt(reach), 1.0)
                    reach = tl.where(reach > 1.0, 1.0, reach)
                extra = none
                if PENALISED:
                    extra = scale * shorten * shorten * _product(penalty_at, trial_x, trial_p, unknowns, blocks, BLOCK)
                tl.debug_barrier()
                fresh_m = none + 1.0
                turn = none  # dm . step
                if DEMODULATED:
                    slanted = none
                    for i in range(0, blocks):
                        j = i * BLOCK + index
                        slant = tl.load(linear_at + j, mask=j < unknowns, other=0.0) * tl.load(sizes + j)
                        slanted += tl.sum(slant * tl.load(trial_x + j), 0)
                    fresh_m = tl.rsqrt(limit + 2.0 * shorten * slanted + shorten * shorten * square)
                for i in range(0, blocks):
                    j = i * BLOCK + index
                    there = shorten * tl.load(trial_x + j)
                    tl.store(new_x + j, there)
                    if DEMODULATED:
                        turn += tl.sum(tl.load(dm + j) * (there - tl.load(x + j)), 0)
                        slant = tl.load(linear_at + j, mask=j < unknowns, other=0.0) * tl.load(sizes + j)
                        slant += shorten * tl.load(trial_q + j)
                        tl.store(new_dm + j, -(fresh_m * fresh_m * fresh_m) * slant)
                    if PENALISED:
                        tl.store(penaliseds + (1 - flip) * size + j, shorten * tl.load(trial_p + j))
                tl.debug_barrier()
                fresh = extra
                data = none
                for tile in range(0, tiles):
                    p = tile * PIXELS + tl.arange(0, PIXELS)
                    inside = p < pixels
                    lin = tl.load(base_at + p, mask=inside, other=0.0).to(tl.float64)
                    for i in range(0, blocks):
                        j = i * BLOCK + index
                        scaled = tl.load(new_x + j) * tl.load(sizes + j)
                        lin += tl.sum(_maps(maps, j[:, None], p[None, :], unknowns, pixels) * scaled[:, None], 0)
                    goal, weight, moved_by = _pixels(target_at, weight_at, shift_at, shift_pixel, p, pixels, SHIFT)
                    fresh += _objective(
                        lin, fresh_m, moved_by, goal, weight, smoothing, kink, slope, gain, ABSOLUTE, ROUNDED
                    )
                    data += _loss(lin, fresh_m, moved_by, goal, weight, slope, gain, ABSOLUTE)
                    tl.store(new_lin_at + p, lin)
                tl.debug_barrier()

                taken = good & (fresh < now)  # false for NaN
                if taken & (data + extra < best):
                    best = data + extra
                    loss = data
                    best_reach = reach
                    for i in range(0, blocks):
                        j = i * BLOCK + index
                        tl.store(best_x + j, tl.load(new_x + j))
                if ABSOLUTE:
                    if taken:  # the running estimate of r / eta moves along
                        for tile in range(0, tiles):
                            p = tile * PIXELS + tl.arange(0, PIXELS)
                            lin = tl.load(lin_at + p)
                            goal, weight, moved_by = _pixels(
                                target_at, weight_at, shift_at, shift_pixel, p, pixels, SHIFT
                            )
                            dual = tl.load(duals + p)
                            r, inverse, steep, _, _, _ = _derive(
                                lin, m, moved_by, goal, weight, dual, smoothing, kink, slope, gain, ABSOLUTE, ROUNDED
                            )
                            change = (m * (tl.load(new_lin_at + p) - lin) + turn * lin) * steep
                            dual = (r + change - dual * (r * inverse) * change) * inverse
                            tl.store(duals + p, tl.minimum(tl.maximum(dual, -1.0), 1.0))
                        tl.debug_barrier()

                at_end = smoothing <= smoothing_end
                drop = now - fresh
                quality = drop / predicted
                small = taken & (drop <= tolerance * now)
                if not ABSOLUTE:
                    small = small | (taken & (fresh <= 1e-20 * typical * typical))
                stalled = (taken == 0) & ((damping > _DAMPING_STALL) | (good & (predicted <= 1e-12 * now)))
                onward = tl.where(quality > _GOOD, _DAMPING_DOWN, tl.where(quality > _POOR, none + 1.0, 2.0))
                damping = tl.where(stalled, none + _DAMPING_START, damping * tl.where(taken, onward, growth))
                damping = tl.maximum(damping, _DAMPING_MIN)
                growth = tl.where(taken, none + _DAMPING_UP, 2.0 * growth)
                extra_now = tl.where(taken, extra, extra_now)
                m = tl.where(taken, fresh_m, m)
                flip = tl.where(taken, 1 - flip, flip)
                done = at_end & (small | stalled)
                status = tl.where(done, _CONVERGED, status)
                running = done == 0
                moved = taken | stalled
                well = taken & (quality > _GOOD)
                slow = tl.where(well, slow_rate_well, slow_rate)
                fast = tl.where(well, fast_rate_well, none + _SMOOTHING_RATE)
                rate = tl.where(smoothing > _SMOOTHING_SLOW * typical, slow, fast)
                smoothing = tl.where(moved & running, tl.maximum(smoothing * rate, smoothing_end), smoothing)

        if DEMODULATED:
            status = tl.where((status != _NONFINITE) & (best_reach > _REACHED), _BOUNDED, status)
        tl.debug_barrier()
        fits = _write(best_x, sizes, coefficients + at * unknowns, unknowns, blocks, BLOCK)
        tl.store(losses + at, tl.where(fits, loss, initial))
        tl.store(initials + at, initial)
        tl.store(iterations + at, tried)
        tl.store(statuses + at, tl.where(fits, status, _NONFINITE))
        tl.debug_barrier()  # the next channel writes what this one still reads


@triton.jit(
    do_not_specialize=[
        "tasks",
        "channels",
        "unknowns",
        "pixels",
        "weight_stride",
        "shift_edit",
        "shift_channel",
        "shift_pixel",
        "stride",
    ]
)
def exact_kernel(
    basis,
    base,
    target,
    shift,
    weights,
    penalty,
    penalty_scale,
    inverse_size,  # as in fit_kernel
    gram,  # float64 [edits, unknowns, unknowns]: gain^2 sum_p weight_p basis_p basis_p^T in scaled unknowns
    scratch,
    coefficients,
    losses,
    initials,
    iterations,
    statuses,
    tasks,
    channels,
    unknowns,
    pixels,
    weight_stride,
    shift_edit,
    shift_channel,
    shift_pixel,
    gain: tl.float64,
    stride,
    PENALISED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The linear problem with the l2 loss: one factor, and three solves with what is left over."""
    index = tl.arange(0, BLOCK)
    none = tl.zeros((), tl.float64)
    gain = none + gain
    one = none + 1.0
    blocks = tl.cdiv(unknowns, BLOCK)
    tiles = tl.cdiv(pixels, PIXELS)
    size = blocks * BLOCK
    matrix = scratch + tl.program_id(0).to(tl.int64) * stride
    factor = matrix + size * size
    rest = factor + size * size
    pivots = rest + size
    half = pivots + size
    solution = half + size
    xs = rest + _ORDER_VECTORS * size
    right = xs + 2 * size
    along = right + size
    against = along + size

    for number in range(0, tl.cdiv(tasks - tl.program_id(0), tl.num_programs(0))):
        task = tl.program_id(0) + number * tl.num_programs(0)
        edit = (task // channels).to(tl.int64)
        channel = (task % channels).to(tl.int64)
        at = task.to(tl.int64)
        maps = basis + edit * unknowns * pixels
        sizes = inverse_size + edit * size
        gram_at = gram + edit * unknowns * unknowns
        weight_at = weights + edit * weight_stride
        base_at = base + at * pixels
        target_at = target + at * pixels
        shift_at = base_at  # where there is none
        penalty_at = gram_at
        scale = none
        if SHIFT:
            shift_at = shift + edit * shift_edit + channel * shift_channel
        if PENALISED:
            penalty_at = penalty + edit * unknowns * unknowns
            scale = tl.load(penalty_scale + at)

        initial = none
        level = none
        counted = none
        for part in range(0, tiles):
            p = part * PIXELS + tl.arange(0, PIXELS)
            inside = p < pixels
            wanted = tl.load(target_at + p, mask=inside, other=0.0).to(tl.float64)
            weight = tl.load(weight_at + p, mask=inside, other=0.0)
            level += tl.sum(weight * tl.abs(wanted), 0)
            counted += tl.sum(weight, 0)
            lin = tl.load(base_at + p, mask=inside, other=0.0).to(tl.float64)
            if SHIFT:
                lin += tl.load(shift_at + p.to(tl.int64) * shift_pixel, mask=inside, other=0.0).to(tl.float64)
            wanted -= gain * lin
            initial += tl.sum(weight * (wanted * wanted), 0)
        largest = none
        wild = none
        for i in range(0, blocks):
            rows = i * BLOCK + index
            turn = tl.zeros((BLOCK,), tl.float64)
            for first in range(0, pixels, TILE):
                p = first + tl.arange(0, TILE)
                inside = p < pixels
                lin = tl.load(base_at + p, mask=inside, other=0.0).to(tl.float64)
                if SHIFT:
                    lin += tl.load(shift_at + p.to(tl.int64) * shift_pixel, mask=inside, other=0.0).to(tl.float64)
                wanted = tl.load(target_at + p, mask=inside, other=0.0).to(tl.float64) - gain * lin
                wanted *= gain * tl.load(weight_at + p, mask=inside, other=0.0)
                turn += tl.sum(_maps(maps, rows[:, None], p[None, :], unknowns, pixels) * wanted[None, :], 1)
            tl.store(right + rows, turn * tl.load(sizes + rows))
            tl.store(xs + rows, tl.zeros((BLOCK,), tl.float64))
            for k in range(0, i + 1):
                columns = k * BLOCK + index
                inside = (rows < unknowns)[:, None] & (columns < unknowns)[None, :]
                place = rows[:, None] * unknowns + columns[None, :]
                tile = tl.load(gram_at + place, mask=inside, other=0.0)
                if PENALISED:
                    tile += scale * tl.load(penalty_at + place, mask=inside, other=0.0)
                tl.store(matrix + _tile_at(i, k, blocks, BLOCK), tile)
                diagonal = tl.where(rows[:, None] == columns[None, :], tile, 0.0)
                wild += tl.sum(tl.sum(diagonal - diagonal, 1), 0)  # NaN of infinity and NaN
                largest = tl.maximum(largest, tl.max(tl.max(diagonal, 1), 0))
        tl.debug_barrier()

        typical = tl.sqrt(initial)
        least = 0.5 * _PIVOT * largest
        added = none
        attempt = task * 0
        good = _factorise(matrix, factor, pivots, unknowns, blocks, added, least, BLOCK)
        added = _PIVOT * largest
        while (good == 0) & (attempt < 12) & (largest > 0.0):
            good = _factorise(matrix, factor, pivots, unknowns, blocks, added, least, BLOCK)
            attempt += 1
            added = 10.0 * added
        status = tl.where(good, tl.where(attempt > 0, _SHIFTED, _CONVERGED), _NONFINITE)
        status = tl.where(wild == 0.0, tl.where(largest == 0.0, _DEGENERATE, status), _NONFINITE)
        status = tl.where((counted == 0.0) | (gain == 0.0), _DEGENERATE, status)
        status = tl.where((counted > 0.0) & ((typical > 1e-15 * level) == 0), _ZERO_RESIDUAL, status)
        finite = (initial - initial == 0.0) & (level - level == 0.0) & (counted - counted == 0.0)
        status = tl.where(finite, status, _NONFINITE)

        loss = initial
        x = xs
        if (status == _CONVERGED) | (status == _SHIFTED):
            for again in range(0, 3):  # each time the shift's error shrinks by shift / eigenvalue
                x = xs + (again % 2) * size
                _product(gram_at, x, along, unknowns, blocks, BLOCK)
                if PENALISED:
                    _product(penalty_at, x, against, unknowns, blocks, BLOCK)
                tl.debug_barrier()
                for i in range(0, blocks):
                    j = i * BLOCK + index
                    left = tl.load(right + j) - tl.load(along + j)
                    if PENALISED:
                        left -= scale * tl.load(against + j)
                    tl.store(rest + j, left)
                tl.debug_barrier()
                _solve(factor, pivots, rest, half, solution, blocks, BLOCK)
                for i in range(0, blocks):
                    j = i * BLOCK + index
                    tl.store(xs + (1 - again % 2) * size + j, tl.load(x + j) + tl.load(solution + j))
                tl.debug_barrier()
        x = xs + size  # where the third has put it
        extra = none
        if PENALISED:
            extra = scale * _product(penalty_at, x, against, unknowns, blocks, BLOCK)
        data = none
        if (status == _CONVERGED) | (status == _SHIFTED):
            for part in range(0, tiles):
                p = part * PIXELS + tl.arange(0, PIXELS)
                inside = p < pixels
                lin = tl.load(base_at + p, mask=inside, other=0.0).to(tl.float64)
                for i in range(0, blocks):
                    j = i * BLOCK + index
                    scaled = tl.load(x + j) * tl.load(sizes + j)
                    lin += tl.sum(_maps(maps, j[:, None], p[None, :], unknowns, pixels) * scaled[:, None], 0)
                goal, weight, moved_by = _pixels(target_at, weight_at, shift_at, shift_pixel, p, pixels, SHIFT)
                data += _loss(lin, one, moved_by, goal, weight, one, gain, False)
        better = ((status == _CONVERGED) | (status == _SHIFTED)) & (data + extra < initial)  # false for NaN
        tl.debug_barrier()
        if better:
            loss = data
        else:
            for i in range(0, blocks):
                tl.store(x + i * BLOCK + index, tl.zeros((BLOCK,), tl.float64))
        tl.debug_barrier()
        fits = _write(x, sizes, coefficients + at * unknowns, unknowns, blocks, BLOCK)
        tl.store(losses + at, tl.where(fits, loss, initial))
        tl.store(initials + at, initial)
        tl.store(iterations + at, attempt * 0 + 1)
        tl.store(statuses + at, tl.where(fits, status, _NONFINITE))
        tl.debug_barrier()


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled and spread.

    block     unknowns, and rows of the linear systems' tiles
    tile      pixels of one product for the normal equations; divides `pixels`
    pixels    of the other passes
    warps
    resident  programs per multiprocessor
    """

    block: int
    tile: int
    pixels: int
    warps: int
    resident: int


# By the order of the linear systems. All of them use every register and spill some: what lives through the whole loop is
# 25 pointers and as many numbers, and the addresses that the compiler computes ahead. One warp needs no barriers between
# its lanes, more hide each other's waits; the first is used where nothing was measured.
SMALL = (Config(16, 32, 128, 2, 8), Config(16, 16, 128, 1, 8), Config(16, 32, 128, 4, 4))
LARGE = (Config(32, 32, 128, 4, 4), Config(32, 32, 256, 8, 2))
CANDIDATES = (*SMALL, *LARGE)
SCRATCH = 1 << 27  # float64 numbers of all programs together (1 GiB)
MEASURED_STEPS = 4  # of a fit that chooses among configurations


def candidates(order: int) -> tuple[Config, ...]:
    return SMALL if order <= 16 else LARGE


def plan(problem: FitLowRankProblem) -> tuple[bool, int]:
    """Whether the linear systems are over pixels, and their order."""
    _, unknowns, pixels = problem.basis.shape
    over_pixels = not problem.exact and problem.penalty is None and pixels < unknowns
    return over_pixels, pixels if over_pixels else unknowns


def scratch_size(unknowns: int, pixels: int, order: int, config: Config) -> int:
    """Float64 numbers of one program's piece of scratch."""
    size, order_size = (triton.cdiv(count, config.block) * config.block for count in (unknowns, order))
    extent = triton.cdiv(pixels, config.pixels) * config.pixels
    return 2 * order_size**2 + ORDER_VECTORS * order_size + UNKNOWN_VECTORS * size + PIXEL_VECTORS * extent


def _prepare(problem: FitLowRankProblem, over_pixels: bool) -> dict[str, Tensor | None]:
    """What the channels of an edit share."""
    basis, wide = problem.basis, {"dtype": torch.float64, "device": problem.basis.device}
    edits, unknowns, pixels = basis.shape
    if problem.pixel_weights is None:
        weights = torch.full((1, pixels), 1 / pixels, **wide)
    else:
        weights = problem.pixel_weights
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    size = torch.empty(edits, unknowns, **wide)
    order = pixels if over_pixels else unknowns
    products = torch.empty(edits, order, order, **wide) if over_pixels or problem.exact else None
    some = max(1, (1 << 25) // (unknowns * pixels))  # edits at a time: float64 copies of all might fill the GPU
    for first in range(0, edits, some):
        part = slice(first, first + some)
        rows, weight = basis[part].double(), (weights[part] if len(weights) > 1 else weights)[:, None]
        size[part] = (weight * rows.square()).sum(-1).sqrt()
        size[part] = torch.where(size[part] > 0, size[part], 1.0)  # also of NaN
        if products is None:
            continue
        rows = rows / size[part][..., None]
        if over_pixels:
            torch.bmm(rows.mT, rows, out=products[part])
        else:
            torch.bmm(problem.gain**2 * weight * rows, rows.mT, out=products[part])
    square = size[:, :, None] * size[:, None, :]
    constant, scale = problem.constant, problem.penalty_scale
    if constant is not None:  # without a change the quadratic form does not count, unless it is not finite
        constant = constant + 0.0 * problem.quadratic.sum((1, 2))[:, None]
    return {
        "constant": constant,
        "weights": weights.contiguous(),
        "inverse_size": 1 / size,
        "products": products,
        "quadratic": None if problem.quadratic is None else problem.quadratic / square,
        "penalty": None if problem.penalty is None else problem.penalty / square,
        "penalty_scale": None if scale is None else scale.contiguous(),
    }


def launch(problem: FitLowRankProblem, config: Config | None = None) -> Outputs:
    """The outputs of ops.fit_low_rank's custom op. Nothing here waits for the GPU.

    config  in place of the one that was found the fastest
    """
    outputs = empty_outputs(problem.basis, problem.base)
    edits, unknowns, pixels = problem.basis.shape
    channels = problem.base.shape[1]
    if not edits or not channels:
        return outputs
    over_pixels, order = plan(problem)
    device = problem.base.device
    basis, base, target = (part.contiguous() for part in (problem.basis, problem.base, problem.target))
    linear = None if problem.linear is None else problem.linear.contiguous()
    shift = (0, 0, 0) if problem.shift is None else problem.shift.stride()
    convex = problem.slope == 1.0 and linear is None
    slow_rate = SMOOTHING_RATE if convex else SMOOTHING_SLOW ** (1 / (SLOW_SHARE * problem.max_iterations))
    slow_rate_well, fast_rate_well = (SMOOTHING_RATE,) * 2 if convex else (slow_rate**2, SMOOTHING_FAST)

    def fit(config: Config, steps: int) -> None:
        stride = scratch_size(unknowns, pixels, order, config)
        programs = min(edits * channels, multiprocessors_of(device) * config.resident, max(1, SCRATCH // stride))
        scratch = torch.empty(programs, stride, dtype=torch.float64, device=device)
        inverse_size = torch.nn.functional.pad(shared["inverse_size"], (0, -unknowns % config.block))
        sizes = (edits * channels, channels, unknowns, pixels, pixels if len(shared["weights"]) > 1 else 0, *shift)
        common = {
            "PENALISED": problem.penalty is not None,
            "SHIFT": problem.shift is not None,
            "BLOCK": config.block,
            "TILE": config.tile,
            "PIXELS": config.pixels,
            "num_warps": config.warps,
            "num_stages": 1,
            "enable_fp_fusion": False,  # fused across a butterfly, the copies of one sum would differ, and part at a branch
        }
        if problem.exact:
            launch_kernel(
                "fit_low_rank",
                exact_kernel,
                (programs,),
                basis,
                base,
                target,
                problem.shift,
                shared["weights"],
                shared["penalty"],
                shared["penalty_scale"],
                inverse_size,
                shared["products"],
                scratch,
                *outputs,
                *sizes,
                problem.gain,
                stride,
                **common,
            )
            return
        launch_kernel(
            "fit_low_rank",
            fit_kernel,
            (programs,),
            basis,
            base,
            target,
            problem.shift,
            shared["constant"],
            linear,
            shared["quadratic"],
            shared["weights"],
            shared["penalty"],
            shared["penalty_scale"],
            inverse_size,
            shared["products"],
            scratch,
            *outputs,
            *sizes,
            problem.slope,
            problem.gain,
            problem.tolerance,
            slow_rate,
            slow_rate_well,
            fast_rate_well,
            steps,
            stride,
            ABSOLUTE=problem.loss == "l1",
            ROUNDED=problem.slope != 1.0,
            DEMODULATED=linear is not None,
            OVER_PIXELS=over_pixels,
            **common,
        )

    with torch.cuda.device_of(base):  # Triton launches on the current device
        shared = _prepare(problem, over_pixels)
        if config is None:
            kind = "exact" if problem.exact else "pixels" if over_pixels else "unknowns"
            name = f"{kind}-{triton.next_power_of_2(order)}-{triton.next_power_of_2(pixels)}"
            name += f"-{min(triton.next_power_of_2(edits * channels), 1 << 14)}"
            steps = min(problem.max_iterations, MEASURED_STEPS)
            config = choose(device, "fit_low_rank", name, candidates(order), lambda config: fit(config, steps))
        fit(config, problem.max_iterations)
    return outputs
