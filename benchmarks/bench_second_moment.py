"""Second moment of keys, C += X^T X from NCHW, against stock PyTorch (DESIGN 5)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rewrite_core.ops import second_moment

from .harness import Case, Contender, Problem

OP = "second_moment"
GRID = ((64, 128), (128, 64), (256, 64), (512, 32), (512, 16), (1024, 8))  # channels @ map; DESIGN 5's
QUICK = ((64, 16), (96, 8))
BATCH = 8


def cases(quick: bool) -> list[Case]:
    return [
        Case(f"{channels}@{side}x{side} batch {BATCH}", functools.partial(make, channels, side))
        for channels, side in (QUICK if quick else GRID)
    ]


def make(channels: int, side: int, backend: str) -> Problem:
    """float32 keys as a leaky ReLU leaves them (mean not zero). Stock adds to a float32 total, as its users
    do; ours to a float64 one, which its interface fixes."""
    generator = torch.Generator().manual_seed(channels + side)
    features = torch.randn(BATCH, channels, side, side, generator=generator)
    features = torch.nn.functional.leaky_relu(features, 0.2)
    flat = features.flatten(2)
    rows = flat.mT.reshape(-1, channels)  # used for the oracle only: stock pays for its own permuted copy
    exact = rows.double().T @ rows.double()
    count = len(rows)
    del rows

    def addmm(total: Tensor) -> Tensor:
        permuted = features.permute(0, 2, 3, 1).reshape(-1, channels)
        return total.addmm_(permuted.T, permuted)

    def bmm(total: Tensor) -> Tensor:
        return total.add_(torch.bmm(flat, flat.mT).sum(0))

    def einsum(total: Tensor) -> Tensor:
        return total.add_(torch.einsum("nchw,ndhw->cd", features, features))

    def contender(name: str, run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Contender:
        total = torch.zeros(channels, channels, dtype=dtype)
        return Contender(name, lambda: run(total), prepare=total.zero_)

    return Problem(
        ours=contender(
            "rewrite_core", lambda total: second_moment(features, out=total, backend=backend), torch.float64
        ),
        stock=[
            contender("addmm, permuted copy", addmm, torch.float32),
            contender("bmm on NCHW", bmm, torch.float32),
            contender("einsum", einsum, torch.float32),
        ],
        shapes={"features": list(features.shape)},
        dtype="float32",
        operations=count * channels * (channels + 1),  # one triangle, multiply and add
        traffic=features.numel() * 4 + channels * (channels + 1) * 8,  # keys once; a triangle in and out
        error=lambda total: ((total.double() - exact).norm() / exact.norm()).item(),
        error_kind="relative Frobenius error",
        tolerance=1e-6,
    )


def bench_second_moment(measure: Callable[[], None]) -> None:
    measure()
