"""Sums of the bits of many tensors on a GPU, in one launch: what tells that none of them has changed.

Every 32-bit word is mixed with its place, one to one, into 64 bits, and these are added up, wrapping around: one word
that changes always changes the sum, and other changes leave it in one case of 2^64. It guards against accidents, not
against forgery.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch_kernel, on_device_of

WORDS = 1 << 14  # of a program
STEP = 1 << 11  # read at a time
_PLACE = tl.constexpr(0x1E3779B97F4A7C15)  # odd, as are the others: multiplied by them no two numbers become one
_FIRST = tl.constexpr(0x2127599BF4325C37)
_SECOND = tl.constexpr(0x4CF5AD432745937F)


@triton.jit
def checksum_kernel(
    table,  # int64 [programs, 3]: where a piece of a tensor begins, how many words it has, and how many were before it
    sums,  # int64 [programs]
    STEP: tl.constexpr,
):
    entry = table + tl.program_id(0) * 3
    start = tl.load(entry).to(tl.pointer_type(tl.int32))
    words = tl.load(entry + 1)
    before = tl.load(entry + 2)
    total = tl.zeros((STEP,), tl.uint64)
    for first in range(0, words, STEP):
        place = first + tl.arange(0, STEP)
        inside = place < words
        word = tl.load(start + place, mask=inside, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        number = word + (before + place).to(tl.uint64) * _PLACE
        number = (number ^ (number >> 32)) * _FIRST
        number = (number ^ (number >> 29)) * _SECOND
        number = number ^ (number >> 32)
        total += tl.where(inside, number, 0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0).to(tl.int64, bitcast=True))


def pieces(words: Sequence[int], addresses: Sequence[int]) -> np.ndarray:
    """The kernel's table for tensors of so many words at these addresses."""
    counts = np.asarray(words, np.int64)
    many = -(-counts // WORDS)  # pieces of each tensor
    number = np.arange(many.sum()) - np.repeat(many.cumsum() - many, many)  # of a piece in its tensor
    before = number * WORDS
    start = np.repeat(np.asarray(addresses, np.int64), many) + 4 * before
    return np.stack([start, np.minimum(np.repeat(counts, many) - before, WORDS), before], 1)


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """The sums of the pieces of `tensors`, int64, on their device, which is not waited for. They are contiguous, lie at
    multiples of 4 bytes, and have a multiple of 4 bytes each."""
    first = tensors[0]
    table = torch.from_numpy(pieces([each.nbytes // 4 for each in tensors], [each.data_ptr() for each in tensors]))
    sums = torch.empty(len(table), dtype=torch.int64, device=first.device)
    if not len(table):
        return sums
    with on_device_of(first):
        if first.is_cuda:  # from pinned memory, so that the host does not wait
            table = table.pin_memory().to(first.device, non_blocking=True)
        launch_kernel(
            "checksum", checksum_kernel, (len(table),), table, sums, STEP=STEP, num_warps=4, enable_fp_fusion=False
        )
    return sums
