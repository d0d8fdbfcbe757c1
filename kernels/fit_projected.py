"""Adam on a layer's whole weight with projection, on a GPU: all steps in one launch, a few channels a program.

The trajectory is that of rewrite_core/ops/fit_projected.py, whose names are used here. Channels never meet but in the
loss that is reported: every program writes the sum over its channels at each step, and these are added up in a fixed
order. No atomics: the same bits from run to run.

**Work.** A program has `channels` output channels, so that what it reads of the operator serves all of them: with one
each, a step would read the operator 512 times. Its channels' change, running means and running powers lie in a piece of
global memory that stays in the caches (Triton cannot index registers by a loop's variable, and three times 4608 numbers
for each of 8 channels are more than a multiprocessor has). A step walks blocks of weights: gradient as a product of
tiles with the slopes, Adam's update, and, where all pixels are one tile, what the new weights add to the output, while
the operator's tile is at hand; with more pixels the outputs take a second walk. Where it projects, the output comes
from the basis maps instead. Products are of float32 numbers in three TF32 ones ("tf32x3"), which is float32 level.

**Floor**, I inputs, T taps, P pixels, O channels: 4 I T P O operations and about 16 I T O for Adam per step, and I T P
numbers of the operator for each program. 512 -> 512 channels, 3x3, 10x10 and 2001 steps: 1.9 TFLOP, times three in
TF32, and 0.24 TB of the operator at 8 channels a program, from the level-2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops.fit_projected_op.problem import BETA1, BETA2, EPSILON, FitProjectedProblem
from .launching import launch_kernel
from .tuning import choose

RANKS = 16  # directions of a tile
_RANKS = tl.constexpr(RANKS)
# one minus a rounded beta would be off by 5e-5
_REST1, _BETA2, _REST2, _EPSILON = map(tl.constexpr, (1 - BETA1, BETA2, 1 - BETA2, EPSILON))


@triton.jit
def _change_rows(scratch, first, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """Where rows first, first + 1, ... of an array [rows, CHANNELS] of the program's own are."""
    return scratch + (first + tl.arange(0, COUNT))[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@triton.jit
def _outputs(
    maps,
    change,
    rows,
    first,
    width,
    COUNT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum over rows of maps[row, p] change[row, c] for a tile of pixels from `first` on."""
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    p = first + tl.arange(0, PIXELS)
    for start in range(0, rows, COUNT):
        row = (start + tl.arange(0, COUNT)).to(tl.int64)
        tile = tl.load(maps + row[:, None] * width + p[None, :])
        part = tl.load(_change_rows(change, start, COUNT, CHANNELS))
        total = tl.dot(tl.trans(tile), part, total, input_precision=PRECISION)
    return total


# inputs, width and stride are multiples of 16 by the launch: only where Triton is told does it read 16 bytes at a time
@triton.jit(
    do_not_specialize=[
        "channels",
        "taps",
        "ranks",
        "pixels",
        "shift_channel",
        "shift_pixel",
        "steps",
        "project_every",
    ]
)
def fit_kernel(
    maps,  # [taps, inputs, width]: the operator; inputs and pixels padded with zeros to whole tiles
    base,
    target,
    value,
    shift,  # [channels, pixels]
    weight,  # [taps, inputs, channels], with DEMODULATED
    square,  # [inputs]: the squared style
    directions,  # [ranks, inputs], padded to whole tiles
    basis,  # [taps, ranks, width]: the directions' maps
    rates,  # [steps, 2]: the step size, and one over the root of the second bias correction
    scratch,  # [programs, stride]
    losses,  # float64 [programs, steps]
    coefficients,  # [channels, taps, ranks], or without directions [channels, taps, inputs]
    channels,
    inputs,
    taps,
    ranks,
    pixels,
    width,
    shift_channel,
    shift_pixel,
    steps,
    project_every,
    stride,
    share,  # what a pixel counts in the loss
    eps,
    slope,
    gain,
    ABSOLUTE: tl.constexpr,
    DEMODULATED: tl.constexpr,
    SHIFT: tl.constexpr,
    PROJECTS: tl.constexpr,
    PROJECTS_GRADIENT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = taps * inputs
    first_channel = tl.program_id(0) * CHANNELS
    channel = first_channel + tl.arange(0, CHANNELS)
    there = channel < channels
    change = scratch + tl.program_id(0).to(tl.int64) * stride
    mean_at = change + rows * CHANNELS
    power_at = mean_at + rows * CHANNELS
    slopes_at = power_at + rows * CHANNELS
    goal_at = slopes_at + width * CHANNELS
    combined = goal_at + width * CHANNELS  # the coefficients [taps, ranks], and of the gradient
    leaning = combined + taps * ranks * CHANNELS
    for start in range(0, rows, ROWS):
        zeros = tl.zeros((ROWS, CHANNELS), tl.float32)
        tl.store(_change_rows(change, start, ROWS, CHANNELS), zeros)
        tl.store(_change_rows(mean_at, start, ROWS, CHANNELS), zeros)
        tl.store(_change_rows(power_at, start, ROWS, CHANNELS), zeros)
    tl.debug_barrier()

    bend = tl.zeros((CHANNELS,), tl.float32)  # the gradient by the squared norm, twice
    for step in range(0, steps + 1):  # before the first there is nothing to update, after the last no loss to report
        total = tl.zeros((PIXELS, CHANNELS), tl.float32)
        if step > 0:
            rate = tl.load(rates + 2 * (step - 1))
            correction = tl.load(rates + 2 * (step - 1) + 1)
            projects = PROJECTS and (((step - 1) % project_every == 0) | (step == steps))
            if PROJECTS_GRADIENT:  # the gradient's products with the directions, without the gradient
                for part in range(0, taps * ranks, _RANKS):
                    tap = part // ranks
                    rank = part - tap * ranks + tl.arange(0, _RANKS)
                    turn = tl.zeros((_RANKS, CHANNELS), tl.float32)
                    for first in range(0, pixels, PIXELS):
                        p = first + tl.arange(0, PIXELS)
                        tile = tl.load(basis + (part + tl.arange(0, _RANKS))[:, None].to(tl.int64) * width + p[None, :])
                        slopes = tl.load(_change_rows(slopes_at, first, PIXELS, CHANNELS))
                        turn = tl.dot(tile, slopes, turn, input_precision=PRECISION)
                    if DEMODULATED:
                        lean = tl.zeros((_RANKS, CHANNELS), tl.float32)
                        for start in range(0, inputs, ROWS):
                            i = start + tl.arange(0, ROWS)
                            tile = tl.load(directions + rank[:, None] * inputs + i[None, :])
                            whole = tl.load(
                                weight + (tap * inputs + i)[:, None].to(tl.int64) * channels + channel[None, :],
                                mask=there[None, :],
                                other=0.0,
                            ) + tl.load(_change_rows(change, tap * inputs + start, ROWS, CHANNELS))
                            lean = tl.dot(tile, tl.load(square + i)[:, None] * whole, lean, input_precision=PRECISION)
                        turn += bend[None, :] * lean
                    tl.store(_change_rows(leaning, part, _RANKS, CHANNELS), turn)
                tl.debug_barrier()
            for start in range(0, rows, ROWS):
                row = start + tl.arange(0, ROWS)
                tap = start // inputs
                i = row - tap * inputs
                gradient = tl.zeros((ROWS, CHANNELS), tl.float32)
                tile = tl.zeros((ROWS, PIXELS), tl.float32)
                if PROJECTS_GRADIENT:
                    for part in range(0, ranks, _RANKS):
                        rank = part + tl.arange(0, _RANKS)
                        turned = tl.load(directions + rank[None, :] * inputs + i[:, None])
                        turn = tl.load(_change_rows(leaning, tap * ranks + part, _RANKS, CHANNELS))
                        gradient = tl.dot(turned, turn, gradient, input_precision=PRECISION)
                    if ONE_TILE:
                        tile = tl.load(maps + row[:, None].to(tl.int64) * width + tl.arange(0, PIXELS)[None, :])
                else:
                    for first in range(0, pixels, PIXELS):
                        p = first + tl.arange(0, PIXELS)
                        tile = tl.load(maps + row[:, None].to(tl.int64) * width + p[None, :])
                        slopes = tl.load(_change_rows(slopes_at, first, PIXELS, CHANNELS))
                        gradient = tl.dot(tile, slopes, gradient, input_precision=PRECISION)
                before = tl.load(_change_rows(change, start, ROWS, CHANNELS))
                if DEMODULATED:
                    if not PROJECTS_GRADIENT:
                        whole = before + tl.load(
                            weight + row[:, None].to(tl.int64) * channels + channel[None, :],
                            mask=there[None, :],
                            other=0.0,
                        )
                        gradient += bend[None, :] * tl.load(square + i)[:, None] * whole
                mean = tl.load(_change_rows(mean_at, start, ROWS, CHANNELS))
                power = tl.load(_change_rows(power_at, start, ROWS, CHANNELS))
                mean += _REST1 * (gradient - mean)
                power = _BETA2 * power + _REST2 * gradient * gradient
                after = before - rate * mean / (tl.sqrt_rn(power) * correction + _EPSILON)
                tl.debug_barrier()  # a number may be held by several threads: all have read it before one writes
                tl.store(_change_rows(mean_at, start, ROWS, CHANNELS), mean)
                tl.store(_change_rows(power_at, start, ROWS, CHANNELS), power)
                tl.store(_change_rows(change, start, ROWS, CHANNELS), after)
                if ONE_TILE:
                    total = tl.dot(tl.trans(tile), after, total, input_precision=PRECISION)
            tl.debug_barrier()
            if PROJECTS:
                if projects:
                    for part in range(0, taps * ranks, _RANKS):
                        tap = part // ranks
                        rank = part - tap * ranks + tl.arange(0, _RANKS)
                        some = tl.zeros((_RANKS, CHANNELS), tl.float32)
                        for start in range(0, inputs, ROWS):
                            i = start + tl.arange(0, ROWS)
                            tile = tl.load(directions + rank[:, None] * inputs + i[None, :])
                            own = tl.load(_change_rows(change, tap * inputs + start, ROWS, CHANNELS))
                            some = tl.dot(tile, own, some, input_precision=PRECISION)
                        tl.store(_change_rows(combined, part, _RANKS, CHANNELS), some)
                    tl.debug_barrier()
                    for start in range(0, rows, ROWS):
                        tap = start // inputs
                        i = start - tap * inputs + tl.arange(0, ROWS)
                        own = tl.zeros((ROWS, CHANNELS), tl.float32)
                        for part in range(0, ranks, _RANKS):
                            rank = part + tl.arange(0, _RANKS)
                            turned = tl.load(directions + rank[None, :] * inputs + i[:, None])
                            some = tl.load(_change_rows(combined, tap * ranks + part, _RANKS, CHANNELS))
                            own = tl.dot(turned, some, own, input_precision=PRECISION)
                        tl.store(_change_rows(change, start, ROWS, CHANNELS), own)
                    tl.debug_barrier()
                    if ONE_TILE:
                        total = _outputs(basis, combined, taps * ranks, 0, width, _RANKS, PIXELS, CHANNELS, PRECISION)

        m = tl.full((CHANNELS,), 1.0, tl.float32)
        if DEMODULATED:
            norm = tl.zeros((ROWS, CHANNELS), tl.float32)
            for start in range(0, rows, ROWS):
                row = start + tl.arange(0, ROWS)
                whole = tl.load(_change_rows(change, start, ROWS, CHANNELS)) + tl.load(
                    weight + row[:, None].to(tl.int64) * channels + channel[None, :], mask=there[None, :], other=0.0
                )
                norm += tl.load(square + row % inputs)[:, None] * (whole * whole)
            m = 1.0 / tl.sqrt_rn(tl.sum(norm, 0) + eps)
        along = tl.zeros((CHANNELS,), tl.float32)
        loss = tl.zeros((), tl.float64)
        for first in range(0, pixels, PIXELS):
            p = first + tl.arange(0, PIXELS)
            inside = (p < pixels)[:, None] & there[None, :]
            place = channel[None, :].to(tl.int64) * pixels + p[:, None]
            if not ONE_TILE:
                total = _outputs(maps, change, rows, first, width, ROWS, PIXELS, CHANNELS, PRECISION)
            lin = tl.load(base + place, mask=inside, other=0.0) + total
            pre = m[None, :] * lin
            if SHIFT:
                at = channel[None, :].to(tl.int64) * shift_channel + p[:, None].to(tl.int64) * shift_pixel
                pre += tl.load(shift + at, mask=inside, other=0.0)
            steep = tl.where(pre > 0.0, gain, gain * slope)
            ours = steep * pre
            # Where the goal is the layer's own value, to the bit, it must not differ from ours by rounding: the l1
            # gradient there would be the sign of that.
            given = tl.load(target + place, mask=inside, other=0.0)
            own_value = tl.load(value + place, mask=inside, other=0.0)
            goals = _change_rows(goal_at, first, PIXELS, CHANNELS)
            if step == 0:
                tl.store(goals, tl.where(given == own_value, ours, given))
                tl.debug_barrier()
            goal = tl.load(goals)
            r = tl.where(ours == goal, 0.0, ours - goal)
            r = tl.where(inside, r, 0.0)
            if ABSOLUTE:
                turn = tl.where(r > 0.0, share, tl.where(r < 0.0, -share, r * 0.0))  # NaN stays NaN
                loss += tl.sum(tl.sum(tl.abs(r), 0), 0).to(tl.float64)
            else:
                turn = 2.0 * share * r
                loss += tl.sum(tl.sum(r * r, 0), 0).to(tl.float64)
            turn = turn * steep
            along += tl.sum(tl.where(inside, turn * lin, 0.0), 0)
            tl.store(_change_rows(slopes_at, first, PIXELS, CHANNELS), turn * m[None, :])
        bend = -along * m * m * m
        if step < steps:
            tl.store(losses + tl.program_id(0).to(tl.int64) * steps + step, loss)
        tl.debug_barrier()

    count = rows
    result = change
    if PROJECTS:
        count = taps * ranks
        result = combined
    for start in range(0, count, _RANKS):
        row = start + tl.arange(0, _RANKS)
        tl.store(
            coefficients + channel[None, :].to(tl.int64) * count + row[:, None],
            tl.load(_change_rows(result, start, _RANKS, CHANNELS)),
            mask=there[None, :] & (row < count)[:, None],
        )


@dataclass(frozen=True)
class Config:
    """How the kernel is compiled and spread.

    channels  of a program; 512 of them are 64 programs of 8
    rows      weights of a tile
    pixels    of a tile at most
    warps, stages
    """

    channels: int
    rows: int
    pixels: int
    warps: int
    stages: int


CANDIDATES = (Config(8, 32, 128, 8, 1), Config(4, 32, 128, 8, 1), Config(8, 16, 128, 8, 1), Config(8, 16, 128, 4, 1))
MEASURED_STEPS = 12  # of a descent that chooses among configurations
PRECISION = "tf32x3"


def _whole(count: int, tile: int) -> int:
    return triton.cdiv(count, tile) * tile


def launch(problem: FitProjectedProblem, progress=None, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """What ops.fit_projected returns, for float32. Nothing here waits for the GPU.

    config  in place of the one that was found the fastest
    """
    operator, directions = problem.operator, problem.directions
    inputs, *kernel, height, width = operator.shape
    taps, pixels = kernel[0] * kernel[1], height * width
    channels, rank = len(problem.base), len(directions)
    wide = {"dtype": torch.float64, "device": operator.device}
    if not channels:
        losses = torch.zeros(problem.steps, **wide) / 0.0  # a mean over nothing
        return problem.base.new_empty(0, rank or inputs, *kernel), losses
    operator = operator.reshape(inputs, taps, pixels)
    base, target, value = (part.flatten(1).contiguous() for part in (problem.base, problem.target, problem.value))
    shift = None if problem.shift is None else problem.shift.flatten(1)
    ranks = _whole(max(rank, 1), RANKS)
    basis = torch.einsum("ri,itp->trp", directions, operator) if rank else None
    count = torch.arange(1, problem.steps + 1, **wide)
    rates = torch.stack([problem.lr / (1 - BETA1**count), (1 - BETA2**count).rsqrt()], 1).float()
    weight = None if problem.weight is None else problem.weight.flatten(2).permute(2, 1, 0)

    def descend(config: Config, steps: int) -> tuple[Tensor, Tensor]:
        tile = min(config.pixels, max(16, triton.next_power_of_2(pixels)))
        extent, size = _whole(pixels, tile), _whole(inputs, config.rows)
        more, beyond = size - inputs, extent - pixels
        programs = triton.cdiv(channels, config.channels)
        stride = config.channels * (3 * taps * size + 2 * extent + 2 * taps * ranks)
        scratch = torch.empty(programs, stride, dtype=torch.float32, device=operator.device)
        losses = torch.empty(programs, steps, **wide)
        coefficients = base.new_empty(channels, taps, ranks if rank else size)
        launch_kernel(
            "fit_projected",
            fit_kernel,
            (programs,),
            F.pad(operator.transpose(0, 1), (0, beyond, 0, more)).contiguous(),
            base,
            target,
            value,
            shift,
            None if weight is None else F.pad(weight, (0, 0, 0, more)).contiguous(),
            None if problem.style is None else F.pad(problem.style.square(), (0, more)).contiguous(),
            F.pad(directions, (0, more, 0, ranks - rank)).contiguous() if rank else None,
            F.pad(basis, (0, beyond, 0, ranks - rank)).contiguous() if rank else None,
            rates,
            scratch,
            losses,
            coefficients,
            channels,
            size,
            taps,
            ranks,
            pixels,
            extent,
            *((0, 0) if shift is None else shift.stride()),
            steps,
            problem.project_every,
            stride,
            1 / base.numel(),
            float(problem.eps),
            float(problem.slope),
            float(problem.gain),
            ABSOLUTE=problem.loss == "l1",
            DEMODULATED=weight is not None,
            SHIFT=shift is not None,
            PROJECTS=rank > 0,
            PROJECTS_GRADIENT=problem.project_gradient,
            ONE_TILE=extent == tile,
            CHANNELS=config.channels,
            ROWS=config.rows,
            PIXELS=tile,
            PRECISION=PRECISION,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=False,  # a value and the goal that is equal to it must leave nothing
        )
        return coefficients, losses

    with torch.cuda.device_of(base):  # Triton launches on the current device
        if config is None:
            name = "-".join(str(triton.next_power_of_2(size)) for size in (channels, inputs * taps, pixels))
            few = min(problem.steps, MEASURED_STEPS)
            config = choose(operator.device, "fit_projected", name, CANDIDATES, lambda config: descend(config, few))
        for _ in [None] if progress is None else progress(iter([(0, 1)]), 1):
            coefficients, losses = descend(config, problem.steps)
    coefficients = coefficients[..., : rank or inputs].transpose(1, 2)
    return coefficients.reshape(channels, rank or inputs, *kernel), losses.sum(0) / base.numel()
