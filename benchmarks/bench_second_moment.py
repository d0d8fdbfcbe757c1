"""Second moment of keys, C += X^T X from NCHW, against stock PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewrite_core.ops import second_moment

from .harness import Case, Contender, Problem, Yardstick

OP = "second_moment"
GRID = ((64, 128), (128, 64), (256, 64), (512, 32), (512, 16), (1024, 8))  # channels @ map
CHANNELS = ((1, 64), (4, 64), (16, 64), (32, 64), (48, 32), (96, 32), (200, 32), (2048, 8), (2048, 4))
FEW = ((256, 1), (512, 1), (1024, 1), (256, 2), (512, 2), (1024, 2))  # 8 keys and 32
HALF = ((64, 128), (256, 64), (512, 16))
QUICK = ((64, 16), (96, 8))
BATCH = 8
USUAL = ("addmm, permuted copy", "bmm on NCHW", "einsum")  # ways of stock
BLOCKS, RANK_ONE = "triangle of blocks, mm", "rank-1 updates"
WIDE = ("addmm to a float64 total", "mm, added to a float64 total")
RANK_ONE_KEYS = 64  # that the reference's way is timed on: with all of them a round would take minutes


def cases(quick: bool) -> list[Case]:
    groups = {"grid": QUICK} if quick else {"grid": GRID, "other channels": CHANNELS, "few keys": FEW, "bfloat16": HALF}
    return [
        Case(
            f"{channels}@{side}x{side} batch {BATCH}{' bfloat16' * (group == 'bfloat16')}",
            functools.partial(make, channels, side, torch.bfloat16 if group == "bfloat16" else torch.float32),
            group,
        )
        for group, shapes in groups.items()
        for channels, side in shapes
    ]


@functools.cache
def yardstick() -> Yardstick:
    """sgemm at a size that suits it."""
    size = 1024
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).unbind()
    return Yardstick("sgemm", lambda: torch.mm(left, right), 2.0 * size**3)


def expressions(features: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What users of torch write, by name: each adds the second moment to a total; the last two to a float64 one."""
    channels = features.shape[1]
    step = max(64, channels // 4)  # of the block-triangular loop: the best of 64, 128 and a quarter at most shapes

    def permuted(keys: Tensor) -> Tensor:
        return keys.float().permute(0, 2, 3, 1).reshape(-1, channels)

    def addmm(total: Tensor) -> Tensor:
        keys = permuted(features)
        return total.addmm_(keys.T, keys)

    def bmm(total: Tensor) -> Tensor:
        flat = features.float().flatten(2)
        return total.add_(torch.bmm(flat, flat.mT).sum(0))

    def einsum(total: Tensor) -> Tensor:
        keys = features.float()
        return total.add_(torch.einsum("nchw,ndhw->cd", keys, keys))

    def triangular(total: Tensor) -> Tensor:
        keys = features.float().transpose(0, 1).reshape(channels, -1)
        for start in range(0, channels, step):
            block = keys[start : start + step]
            total[start : start + step, : start + step].add_(torch.mm(block, keys[: start + step].T))
        lower = total.tril()
        return total.copy_(lower + lower.tril(-1).T)

    def rank_one(total: Tensor) -> Tensor:
        for key in permuted(features[:1])[:RANK_ONE_KEYS]:
            total.addr_(key, key)
        return total

    def wider(total: Tensor) -> Tensor:
        keys = permuted(features).double()
        return total.addmm_(keys.T, keys)

    def added(total: Tensor) -> Tensor:
        keys = permuted(features)
        return total.add_(keys.T @ keys)

    return {
        **dict(zip(USUAL, (addmm, bmm, einsum), strict=True)),
        BLOCKS: triangular,
        RANK_ONE: rank_one,
        **dict(zip(WIDE, (wider, added), strict=True)),
    }


def make(channels: int, side: int, dtype: torch.dtype, backend: str) -> Problem:
    """Keys as a leaky ReLU leaves them (mean not zero). Stock adds to a float32 total, as its users do; ours to a
    float64 one, which its interface fixes. Of few keys, reading and writing the total is most of the job, and a float64
    one is twice as long: there stock has one too, and what adds to a float32 total is aside. bfloat16 keys are widened
    by stock first: its own product would round."""
    generator = torch.Generator().manual_seed(channels + side)
    wide = torch.randn(BATCH, channels, side, side, generator=generator)
    features = torch.nn.functional.leaky_relu(wide, 0.2).to(dtype)
    rows = features.flatten(2).mT.reshape(-1, channels).double()  # for the oracle: stock pays for its own copies
    exact = rows.T @ rows
    count = len(rows)
    del rows, wide
    few = (channels, side) in FEW

    def contender(name: str, run: Callable[[Tensor], Tensor], kind: torch.dtype, **how: Any) -> Contender:
        total = torch.zeros(channels, channels, dtype=kind)
        return Contender(name, lambda: run(total), prepare=total.zero_, **how)

    def ours(total: Tensor) -> Tensor:
        return second_moment(features, out=total, backend=backend)

    ways = expressions(features)
    stock = [contender(name, ways[name], torch.float32, aside=few) for name in USUAL]
    stock.append(contender(BLOCKS, ways[BLOCKS], torch.float32, aside=True))
    part = min(RANK_ONE_KEYS, side**2) / count
    stock.append(contender(RANK_ONE, ways[RANK_ONE], torch.float32, part=part, aside=True))
    if few:
        stock += [contender(name, ways[name], torch.float64) for name in WIDE]
    if dtype != torch.float32:
        floats = features.float()

        def widened(total: Tensor) -> Tensor:
            return second_moment(floats, out=total, backend=backend)

        stock.append(contender("rewrite_core, float32 keys", widened, torch.float64, aside=True))
    return Problem(
        ours=contender("rewrite_core", ours, torch.float64),
        stock=stock,
        shapes={"features": list(features.shape)},
        dtype=str(dtype).removeprefix("torch."),
        operations=count * channels * (channels + 1),  # one triangle, multiply and add
        traffic=features.nbytes + channels * (channels + 1) * 8,  # keys once; a triangle in and out
        error=lambda total: ((total.double() - exact).norm() / exact.norm()).item(),
        error_kind="relative Frobenius error",
        tolerance=1e-6,
        yardstick=yardstick(),
    )


def bench_second_moment(measure: Callable[[], None]) -> None:
    measure()
