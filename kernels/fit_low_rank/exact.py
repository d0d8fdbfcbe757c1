"""The linear given with the l2 loss: one factor, and a few solves with what is left over."""

from __future__ import annotations

import triton
import triton.language as tl

from .constants import CONVERGED, DEGENERATE, NONFINITE, PIVOT, REFINEMENTS, SHIFTED, SHIFTS
from .fit import status_at_start, write
from .linear_system import factorise, solve, tile_at
from .model import basis_tile, lin_tile, pixel_tile, product, true_loss
from .structs import Given, Mode, Results, channel_of, results_of, scratch_of, sizes_of


@triton.jit
def wanted_tile(channel, p, sizes, mode):
    """What is wanted of the change for a tile of pixels, and their weights and targets."""
    target, weight, shift = pixel_tile(channel, p, sizes, mode)
    lin = tl.load(channel.base + p, mask=p < sizes.pixels, other=0.0).to(tl.float64)
    if mode.SHIFT:
        lin += shift
    return target - channel.gain * lin, weight, target


@triton.jit
def initial_loss_of(channel, sizes, mode):
    """The loss without a change, and the weighted sums of |target| and of 1."""
    initial = tl.zeros((), tl.float64)
    level = tl.zeros((), tl.float64)
    counted = tl.zeros((), tl.float64)
    for tile in range(0, sizes.tiles):
        p = tile * mode.PIXELS + tl.arange(0, mode.PIXELS)
        wanted, weight, target = wanted_tile(channel, p, sizes, mode)
        level += tl.sum(weight * tl.abs(target), 0)
        counted += tl.sum(weight, 0)
        initial += tl.sum(weight * (wanted * wanted), 0)
    return initial, level, counted


@triton.jit
def assemble_exact(channel, scratch, sizes, mode):
    """The matrix, and the right-hand side in scratch.gradient; returns its largest diagonal number, and 0 or NaN."""
    index = tl.arange(0, mode.BLOCK)
    size = tl.zeros((), tl.float64)
    wild = tl.zeros((), tl.float64)
    for i in range(0, sizes.blocks):
        rows = i * mode.BLOCK + index
        turn = tl.zeros((mode.BLOCK,), tl.float64)
        for first in range(0, sizes.pixels, mode.TILE):
            p = first + tl.arange(0, mode.TILE)
            wanted, weight, _ = wanted_tile(channel, p, sizes, mode)
            wanted *= channel.gain * weight
            turn += tl.sum(basis_tile(channel, rows[:, None], p[None, :], sizes) * wanted[None, :], 1)
        tl.store(scratch.gradient + rows, turn * tl.load(channel.inverse_size + rows))
        tl.store(scratch.x + rows, tl.zeros((mode.BLOCK,), tl.float64))
        for k in range(0, i + 1):
            columns = k * mode.BLOCK + index
            inside = (rows < sizes.unknowns)[:, None] & (columns < sizes.unknowns)[None, :]
            place = rows[:, None] * sizes.unknowns + columns[None, :]
            tile = tl.load(channel.gram + place, mask=inside, other=0.0)
            if mode.PENALISED:
                tile += channel.penalty_scale * tl.load(channel.penalty + place, mask=inside, other=0.0)
            tl.store(scratch.matrix + tile_at(i, k, sizes.blocks, mode.BLOCK), tile)
            diagonal = tl.where(rows[:, None] == columns[None, :], tile, 0.0)
            wild += tl.sum(tl.sum(diagonal - diagonal, 1), 0)  # NaN of infinity and NaN
            size = tl.maximum(size, tl.max(tl.max(diagonal, 1), 0))
    tl.debug_barrier()
    return size, wild


@triton.jit
def factor_exact(scratch, size, wild, sizes, BLOCK: tl.constexpr):
    """The factor of the matrix, with no diagonal shift or the smallest that is enough: a status."""
    least = 0.5 * PIVOT * size
    attempt = sizes.unknowns * 0
    good = factorise(scratch, 0.0 * size, least, sizes, BLOCK)
    added = PIVOT * size
    while (good == 0) & (attempt < SHIFTS) & (size > 0.0):
        good = factorise(scratch, added, least, sizes, BLOCK)
        attempt += 1
        added = 10.0 * added
    status = tl.where(good, tl.where(attempt > 0, SHIFTED, CONVERGED), NONFINITE)
    return tl.where(wild == 0.0, tl.where(size == 0.0, DEGENERATE, status), NONFINITE)


@triton.jit
def refine(channel, scratch, x, new_x, sizes, mode):
    """new_x: x and the solution for what x leaves over."""
    index = tl.arange(0, mode.BLOCK)
    product(channel.gram, x, scratch.quadratic_x, sizes.unknowns, sizes.blocks, mode.BLOCK)
    if mode.PENALISED:
        product(channel.penalty, x, scratch.penalty_x, sizes.unknowns, sizes.blocks, mode.BLOCK)
    tl.debug_barrier()
    for i in range(0, sizes.blocks):
        j = i * mode.BLOCK + index
        rest = tl.load(scratch.gradient + j) - tl.load(scratch.quadratic_x + j)
        if mode.PENALISED:
            rest -= channel.penalty_scale * tl.load(scratch.penalty_x + j)
        tl.store(scratch.right + j, rest)
    tl.debug_barrier()
    solve(scratch, scratch.right, sizes.blocks, mode.BLOCK)
    for i in range(0, sizes.blocks):
        j = i * mode.BLOCK + index
        tl.store(new_x + j, tl.load(x + j) + tl.load(scratch.solution + j))
    tl.debug_barrier()


@triton.jit
def loss_of(channel, x, sizes, mode):
    """The loss at x."""
    data = tl.zeros((), tl.float64)
    one = data + 1.0
    for tile in range(0, sizes.tiles):
        p = tile * mode.PIXELS + tl.arange(0, mode.PIXELS)
        lin = lin_tile(channel, x, p, sizes, mode.BLOCK)
        data += true_loss(lin, one, pixel_tile(channel, p, sizes, mode), one, channel.gain, False)
    return data


@triton.jit
def fit_exactly(channel, results, scratch, sizes, mode):
    """One channel from no change to its results."""
    index = tl.arange(0, mode.BLOCK)
    stride = sizes.blocks * mode.BLOCK
    zero = tl.zeros((), tl.float64)
    initial, level, counted = initial_loss_of(channel, sizes, mode)
    size, wild = assemble_exact(channel, scratch, sizes, mode)
    status = factor_exact(scratch, size, wild, sizes, mode.BLOCK)
    status = status_at_start(status, tl.sqrt(initial), initial, level, counted, channel.gain)
    fitted = (status == CONVERGED) | (status == SHIFTED)
    if fitted:
        for again in range(0, REFINEMENTS):  # each time the shift's error shrinks by shift / eigenvalue
            x = scratch.x + (again % 2) * stride
            new_x = scratch.x + (1 - again % 2) * stride
            refine(channel, scratch, x, new_x, sizes, mode)
    best_x = scratch.x + (REFINEMENTS % 2) * stride  # where the last has put it
    extra = zero
    if mode.PENALISED:
        square = product(channel.penalty, best_x, scratch.penalty_x, sizes.unknowns, sizes.blocks, mode.BLOCK)
        extra = channel.penalty_scale * square
    data = zero
    if fitted:
        data = loss_of(channel, best_x, sizes, mode)
    loss = initial
    tl.debug_barrier()
    if fitted & (data + extra < initial):  # false for NaN
        loss = data
    else:
        for i in range(0, sizes.blocks):
            tl.store(best_x + i * mode.BLOCK + index, tl.zeros((mode.BLOCK,), tl.float64))
    tl.debug_barrier()
    write(results, best_x, loss, initial, 1, status, channel, sizes, mode.BLOCK)


@triton.jit
def fit_all_exactly(given, results, scratch, stride, tasks, unknowns, pixels, mode):
    """Every n-th channel, where there are n programs."""
    sizes = sizes_of(unknowns, pixels, mode)
    own = scratch_of(scratch + tl.program_id(0).to(tl.int64) * stride, sizes, mode)
    for number in range(0, tl.cdiv(tasks - tl.program_id(0), tl.num_programs(0))):
        task = tl.program_id(0) + number * tl.num_programs(0)
        channel = channel_of(given, task, sizes, mode)
        fit_exactly(channel, results_of(results, task, sizes), own, sizes, mode)


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
    inverse_size,
    gram,  # float64 [edits, unknowns, unknowns]: gain^2 sum_p weight_p basis_p basis_p^T in scaled unknowns
    scratch,  # and the others as in fit_kernel
    coefficients,
    loss,
    initial_loss,
    iterations,
    status,
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
    fit_all_exactly(
        Given(
            basis,
            base,
            target,
            shift,
            None,
            None,
            None,
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
            1.0,
            gain,
        ),
        Results(coefficients, loss, initial_loss, iterations, status),
        scratch,
        stride,
        tasks,
        unknowns,
        pixels,
        Mode(False, False, False, PENALISED, SHIFT, True, False, BLOCK, TILE, PIXELS),
    )
