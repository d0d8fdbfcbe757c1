"""C += sum of k k^T on a GPU: features [N, C, H, W] or [N, C], read where they lie; lower triangle only.

**Work.** The lower triangle of C is cut into square tiles, the positions (batch x pixels) into blocks, and the blocks
are dealt out to slices in turn. One program per tile and slice: as many slices as fill every multiprocessor, whatever
the number of channels (512 channels have 10 tiles of 128, a large GPU 132 multiprocessors). A program keeps its tile
in registers to the end, and the tiles of one slice walk the same blocks at the same time, so that the level-2 cache
serves all but the first of them. Every program then writes one float32 tile, and a second kernel adds these tiles up
in float64 in a fixed order, adds them to C and mirrors it: no atomics, the same bits from run to run.

**Precision.** Tensor cores truncate where they add, and a diagonal only adds positive numbers, so their float32 sums
are short runs (``RUN`` blocks) that go into a compensated (Kahan) float32 sum. That costs the registers of a float64
sum, four additions at full rate, and no conversions to float64, of which a multiprocessor does 2 to 16 per clock.
Modes for float32 (16-bit types multiply exactly in all of them):

tf32   operands cut to 11 significant bits by the tensor cores: relative error about 1e-3
x3     x = h + l, with h the nearest number of 11 bits: h h' + h l' + l h', three products. What is dropped,
       l l' and the bits of l that are cut, is below 2^-21 |x x'|: float32-level. (bfloat16 in place of TF32 is twice
       as fast, but would take six products for as many bits.) With a single tile two products do, as
       H H' + H L' + L H' is the symmetric part of H (H + 2 L)': the second kernel takes it.
ieee   float32 multiply-adds, without tensor cores
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted
from .launching import keep_plan, launch_kernel, on_device_of, plan_of, power_of_2
from .tuning import choose, multiprocessors_of

MODES = ("tf32", "x3", "ieee")
# How the second kernel adds up a tile's slices: the part of a tile that a program has, and how many slices it reads at
# a time. With few slices there are many tiles, or little to do.
FEW_SLICES, MANY_SLICES = (16, 32, 4), (8, 8, 32)


@triton.jit
def cdiv(a, b):
    """a / b, rounded up, for a >= 1; without a sum, which int32 might not hold: positions go up to 2^31 - 1 there."""
    return (a - 1) // b + 1


@triton.jit
def nearest_tf32(x):
    """The nearest float32 with 11 significant bits. NaN may become anything here, but stays in x minus this."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, MODE: tl.constexpr, SINGLE: tl.constexpr, total):
    """total + a @ b, or with SINGLE (b is a transposed) a matrix whose symmetric part that is."""
    if MODE == "x3":
        a_high = nearest_tf32(a)
        b_high = nearest_tf32(b)
        b_low = b - b_high
        if SINGLE:
            total = tl.dot(a_high, 2 * b_low, total, input_precision="tf32")
        else:
            total = tl.dot(a - a_high, b_high, total, input_precision="tf32")
            total = tl.dot(a_high, b_low, total, input_precision="tf32")
        total = tl.dot(a_high, b_high, total, input_precision="tf32")
    else:
        total = tl.dot(a, b, total, input_precision=MODE)
    return total


@triton.jit
def lower_tile(number):
    """Row and column of a tile of the lower triangle; in at most channels / BLOCK_C steps."""
    row = 0
    before = 0
    while before + row + 1 <= number:
        before += row + 1
        row += 1
    return row, number - before


@triton.jit
def places(
    start,
    pixels,
    width,
    stride_n,
    stride_h,
    stride_w,
    BLOCK_P: tl.constexpr,
    FLAT: tl.constexpr,
    LONG: tl.constexpr,
    NEAR: tl.constexpr,
):
    """The sample of position `start`, and where it and the positions after it lie from that sample on."""
    first = start // pixels  # sample
    ahead = start - first * pixels
    if not LONG:
        ahead = ahead.to(tl.int32)
    ahead += tl.arange(0, BLOCK_P)
    sample = ahead // pixels
    pixel = ahead - sample * pixels
    if not NEAR:
        sample = sample.to(tl.int64)
        pixel = pixel.to(tl.int64)
    if FLAT:
        offset = pixel * stride_w
    else:
        h = pixel // width
        offset = h * stride_h + (pixel - h * width) * stride_w
    offset += sample * stride_n
    return first, offset


@triton.jit
def add(total, excess, term):
    """total + term, and by how much that is too large."""
    term -= excess
    wide = total + term
    return wide, (wide - total) - term


@triton.jit
def second_moment_kernel(
    features,  # pointer to [N, C, H, W]
    partials,  # pointer to float32 [slices, tiles, BLOCK_C, BLOCK_C]
    channels,
    positions,  # N * H * W
    pixels,  # H * W
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RUN: tl.constexpr,  # blocks that tensor cores add up before the sum is moved to the wide one
    MODE: tl.constexpr,
    SINGLE: tl.constexpr,  # channels <= BLOCK_C
    FLAT: tl.constexpr,  # a map's pixels are stride_w apart throughout
    LONG: tl.constexpr,  # pixels need int64
    NEAR: tl.constexpr,  # what a program reads at a time lies within 2^31 numbers
    WIDEN: tl.constexpr,  # only for Triton's interpreter, which multiplies bfloat16 bits as integers
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    slices = tl.num_programs(1)
    row, column = lower_tile(tile)

    # A batch of maps easily has more than 2^31 elements, so blocks start at int64 addresses; within them int32 will do,
    # and takes half the registers, of which there are too few where every number has an address of its own.
    rows = row * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = column * BLOCK_C + tl.arange(0, BLOCK_C)
    if NEAR:
        row_starts = rows * stride_c
        column_starts = columns * stride_c
    else:
        row_starts = rows.to(tl.int64) * stride_c
        column_starts = columns.to(tl.int64) * stride_c
    run = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    excess = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)  # by which `total` is too large

    blocks = cdiv(positions, BLOCK_P)
    for step in range(0, tl.cdiv(blocks - part, slices)):
        start = (part + step * slices).to(tl.int64) * BLOCK_P
        first, offset = places(start, pixels, width, stride_n, stride_h, stride_w, BLOCK_P, FLAT, LONG, NEAR)
        block = features + first * stride_n
        valid = tl.arange(0, BLOCK_P) < positions - start
        a = tl.load(
            block + (row_starts[:, None] + offset[None, :]), mask=(rows < channels)[:, None] & valid[None, :], other=0.0
        )
        if WIDEN:
            a = a.to(tl.float32)
        if SINGLE:
            b = tl.trans(a)
        else:
            b = tl.load(
                block + (column_starts[None, :] + offset[:, None]),
                mask=(columns < channels)[None, :] & valid[:, None],
                other=0.0,
            )
            if WIDEN:
                b = b.to(tl.float32)
        run = product(a, b, MODE, SINGLE, run)
        if step % RUN == RUN - 1:
            total, excess = add(total, excess, run)
            run = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    number = part.to(tl.int64) * tl.num_programs(0) + tile
    inside = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(partials + number * (BLOCK_C * BLOCK_C) + inside, total + (run - excess))


@triton.jit(do_not_specialize=["slices"])  # which changes with the batch: a few compilations serve them all
def add_partials_kernel(
    partials,  # pointer to float32 [slices, tiles, BLOCK_C, BLOCK_C]
    out,  # pointer to float64 [C, C]
    channels,
    slices,
    BLOCK_C: tl.constexpr,
    SYMMETRISE: tl.constexpr,  # take the tiles' symmetric part
    HEIGHT: tl.constexpr,  # of the part of a tile that a program adds up
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,  # slices that are read at a time
):
    tile = tl.program_id(0)
    row, column = lower_tile(tile)
    across: tl.constexpr = BLOCK_C // WIDTH
    i = tl.program_id(1) // across * HEIGHT + tl.arange(0, HEIGHT)
    j = tl.program_id(1) % across * WIDTH + tl.arange(0, WIDTH)
    inside = i[:, None] * BLOCK_C + j[None, :]
    mirrored = j[None, :] * BLOCK_C + i[:, None]
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float64)
    for first in range(0, slices, TOGETHER):
        part = first + tl.arange(0, TOGETHER)
        start = partials + (part.to(tl.int64) * tl.num_programs(0) + tile) * (BLOCK_C * BLOCK_C)
        there = (part < slices)[:, None, None]
        terms = tl.load(start[:, None, None] + inside[None, :, :], mask=there, other=0.0).to(tl.float64)
        if SYMMETRISE:
            others = tl.load(start[:, None, None] + mirrored[None, :, :], mask=there, other=0.0).to(tl.float64)
            terms = (terms + others) * 0.5
        total += tl.sum(terms, 0)
    r = (row * BLOCK_C + i).to(tl.int64)
    c = (column * BLOCK_C + j).to(tl.int64)
    mask = (r < channels)[:, None] & (c[None, :] <= r[:, None])
    lower = out + (r[:, None] * channels + c[None, :])
    total += tl.load(lower, mask=mask, other=0.0)
    tl.store(lower, total, mask=mask)
    # Turned over in registers, so that here, too, neighbours are written next to each other.
    mask = (r < channels)[None, :] & (c[:, None] < r[None, :])
    tl.store(out + (c[:, None] * channels + r[None, :]), tl.trans(total), mask=mask)


@dataclass(frozen=True)
class SecondMomentConfig:
    """How the kernel is compiled and spread.

    block      channels of a tile
    positions  of one product
    run        products per run of tensor-core additions; run * positions <= 64 float32 or 256 half-precision keys
               keep the truncation within 1e-6 (tests/test_second_moment_triton.py has the arithmetic)
    warps, stages
    resident   programs of these that a multiprocessor runs at a time
    single     only for channels that one tile holds: as one of several it would spill
    """

    block: int
    positions: int
    run: int
    warps: int
    stages: int
    resident: int
    single: bool = False


_SMALL: dict[str, Any] = {"warps": 4, "stages": 3, "resident": 2}
_LARGE: dict[str, Any] = {"warps": 8, "stages": 3, "resident": 1}
_IEEE = (SecondMomentConfig(64, 32, 1, **_LARGE),)
# By compute capability's major number and mode ("half": 16-bit input). For maps as networks make them, NCHW or
# channels_last, these compile without register spills and fit as often as `resident` says: large tiles, which read
# least, and small ones, of which two fill the gaps in each other's work. Where nothing was measured the largest tile is
# used that the channels fill, the first of equals. What is missing spills: on sm_80 128 channels with 128 positions or
# with "x3", on sm_90 two products a run of 128 positions, on sm_100 one.
CANDIDATES: dict[int, dict[str, tuple[SecondMomentConfig, ...]]] = {
    8: {
        "half": (SecondMomentConfig(64, 128, 2, **_SMALL),),
        "tf32": (SecondMomentConfig(64, 64, 1, **_SMALL), SecondMomentConfig(128, 32, 1, **_LARGE)),
        "x3": (SecondMomentConfig(64, 32, 2, **_SMALL), SecondMomentConfig(64, 32, 1, **_SMALL)),
        "ieee": _IEEE,
    },
    9: {
        "half": (
            SecondMomentConfig(64, 128, 2, **_SMALL),
            SecondMomentConfig(128, 128, 1, **_LARGE),
            SecondMomentConfig(128, 64, 1, **_LARGE),
        ),
        "tf32": (SecondMomentConfig(64, 64, 1, **_SMALL), SecondMomentConfig(128, 32, 1, **_LARGE)),
        "x3": (
            SecondMomentConfig(64, 32, 2, **_SMALL),
            SecondMomentConfig(64, 64, 1, **_SMALL),
            SecondMomentConfig(128, 64, 1, **_LARGE, single=True),
        ),
        "ieee": _IEEE,
    },
    10: {
        "half": (
            SecondMomentConfig(64, 128, 2, **_SMALL),
            SecondMomentConfig(128, 128, 2, **_LARGE),
            SecondMomentConfig(128, 64, 2, **_LARGE),
        ),
        "tf32": (SecondMomentConfig(64, 32, 2, **_SMALL), SecondMomentConfig(128, 32, 2, **_LARGE)),
        "x3": (SecondMomentConfig(64, 32, 2, **_SMALL), SecondMomentConfig(128, 32, 2, **_LARGE)),
        "ieee": _IEEE,
    },
}
# Where numbers can only be read one by one, as in cropped maps, each has an address and a predicate of its own: these
# have registers for them, and do not spill either. (Two bytes are also too few to be copied without passing through
# registers.)
SCATTERED: dict[str, SecondMomentConfig] = {
    "half": SecondMomentConfig(64, 64, 4, warps=8, stages=3, resident=2),
    "tf32": SecondMomentConfig(64, 64, 1, **_SMALL),
    "x3": SecondMomentConfig(64, 32, 1, **_LARGE),
    "ieee": _IEEE[0],
}


def candidates(major: int, mode: str, channels: int, scattered: bool = False) -> tuple[SecondMomentConfig, ...]:
    """The configurations to choose from, the default first. `scattered`: numbers are read one by one."""
    if scattered:
        return (SCATTERED[mode],)
    table = CANDIDATES.get(major, CANDIDATES[8])[mode]  # others have what 8 has: mma.sync and 99 KiB or more
    fitting = [
        config
        for config in table
        if config.block <= max(64, power_of_2(channels)) and not (config.single and channels > config.block)
    ]
    return tuple(sorted(fitting, key=lambda config: -config.block))  # stable: of equal tiles the first stays first


@dataclass(frozen=True)
class Layout:
    """Where keys lie, with as few axes as say it: [samples, height, width] of sizes and of strides."""

    samples: int
    pixels: int
    width: int
    strides: tuple[int, int, int]
    flat: bool  # pixels are strides[2] apart throughout

    @classmethod
    def of(cls, features: Tensor) -> Layout:
        n, _, height, width = (*features.shape, 1, 1)[:4]
        stride_n, _, stride_h, stride_w = (*features.stride(), 0, 0)[:4]
        if width == 1:
            width, stride_w, height = height, stride_h, 1
        flat = height == 1 or stride_h == width * stride_w
        pixels = height * width
        if flat and (pixels == 1 or n == 1 or stride_n == pixels * stride_w):
            stride_w = stride_n if pixels == 1 else stride_w
            n, pixels, width = 1, n * pixels, n * pixels
        return cls(n, pixels, width, (stride_n, stride_h, stride_w), flat)

    def scattered(self, address: int, stride_c: int) -> bool:
        """Whether numbers have to be read one by one: Triton reads 16 bytes at a time where it sees that they lie in a
        row, and of sizes and strides all it looks at is whether they are 1 or multiples of 16."""
        stride_n, stride_h, stride_w = self.strides
        if stride_w == 1:
            sizes = [stride_c]
            sizes += [] if self.flat else [self.width, stride_h]
            sizes += [] if self.samples == 1 else [self.pixels, stride_n]
        elif stride_c == 1:
            sizes = [stride_w]
            sizes += [] if self.flat else [stride_h]
            sizes += [] if self.samples == 1 else [stride_n]
        else:
            return True
        return any(size % 16 for size in [address, *sizes])

    def near(self, stride_c: int, channels: int, positions: int) -> bool:
        """Whether int32 holds every distance from a block's first sample to what so many positions on have."""
        stride_n, stride_h, stride_w = self.strides
        along = self.pixels * stride_w if self.flat else self.pixels // self.width * stride_h + self.width * stride_w
        return channels * stride_c + min(self.samples, positions + 1) * stride_n + along < 2**31


@functools.lru_cache(maxsize=1024)
def slices_of(tiles: int, blocks: int, programs: int) -> int:
    """How many slices to cut `blocks` into, for a GPU that runs so many programs at a time.

    Full waves of programs, as few as keep the last one from being nearly empty: the time is that of the waves, each
    as long as a slice and what it takes to fill the pipeline and write the tile (about eight blocks).
    """
    choices = {min(max(1, waves * programs // tiles), blocks) for waves in range(1, 17)}

    def time(slices: int) -> int:
        return triton.cdiv(tiles * slices, programs) * (triton.cdiv(blocks, slices) + 8)

    return min(sorted(choices), key=time)


@dataclass(frozen=True)
class _Plan:
    """A call's two launches: the shape of the partial sums between them, and each as a function of its two tensors."""

    shape: tuple[int, ...]  # slices, tiles, block, block
    multiply: Callable[[Tensor, Tensor], None]
    add_up: Callable[[Tensor, Tensor], None]

    def run(self, features: Tensor, out: Tensor) -> None:
        partials = features.new_empty(self.shape, dtype=torch.float32)
        self.multiply(features, partials)
        self.add_up(partials, out)


def _partials(
    features: Tensor, mode: str, config: SecondMomentConfig, multiprocessors: int
) -> tuple[Tensor, Callable[..., None]]:
    """The partial sums [slices, tiles, block, block], and the launch again for other features and sums."""
    channels = features.shape[1]
    layout = Layout.of(features)
    positions = layout.samples * layout.pixels
    block = min(config.block, max(16, power_of_2(channels)))
    tiles = triton.cdiv(channels, block)
    tiles = tiles * (tiles + 1) // 2
    slices = slices_of(tiles, triton.cdiv(positions, config.positions), multiprocessors * config.resident)
    partials = torch.empty(slices, tiles, block, block, dtype=torch.float32, device=features.device)
    stride_n, stride_h, stride_w = layout.strides
    again = launch_kernel(
        "second_moment",
        second_moment_kernel,
        (tiles, slices),
        features,
        partials,
        channels,
        positions,
        layout.pixels,
        layout.width,
        stride_n,
        features.stride(1),
        stride_h,
        stride_w,
        BLOCK_C=block,
        BLOCK_P=config.positions,
        RUN=config.run,
        MODE="ieee" if mode == "half" else mode,
        SINGLE=tiles == 1,
        FLAT=layout.flat,
        LONG=layout.pixels + config.positions >= 2**31,
        NEAR=layout.near(features.stride(1), channels + block, config.positions),
        WIDEN=triton_interpreted(),
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,  # for "ieee"; from Triton 3.10 on it would not be so by itself
    )
    return partials, again


def configuration(features: Tensor, mode: str) -> SecondMomentConfig:
    """The configuration for such features on their GPU: measured once per kind of GPU and class of shapes."""
    channels = features.shape[1]
    layout = Layout.of(features)
    scattered = layout.scattered(features.data_ptr(), features.stride(1))
    if features.device.type != "cuda":
        return candidates(9, mode, channels, scattered)[0]
    properties = torch.cuda.get_device_properties(features.device)
    choices = candidates(properties.major, mode, channels, scattered)
    kind = "scattered" if scattered else "pixels" if layout.strides[2] == 1 else "channels"
    size = min(max((layout.samples * layout.pixels).bit_length(), 10), 20) // 2  # four times as many keys: a new class
    name = f"{str(features.dtype).removeprefix('torch.')}-{mode}-{kind}-{min(power_of_2(channels), 4096)}x{4**size}"
    return choose(
        features.device,
        "second_moment",
        name,
        choices,
        lambda config: _partials(features, mode, config, properties.multi_processor_count),
    )


def launch(features: Tensor, out: Tensor, precision: str, config: SecondMomentConfig | None = None) -> None:
    """Add the second moment of ``features`` to the lower triangle of ``out``, and mirror it.

    config  in place of the one that was found the fastest
    """
    if features.numel() == 0:
        out.copy_(out.tril() + out.tril(-1).T)
        return
    mode = precision if features.dtype == torch.float32 else "half"
    key = (
        "second_moment",
        features.device,
        features.dtype,
        features.shape,
        features.stride(),
        features.data_ptr() % 16,
        out.data_ptr() % 16,
        mode,
        config,
        triton_interpreted(),
    )
    with on_device_of(features):
        plan = plan_of(key)
        if plan is None:
            keep_plan(key, _first(features, out, mode, config))
        else:
            plan.run(features, out)


def _first(features: Tensor, out: Tensor, mode: str, config: SecondMomentConfig | None) -> _Plan:
    """The first call of its kind, and the plan of those that follow."""
    config = config or configuration(features, mode)
    partials, multiply = _partials(features, mode, config, multiprocessors_of(features.device))
    slices, tiles, block, _ = partials.shape
    height, width, together = FEW_SLICES if slices <= 2 * FEW_SLICES[2] else MANY_SLICES
    if triton_interpreted():  # where a program takes the same time whatever its size
        height, width = max(height, block // 2), block
    height, width = min(height, block), min(width, block)
    add_up = launch_kernel(
        "second_moment",
        add_partials_kernel,
        (tiles, block * block // (height * width)),
        partials,
        out,
        features.shape[1],
        slices,
        BLOCK_C=block,
        SYMMETRISE=mode == "x3" and tiles == 1,
        HEIGHT=height,
        WIDTH=width,
        TOGETHER=together,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return _Plan(tuple(partials.shape), multiply, add_up)
