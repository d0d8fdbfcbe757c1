"""Levenberg-Marquardt on one channel after the other, all iterations of a channel inside one program."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import (
    BOUNDED,
    CONVERGED,
    DAMPING_DOWN,
    DAMPING_MIN,
    DAMPING_STALL,
    DAMPING_START,
    DAMPING_UP,
    DEGENERATE,
    EXACT,
    GOOD,
    KINK,
    MAX_ITERATIONS,
    NEGLIGIBLE,
    NONFINITE,
    POOR,
    REACHED,
    SMOOTHING_END,
    SMOOTHING_RATE,
    SMOOTHING_SLOW,
    STATIONARY,
    ZERO_RESIDUAL,
)
from .linear_system import assemble, assemble_dual_form, damped_step
from .model import derive, follow, linearise, objectives, pixel_tile, slant_of, true_loss
from .structs import Given, Mode, Pace, Results, channel_of, point_of, results_of, scratch_of, sizes_of


@triton.jit
def start(channel, scratch, point, sizes, mode):
    """No change: x = 0. Returns m, the loss, and the weighted sums of |target| and of 1."""
    index = tl.arange(0, mode.BLOCK)
    zero = tl.zeros((), tl.float64)
    m = zero + 1.0
    if mode.DEMODULATED:
        m = tl.rsqrt(channel.constant)
    for i in range(0, sizes.blocks):
        j = i * mode.BLOCK + index
        tl.store(point.x + j, tl.zeros((mode.BLOCK,), tl.float64))
        tl.store(scratch.best_x + j, tl.zeros((mode.BLOCK,), tl.float64))
        tl.store(point.penalised + j, tl.zeros((mode.BLOCK,), tl.float64))
        if mode.DEMODULATED:
            tl.store(point.dm + j, -(m * m * m) * slant_of(channel, j, sizes))
    initial = zero
    level = zero
    counted = zero
    for tile in range(0, sizes.tiles):
        p = tile * mode.PIXELS + tl.arange(0, mode.PIXELS)
        lin = tl.load(channel.base + p, mask=p < sizes.pixels, other=0.0).to(tl.float64)
        pixels = pixel_tile(channel, p, sizes, mode)
        target, weight, _ = pixels
        initial += true_loss(lin, m, pixels, channel.slope, channel.gain, mode.ABSOLUTE)
        level += tl.sum(weight * tl.abs(target), 0)
        counted += tl.sum(weight, 0)
        tl.store(point.lin + p, lin)
        tl.store(scratch.dual + p, tl.zeros((mode.PIXELS,), tl.float64))
    tl.debug_barrier()
    return m, initial, level, counted


@triton.jit
def status_at_start(status, scale, initial, level, counted, gain):
    """`status`, or why there is nothing to fit. Not the reverse comparisons: NaN."""
    status = tl.where(counted > 0.0, status, DEGENERATE)
    status = tl.where(gain == 0.0, DEGENERATE, status)
    status = tl.where((counted > 0.0) & ((scale > NEGLIGIBLE * level) == 0), ZERO_RESIDUAL, status)
    finite = (initial - initial == 0.0) & (level - level == 0.0) & (counted - counted == 0.0)
    return tl.where(finite, status, NONFINITE)


@triton.jit
def write(results, best_x, loss, initial, iterations, status, channel, sizes, BLOCK: tl.constexpr):
    """The results, with coefficients in their own scale and type, or with zeros where that does not hold them."""
    index = tl.arange(0, BLOCK)
    wild = tl.zeros((), tl.float64)
    kind = results.coefficients.dtype.element_ty
    for i in range(0, sizes.blocks):
        j = i * BLOCK + index
        out = (tl.load(best_x + j) * tl.load(channel.inverse_size + j)).to(kind)
        wild += tl.sum(tl.where(j < sizes.unknowns, out - out, 0.0).to(tl.float64), 0)  # NaN of infinity and NaN
        tl.store(results.coefficients + j, out, mask=j < sizes.unknowns)
    fits = wild == 0.0
    if not fits:
        tl.debug_barrier()
        for i in range(0, sizes.blocks):
            j = i * BLOCK + index
            tl.store(results.coefficients + j, tl.zeros((BLOCK,), kind), mask=j < sizes.unknowns)
    tl.store(results.loss, tl.where(fits, loss, initial))
    tl.store(results.initial_loss, initial)
    tl.store(results.iterations, iterations)
    tl.store(results.status, tl.where(fits, status, NONFINITE))
    tl.debug_barrier()  # the next channel writes what this one still reads


@triton.jit
def differentiate(channel, scratch, point, m, smoothing, kink, extra, sizes, mode):
    """Matrix and gradient at the present point; returns the objective there, and the matrix's mean curvature."""
    now, along, bent = derive(channel, scratch, point, m, smoothing, kink, extra, sizes, mode)
    if mode.DUAL_FORM:
        trace = assemble_dual_form(channel, scratch, point, m, along, sizes, mode)
    else:
        trace = assemble(channel, scratch, point, m, along, bent, sizes, mode)
    tl.debug_barrier()
    return now, trace / sizes.unknowns


@triton.jit
def damp(damping, growth, quality, taken, stalled):
    """Damping for the next step, and by what it grows after a rejected one."""
    one = tl.zeros((), tl.float64) + 1.0
    factor = tl.where(quality > GOOD, DAMPING_DOWN, tl.where(quality > POOR, one, 2.0))
    damping = tl.where(stalled, DAMPING_START * one, damping * tl.where(taken, factor, growth))
    return tl.maximum(damping, DAMPING_MIN), tl.where(taken, DAMPING_UP * one, 2.0 * growth)


@triton.jit
def smoothing_rate(slowly, well, pace):
    """What the smoothing is multiplied with: at first slowly, and faster after a step that did well."""
    slow = tl.where(well, pace.slow_rate_well, pace.slow_rate)
    fast = tl.where(well, pace.fast_rate_well, tl.zeros((), tl.float64) + SMOOTHING_RATE)
    return tl.where(slowly, slow, fast)


@triton.jit
def fit_channel(channel, results, scratch, pace, sizes, mode):
    """One channel from no change to its results."""
    zero = tl.zeros((), tl.float64)
    m, initial, level, counted = start(channel, scratch, point_of(scratch, 0, sizes, mode), sizes, mode)
    scale = initial
    if not mode.ABSOLUTE:
        scale = tl.sqrt(initial)
    status = status_at_start(MAX_ITERATIONS, scale, initial, level, counted, channel.gain)

    loss = initial
    best = initial
    best_reach = zero
    smoothing_end = SMOOTHING_END * scale
    smoothing = scale
    if not (mode.ABSOLUTE or mode.ROUNDED):
        smoothing = smoothing_end
    damping = zero + DAMPING_START
    growth = zero + DAMPING_UP
    now = zero
    mean = zero
    extra_now = zero  # the penalty at the present point
    flip = status * 0
    iterations = status * 0
    moved = status == status
    running = status == MAX_ITERATIONS
    while running & (iterations < pace.max_iterations):
        point = point_of(scratch, flip, sizes, mode)
        new_point = point_of(scratch, 1 - flip, sizes, mode)
        kink = KINK / tl.abs(channel.gain) * smoothing
        if moved:
            now, mean = differentiate(channel, scratch, point, m, smoothing, kink, extra_now, sizes, mode)
            finite = (mean - mean == 0.0) & (now - now == 0.0)
            # with nothing that bends no coefficient matters here
            status = tl.where(mean == 0.0, tl.where(iterations == 0, DEGENERATE, CONVERGED), status)
            status = tl.where(finite, status, NONFINITE)
            running = finite & (mean != 0.0)
        if running:
            iterations += 1
            good, predicted = damped_step(channel, scratch, point, m, damping * mean, sizes, mode)
            reach, extra, new_m, turn = linearise(channel, scratch, point, new_point, sizes, mode)
            after, data = objectives(channel, new_point, new_m, smoothing, kink, extra, sizes, mode)
            taken = good & (after < now)  # false for NaN
            if taken & (data + extra < best):
                best = data + extra
                loss = data
                best_reach = reach
                for i in range(0, sizes.blocks):
                    j = i * mode.BLOCK + tl.arange(0, mode.BLOCK)
                    tl.store(scratch.best_x + j, tl.load(new_point.x + j))
            if mode.ABSOLUTE:
                if taken:
                    follow(channel, scratch, point, new_point, m, turn, smoothing, kink, sizes, mode)

            at_end = smoothing <= smoothing_end
            drop = now - after
            quality = drop / predicted
            small = taken & (drop <= pace.tolerance * now)
            if not mode.ABSOLUTE:
                small = small | (taken & (after <= (EXACT * scale) * (EXACT * scale)))
            stalled = (taken == 0) & ((damping > DAMPING_STALL) | (good & (predicted <= STATIONARY * now)))
            damping, growth = damp(damping, growth, quality, taken, stalled)
            extra_now = tl.where(taken, extra, extra_now)
            m = tl.where(taken, new_m, m)
            flip = tl.where(taken, 1 - flip, flip)
            done = at_end & (small | stalled)
            status = tl.where(done, CONVERGED, status)
            running = done == 0
            moved = taken | stalled
            rate = smoothing_rate(smoothing > SMOOTHING_SLOW * scale, taken & (quality > GOOD), pace)
            smoothing = tl.where(moved & running, tl.maximum(smoothing * rate, smoothing_end), smoothing)

    if mode.DEMODULATED:
        status = tl.where((status != NONFINITE) & (best_reach > REACHED), BOUNDED, status)
    tl.debug_barrier()
    write(results, scratch.best_x, loss, initial, iterations, status, channel, sizes, mode.BLOCK)


@triton.jit
def fit_channels(given, results, pace, scratch, stride, tasks, unknowns, pixels, mode):
    """Every n-th channel, where there are n programs."""
    sizes = sizes_of(unknowns, pixels, mode)
    own = scratch_of(scratch + tl.program_id(0).to(tl.int64) * stride, sizes, mode)
    zero = tl.zeros((), tl.float64)
    pace = Pace(
        pace.max_iterations,
        zero + pace.tolerance,
        zero + pace.slow_rate,
        zero + pace.slow_rate_well,
        zero + pace.fast_rate_well,
    )
    for number in range(0, tl.cdiv(tasks - tl.program_id(0), tl.num_programs(0))):
        task = tl.program_id(0) + number * tl.num_programs(0)
        channel = channel_of(given, task, sizes, mode)
        fit_channel(channel, results_of(results, task, sizes), own, pace, sizes, mode)


# As many parameters as there are: Triton launches with numbers and pointers, and compiles float64 numbers where an
# annotation says so.
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
    shift,
    constant,
    linear,
    quadratic,
    weights,
    penalty,
    penalty_scale,
    inverse_size,
    gram,  # with DUAL_FORM
    scratch,  # float64 [programs, stride]
    coefficients,
    loss,
    initial_loss,
    iterations,
    status,
    tasks,  # channels of all edits
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
    DUAL_FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    fit_channels(
        Given(
            basis,
            base,
            target,
            shift,
            constant,
            linear,
            quadratic,
            weights,
            penalty,
            penalty_scale,
            inverse_size,
            gram,
            channels,
            weight_stride,
            shift_edit,
            shift_channel,
            shift_pixel,
            slope,
            gain,
        ),
        Results(coefficients, loss, initial_loss, iterations, status),
        Pace(max_iterations, tolerance, slow_rate, slow_rate_well, fast_rate_well),
        scratch,
        stride,
        tasks,
        unknowns,
        pixels,
        Mode(ABSOLUTE, ROUNDED, DEMODULATED, PENALISED, SHIFT, DUAL_FORM, DUAL_FORM, BLOCK, TILE, PIXELS),
    )
