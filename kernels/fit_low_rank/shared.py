"""What the channels of an edit share: the scale of its unknowns, its pixels' weights, and the quadratic forms in scaled
unknowns. Two launches in place of a dozen small operations of torch, each of which takes as long to launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_tile(pixel_weights, edit, p, pixels, WEIGHTED: tl.constexpr):
    """Those of a tile of pixels, float64, not yet divided by their sum."""
    inside = p < pixels
    if WEIGHTED:
        weight = tl.load(pixel_weights + edit * pixels + p, mask=inside, other=0.0)
    else:
        weight = tl.where(inside, 1.0, 0.0).to(tl.float64)
    return weight


@triton.jit(do_not_specialize=["unknowns", "pixels"])
def share_kernel(
    basis,  # [edits, unknowns, pixels]
    pixel_weights,  # float64 [edits, pixels]
    weights,  # float64 [edits, pixels], or [pixels] where all edits have the same: their sum is 1
    inverse_size,  # float64 [edits, blocks * BLOCK]
    unknowns,
    pixels,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One block of unknowns of one edit: 1 / root mean square of their rows; 1 of a row of zeros, 0 of none."""
    edit = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    for first in range(0, pixels, PIXELS):
        p = first + tl.arange(0, PIXELS)
        total += tl.sum(weight_tile(pixel_weights, edit, p, pixels, WEIGHTED), 0)
    total = tl.where(total == 0.0, 1.0, total)
    squares = tl.zeros((BLOCK,), tl.float64)
    own = weights
    writer = block  # 0: the program that writes the weights
    if WEIGHTED:
        own += edit * pixels
    else:
        writer += tl.program_id(0)
    for first in range(0, pixels, PIXELS):
        p = first + tl.arange(0, PIXELS)
        weight = weight_tile(pixel_weights, edit, p, pixels, WEIGHTED) / total
        if writer == 0:
            tl.store(own + p, weight, mask=p < pixels)
        row = tl.load(
            basis + (edit * unknowns + rows)[:, None] * pixels + p[None, :],
            mask=(rows < unknowns)[:, None] & (p < pixels)[None, :],
            other=0.0,
        ).to(tl.float64)
        squares += tl.sum(weight[None, :] * (row * row), 1)
    size = tl.sqrt(squares)
    size = tl.where(size > 0.0, size, 1.0)  # also of NaN
    blocks = tl.num_programs(1)
    tl.store(inverse_size + edit * blocks * BLOCK + rows, tl.where(rows < unknowns, 1.0 / size, 0.0))


@triton.jit
def scale_row(matrix, scaled, row_scale, own, edit, rows, unknowns, BLOCK: tl.constexpr):
    """A block of rows of one edit's matrix [unknowns, unknowns], in scaled unknowns."""
    start = edit * unknowns * unknowns
    for first in range(0, unknowns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        place = start + rows[:, None] * unknowns + columns[None, :]
        inside = (rows < unknowns)[:, None] & (columns < unknowns)[None, :]
        tile = tl.load(matrix + place, mask=inside, other=0.0)
        tl.store(scaled + place, tile * (row_scale[:, None] * tl.load(own + columns)[None, :]), mask=inside)


@triton.jit(do_not_specialize=["unknowns", "channels"])
def scale_kernel(
    quadratic,  # float64 [edits, unknowns, unknowns]
    penalty,  # likewise
    constant,  # float64 [edits, channels]
    inverse_size,  # float64 [edits, blocks * BLOCK]
    scaled_quadratic,
    scaled_penalty,
    marked,  # float64 [edits, channels]: the constants, NaN where the edit's quadratic form is not finite
    unknowns,
    channels,
    DEMODULATED: tl.constexpr,
    PENALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One block of rows of one edit's forms; the last program of an edit looks at its constants."""
    edit = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.num_programs(1) - 1
    own = inverse_size + edit * blocks * BLOCK
    if block < blocks:
        rows = block * BLOCK + tl.arange(0, BLOCK)
        row_scale = tl.load(own + rows)
        if DEMODULATED:
            scale_row(quadratic, scaled_quadratic, row_scale, own, edit, rows, unknowns, BLOCK)
        if PENALISED:
            scale_row(penalty, scaled_penalty, row_scale, own, edit, rows, unknowns, BLOCK)
    elif DEMODULATED:
        # without a change the quadratic form does not count, unless it is not finite
        mark = tl.zeros((CHUNK,), tl.float64)
        numbers = unknowns * unknowns
        for first in range(0, numbers, CHUNK):
            place = first + tl.arange(0, CHUNK)
            mark += 0.0 * tl.load(quadratic + edit * numbers + place, mask=place < numbers, other=0.0)
        whole = tl.sum(mark, 0)
        for first in range(0, channels, CHUNK):
            place = first + tl.arange(0, CHUNK)
            inside = place < channels
            number = tl.load(constant + edit * channels + place, mask=inside, other=0.0)
            tl.store(marked + edit * channels + place, number + whole, mask=inside)
