"""All steps of a program's channels in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import _RANKS, clear, compare, demodulate, lean, outputs, project, update
from .structs import Given, Mode, own_channels, own_rows, state_of


@triton.jit
def write(given, array, count, coefficients, mode):
    """Rows of State's array as coefficients [channels, count]."""
    channel, there = own_channels(given, mode)
    for start in range(0, count, _RANKS):
        row = start + tl.arange(0, _RANKS)
        tl.store(
            coefficients + channel[None, :].to(tl.int64) * count + row[:, None],
            tl.load(own_rows(array, start, _RANKS, mode)),
            mask=there[None, :] & (row < count)[:, None],
        )


@triton.jit
def descend(given, scratch, losses, coefficients, mode):
    """All steps of a program's channels."""
    state = state_of(scratch, given, mode)
    clear(given, state, mode)
    bend = tl.zeros((mode.CHANNELS,), tl.float32)  # the gradient by the squared norm, twice
    # before the first step there is nothing to update, after the last no loss to report
    for step in range(0, given.steps + 1):
        total = tl.zeros((mode.PIXELS, mode.CHANNELS), tl.float32)
        if step > 0:
            if mode.PROJECTS_GRADIENT:
                lean(given, state, bend, mode)
            total = update(given, state, step, bend, total, mode)
            if mode.PROJECTS:
                if ((step - 1) % given.project_every == 0) | (step == given.steps):
                    project(given, state, mode)
                    if mode.ONE_TILE:
                        count = given.taps * given.ranks
                        total = outputs(given.basis, state.combined, count, 0, given, _RANKS, mode)
        m = demodulate(given, state, mode)
        loss, along = compare(given, state, step, total, m, mode)
        bend = -along * m * m * m
        if step < given.steps:
            tl.store(losses + tl.program_id(0).to(tl.int64) * given.steps + step, loss)
        tl.debug_barrier()
    if mode.PROJECTS:
        write(given, state.combined, given.taps * given.ranks, coefficients, mode)
    else:
        write(given, state.change, given.taps * given.inputs, coefficients, mode)


# As many parameters as there are: Triton launches with numbers and pointers. inputs, width and stride are multiples of
# 16 by the launch: only where Triton is told does it read 16 bytes at a time.
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
    maps,
    base,
    target,
    value,
    shift,
    weight,
    square,
    directions,
    basis,
    rates,
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
    share,
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
    descend(
        Given(
            maps,
            base,
            target,
            value,
            shift,
            weight,
            square,
            directions,
            basis,
            rates,
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
            share,
            eps,
            slope,
            gain,
        ),
        scratch + tl.program_id(0).to(tl.int64) * stride,
        losses,
        coefficients,
        Mode(
            ABSOLUTE,
            DEMODULATED,
            SHIFT,
            PROJECTS,
            PROJECTS_GRADIENT,
            ONE_TILE,
            CHANNELS,
            ROWS,
            PIXELS,
            PRECISION,
        ),
    )
