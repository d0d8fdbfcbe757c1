"""C += sum of k k^T on a GPU: features [N, C, H, W] or [N, C], read where they lie; lower triangle only.

A first correct version: one program per tile of the lower triangle and slice of the positions. It adds
products of 32 positions (float32, or exact half-precision products summed in float32) to a float64 tile.
Slices are added up in a fixed order, so the same features on the same kind of GPU give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_interpreted

BLOCK_POSITIONS = 32  # longer float32 sums drift where a channel is constant; see csrc/second_moment_isa.h
PROGRAMS = 512  # about as many as fill a large GPU; a constant, so that results do not depend on the device


@triton.jit
def second_moment_kernel(
    features,  # pointer to [N, C, H, W]
    partials,  # pointer to float64 [slices, C, C]; lower tiles are written
    channels,
    positions,  # N * H * W
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    steps,  # blocks of positions per slice
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDEN: tl.constexpr,  # only for Triton's interpreter, which multiplies bfloat16 bits as integers
):
    tile = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    row = 0  # tile number -> (row, column) of the lower triangle; at most channels / BLOCK_C steps
    before = 0
    while before + row + 1 <= tile:
        before += row + 1
        row += 1
    column = tile - before

    # int64 throughout: a batch of maps easily has more than 2^31 elements
    rows = row.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    columns = column.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    total = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float64)
    for step in range(0, steps):
        p = (part * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
        w = p % width
        h = (p // width) % height
        n = p // width // height
        offset = n * stride_n + h * stride_h + w * stride_w
        valid = p < positions
        a = tl.load(
            features + rows[:, None] * stride_c + offset[None, :],
            mask=(rows < channels)[:, None] & valid[None, :],
            other=0.0,
        )
        b = tl.load(
            features + columns[None, :] * stride_c + offset[:, None],
            mask=(columns < channels)[None, :] & valid[:, None],
            other=0.0,
        )
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        # "ieee": Triton's default would round float32 to TF32
        total += tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32).to(tl.float64)
    target = partials + (part * channels + rows[:, None]) * channels + columns[None, :]
    tl.store(target, total, mask=(rows < channels)[:, None] & (columns < channels)[None, :])


def second_moment(features: Tensor, out: Tensor) -> None:
    """Add the second moment of ``features`` to the lower triangle of ``out``, and mirror it."""
    n, channels, height, width = (*features.shape, 1, 1)[:4]
    stride_n, stride_c, stride_h, stride_w = (*features.stride(), 0, 0)[:4]
    positions = n * height * width
    if positions == 0:
        out.copy_(out.tril() + out.tril(-1).T)
        return
    block = 64 if channels > 32 else 32 if channels > 16 else 16
    blocks = triton.cdiv(channels, block)
    tiles = blocks * (blocks + 1) // 2
    steps_in_all = triton.cdiv(positions, BLOCK_POSITIONS)
    steps = triton.cdiv(steps_in_all, max(1, PROGRAMS // tiles))
    slices = triton.cdiv(steps_in_all, steps)
    partials = torch.zeros(slices, channels, channels, dtype=torch.float64, device=features.device)
    with torch.cuda.device_of(features):  # Triton launches on the current device
        second_moment_kernel[(tiles, slices)](
            features, partials, channels, positions, height, width, stride_n, stride_c, stride_h, stride_w, steps,
            BLOCK_C=block, BLOCK_P=BLOCK_POSITIONS, WIDEN=triton_interpreted(), num_warps=8,
        )  # fmt: skip
    lower = (out + partials.sum(0)).tril()
    out.copy_(lower + lower.tril(-1).T)
