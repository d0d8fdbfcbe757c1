"""What the functions of a program hand to each other, in place of dozens of arguments.

Triton takes a NamedTuple apart when it compiles, so it costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Mode(NamedTuple):
    """Constants that the kernel is compiled for. They stay constants where the tuple is made as it is passed on."""

    ABSOLUTE: tl.constexpr  # the loss is l1
    DEMODULATED: tl.constexpr
    SHIFT: tl.constexpr
    PROJECTS: tl.constexpr
    PROJECTS_GRADIENT: tl.constexpr
    ONE_TILE: tl.constexpr  # of pixels
    CHANNELS: tl.constexpr  # of a program
    ROWS: tl.constexpr  # weights of a tile
    PIXELS: tl.constexpr  # of a tile
    PRECISION: tl.constexpr


class Given(NamedTuple):
    """What the kernel is given."""

    maps: tl.tensor  # [taps, inputs, width]: the operator; inputs and pixels padded with zeros to whole tiles
    base: tl.tensor
    target: tl.tensor
    value: tl.tensor
    shift: tl.tensor  # [channels, pixels]
    weight: tl.tensor  # [taps, inputs, channels], with DEMODULATED
    square: tl.tensor  # [inputs]: the squared style
    directions: tl.tensor  # [ranks, inputs], padded to whole tiles
    basis: tl.tensor  # [taps, ranks, width]: the directions' maps
    rates: tl.tensor  # [steps, 2]: the step size, and one over the root of the second bias correction
    channels: tl.tensor
    inputs: tl.tensor
    taps: tl.tensor
    ranks: tl.tensor
    pixels: tl.tensor
    width: tl.tensor
    shift_channel: tl.tensor
    shift_pixel: tl.tensor
    steps: tl.tensor
    project_every: tl.tensor
    share: tl.tensor  # what a pixel counts in the loss
    eps: tl.tensor
    slope: tl.tensor
    gain: tl.tensor


class State(NamedTuple):
    """Arrays [rows, CHANNELS] of a program's own; a row is a weight or a pixel."""

    change: tl.tensor  # [taps, inputs]
    mean: tl.tensor  # [taps, inputs]: Adam's running mean of the gradient
    power: tl.tensor  # [taps, inputs]: and of its square
    slopes: tl.tensor  # [width]: the gradient by the linear output
    goal: tl.tensor  # [width]
    combined: tl.tensor  # [taps, ranks]: the change's products with the directions: the coefficients
    leaning: tl.tensor  # [taps, ranks]: the gradient's


def scratch_size(taps: int, inputs: int, ranks: int, width: int, channels: int) -> int:
    """Numbers of a program's State."""
    return channels * (3 * taps * inputs + 2 * width + 2 * taps * ranks)


@triton.jit
def state_of(scratch, given, mode):
    rows = given.taps * given.inputs * mode.CHANNELS
    mean = scratch + rows
    power = mean + rows
    slopes = power + rows
    goal = slopes + given.width * mode.CHANNELS
    combined = goal + given.width * mode.CHANNELS
    leaning = combined + given.taps * given.ranks * mode.CHANNELS
    return State(scratch, mean, power, slopes, goal, combined, leaning)


@triton.jit
def own_channels(given, mode):
    """A program's channels, and which of them there are."""
    channel = tl.program_id(0) * mode.CHANNELS + tl.arange(0, mode.CHANNELS)
    return channel, channel < given.channels


@triton.jit
def own_rows(array, first, COUNT: tl.constexpr, mode):
    """Where rows first, first + 1, ... of one of State's arrays are."""
    return array + (first + tl.arange(0, COUNT))[:, None] * mode.CHANNELS + tl.arange(0, mode.CHANNELS)[None, :]
