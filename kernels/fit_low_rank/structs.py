"""What the functions of a program hand to each other, in place of dozens of arguments.

Triton takes a NamedTuple apart when it compiles, so it costs nothing. Constants stay constants only in a tuple that is
made where it is passed on: an assignment would turn them into numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Mode(NamedTuple):
    """Constants that a kernel is compiled for."""

    ABSOLUTE: tl.constexpr  # the loss is l1
    ROUNDED: tl.constexpr  # the slope is not 1: there is a kink to round
    DEMODULATED: tl.constexpr
    PENALISED: tl.constexpr
    SHIFT: tl.constexpr
    GRAM: tl.constexpr  # there is one
    DUAL_FORM: tl.constexpr  # linear systems are over pixels, as these are fewer
    BLOCK: tl.constexpr  # unknowns, and rows of the linear systems' tiles
    TILE: tl.constexpr  # pixels of one product for the normal equations
    PIXELS: tl.constexpr  # pixels of the other passes


class Sizes(NamedTuple):
    """Counts, and how many blocks of unknowns, blocks of the linear system and tiles of pixels they make."""

    unknowns: tl.tensor
    pixels: tl.tensor
    order: tl.tensor  # of the linear system: unknowns, or pixels in dual form
    blocks: tl.tensor
    order_blocks: tl.tensor
    tiles: tl.tensor


class Given(NamedTuple):
    """What a kernel is given: pointers as ops/fit_low_rank_op/problem.py names and shapes them, and strides."""

    basis: tl.tensor
    base: tl.tensor
    target: tl.tensor
    shift: tl.tensor
    constant: tl.tensor
    linear: tl.tensor
    quadratic: tl.tensor  # in scaled unknowns
    weights: tl.tensor  # float64 [edits, pixels], sum 1
    penalty: tl.tensor  # in scaled unknowns
    penalty_scale: tl.tensor
    inverse_size: tl.tensor  # float64 [edits, blocks * BLOCK]
    gram: tl.tensor  # float64 [edits, ...], see Channel
    channels: tl.tensor
    weight_stride: tl.tensor
    shift_edit: tl.tensor
    shift_channel: tl.tensor
    shift_pixel: tl.tensor
    slope: tl.tensor
    gain: tl.tensor


class Channel(NamedTuple):
    """What one channel's fit reads; pointers that a mode does not need point anywhere."""

    basis: tl.tensor  # [unknowns, pixels] in its own scale
    inverse_size: tl.tensor  # float64 [blocks * BLOCK]: times this it has unit root mean square
    base: tl.tensor  # [pixels]
    target: tl.tensor
    weights: tl.tensor  # float64 [pixels], sum 1
    shift: tl.tensor
    shift_pixel: tl.tensor  # the shift's stride
    constant: tl.tensor  # float64 number; linear and quadratic come with it
    linear: tl.tensor  # float64 [unknowns] in the unknowns' own scale
    quadratic: tl.tensor  # float64 [unknowns, unknowns] in scaled unknowns
    penalty: tl.tensor  # float64 [unknowns, unknowns] in scaled unknowns
    penalty_scale: tl.tensor  # float64 number
    gram: tl.tensor  # float64, in scaled unknowns: dual form basis^T basis; exact the normal equations
    slope: tl.tensor
    gain: tl.tensor


class Point(NamedTuple):
    """One of the two points that a fit goes back and forth between, the present one and the trial."""

    x: tl.tensor  # [unknowns]
    dm: tl.tensor  # [unknowns]: the gradient of m
    penalised: tl.tensor  # [unknowns]: penalty x
    lin: tl.tensor  # [pixels]


class Scratch(NamedTuple):
    """A program's piece of global memory, in float64: two squares of tiles, then vectors in this order.

    x, dm, penalised and lin are pairs: one belongs to the present point and one to the trial, and they change places
    when it is taken.
    """

    matrix: tl.tensor
    factor: tl.tensor
    right: tl.tensor  # [order]: right-hand side
    pivots: tl.tensor
    half: tl.tensor  # half-way solution
    solution: tl.tensor
    x: tl.tensor  # [2, unknowns]
    dm: tl.tensor
    penalised: tl.tensor
    step: tl.tensor  # [unknowns]
    best_x: tl.tensor
    gradient: tl.tensor
    leaning: tl.tensor
    trial_x: tl.tensor
    quadratic_x: tl.tensor  # quadratic times trial_x
    penalty_x: tl.tensor  # penalty times trial_x
    lin: tl.tensor  # [2, pixels]
    dual: tl.tensor  # [pixels]
    slopes: tl.tensor
    curvature: tl.tensor
    turned: tl.tensor


class Results(NamedTuple):
    """Where the results of one channel go."""

    coefficients: tl.tensor
    loss: tl.tensor
    initial_loss: tl.tensor
    iterations: tl.tensor
    status: tl.tensor


class Pace(NamedTuple):
    """When a fit ends, and how fast its smoothing shrinks until then."""

    max_iterations: tl.tensor
    tolerance: tl.tensor
    slow_rate: tl.tensor
    slow_rate_well: tl.tensor
    fast_rate_well: tl.tensor


ORDER_VECTORS, UNKNOWN_VECTORS, PIXEL_VECTORS = 4, 13, 6  # of Scratch


def scratch_size(unknowns: int, pixels: int, order: int, block: int, tile: int) -> int:
    """Float64 numbers of one program's piece of scratch: as `scratch_of` lays it out."""
    size, order_size = triton.cdiv(unknowns, block) * block, triton.cdiv(order, block) * block
    extent = triton.cdiv(pixels, tile) * tile
    return 2 * order_size**2 + ORDER_VECTORS * order_size + UNKNOWN_VECTORS * size + PIXEL_VECTORS * extent


@triton.jit
def sizes_of(unknowns, pixels, mode):
    order = pixels if mode.DUAL_FORM else unknowns
    blocks = tl.cdiv(unknowns, mode.BLOCK)
    return Sizes(unknowns, pixels, order, blocks, tl.cdiv(order, mode.BLOCK), tl.cdiv(pixels, mode.PIXELS))


@triton.jit
def scratch_of(start, sizes, mode):
    order_size = sizes.order_blocks * mode.BLOCK
    size = sizes.blocks * mode.BLOCK
    extent = sizes.tiles * mode.PIXELS
    factor = start + order_size * order_size
    right = factor + order_size * order_size
    pivots = right + order_size
    half = pivots + order_size
    solution = half + order_size
    x = solution + order_size
    dm = x + 2 * size
    penalised = dm + 2 * size
    step = penalised + 2 * size
    best_x = step + size
    gradient = best_x + size
    leaning = gradient + size
    trial_x = leaning + size
    quadratic_x = trial_x + size
    penalty_x = quadratic_x + size
    lin = penalty_x + size
    dual = lin + 2 * extent
    slopes = dual + extent
    curvature = slopes + extent
    turned = curvature + extent
    return Scratch(
        start,
        factor,
        right,
        pivots,
        half,
        solution,
        x,
        dm,
        penalised,
        step,
        best_x,
        gradient,
        leaning,
        trial_x,
        quadratic_x,
        penalty_x,
        lin,
        dual,
        slopes,
        curvature,
        turned,
    )


@triton.jit
def channel_of(given, task, sizes, mode):
    """The channel of this number, counted over all edits."""
    zero = tl.zeros((), tl.float64)
    edit = (task // given.channels).to(tl.int64)
    channel = (task % given.channels).to(tl.int64)
    at = task.to(tl.int64)
    base = given.base + at * sizes.pixels
    # where a mode has none, any pointer and number will do
    shift = base
    linear = given.weights
    quadratic = given.weights
    penalty = given.weights
    gram = given.weights
    constant = zero + 1.0
    penalty_scale = zero
    if mode.SHIFT:
        shift = given.shift + edit * given.shift_edit + channel * given.shift_channel
    if mode.DEMODULATED:
        quadratic = given.quadratic + edit * sizes.unknowns * sizes.unknowns
        linear = given.linear + at * sizes.unknowns
        constant = tl.load(given.constant + at)
    if mode.PENALISED:
        penalty = given.penalty + edit * sizes.unknowns * sizes.unknowns
        penalty_scale = tl.load(given.penalty_scale + at)
    if mode.GRAM:
        gram = given.gram + edit * sizes.order * sizes.order
    return Channel(
        given.basis + edit * sizes.unknowns * sizes.pixels,
        given.inverse_size + edit * (sizes.blocks * mode.BLOCK),
        base,
        given.target + at * sizes.pixels,
        given.weights + edit * given.weight_stride,
        shift,
        given.shift_pixel,
        constant,
        linear,
        quadratic,
        penalty,
        penalty_scale,
        gram,
        zero + given.slope,
        zero + given.gain,
    )


@triton.jit
def results_of(results, task, sizes):
    """Where those of the channel of this number go."""
    at = task.to(tl.int64)
    return Results(
        results.coefficients + at * sizes.unknowns,
        results.loss + at,
        results.initial_loss + at,
        results.iterations + at,
        results.status + at,
    )


@triton.jit
def point_of(scratch, number, sizes, mode):
    """The point 0 or 1."""
    size = sizes.blocks * mode.BLOCK
    return Point(
        scratch.x + number * size,
        scratch.dm + number * size,
        scratch.penalised + number * size,
        scratch.lin + number * (sizes.tiles * mode.PIXELS),
    )
