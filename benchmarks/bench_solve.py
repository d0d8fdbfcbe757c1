"""Solves with second moments, C x = b in float64, against torch.linalg: with and without a factor at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rewrite_core import SecondMoment, context_directions
from rewrite_core.ops import spd_solve
from rewrite_core.ops.spd_solve_op.factor import spd_factor

from .harness import Case, Contender, Problem

OP = "solve"
KERNEL = "spd_solve"
TESTS = (KERNEL,)
# batch, n, right-hand sides
COLD = (
    (1, 64, 1),
    (1, 64, 64),
    (1, 128, 1),
    (1, 256, 16),
    (1, 512, 1),
    (1, 512, 64),
    (1, 1024, 1),
    (1, 2048, 1),
    (1, 4096, 16),
    (8, 256, 1),
)
WARM = ((1, 64, 1), (1, 128, 4), (1, 512, 1), (1, 512, 16), (1, 512, 64), (1, 1024, 1), (1, 2048, 16), (1, 4096, 1))
DIRECTIONS = ((512, 1), (512, 4), (2048, 1))  # n, rank


def cases(quick: bool) -> list[Case]:
    cold, warm, directions = (((1, 48, 2),), ((1, 48, 2),), ((48, 1),)) if quick else (COLD, WARM, DIRECTIONS)
    return [
        *(Case(f"solve {_name(*sizes)}", functools.partial(make_cold, *sizes)) for sizes in cold),
        *(Case(f"factored {_name(*sizes)}", functools.partial(make_warm, *sizes)) for sizes in warm),
        *(
            Case(
                f"directions n {n}, rank {rank}{', factor at hand' * warm}",
                functools.partial(make_directions, n, rank, warm),
            )
            for n, rank in directions
            for warm in (False, True)
        ),
    ]


def _name(batch: int, n: int, sides: int) -> str:
    return f"{f'{batch}x ' if batch > 1 else ''}n {n}, {sides} rhs"


def _data(batch: int, n: int, sides: int) -> tuple[Tensor, Tensor]:
    """Second moments of 4 n keys whose channels differ in scale by 30: condition number about 1e4."""
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(batch, 4 * n, n, generator=generator, dtype=torch.float64)
    keys *= torch.logspace(-1.5, 0, n, dtype=torch.float64)
    matrix = keys.mT @ keys / (4 * n)
    rhs = torch.randn(batch, n, sides, generator=generator, dtype=torch.float64)
    return (matrix, rhs) if batch > 1 else (matrix[0], rhs[0])


def _problem(ours: Contender, stock: list[Contender], matrix: Tensor, rhs: Tensor, factoring: bool) -> Problem:
    n, sides = rhs.shape[-2:]
    batch = rhs.numel() // (n * sides)
    triangle = n * (n + 1) // 2
    return Problem(
        ours=ours,
        stock=stock,
        shapes={"matrix": list(matrix.shape), "rhs": list(rhs.shape)},
        dtype="float64",
        operations=batch * ((n**3 / 3 if factoring else 0) + 2 * n * n * sides),
        traffic=batch * 8 * (triangle + 2 * n * sides),  # the triangle and b in, x out
        error=lambda x: ((matrix @ x - rhs).norm() / rhs.norm()).item(),
        error_kind="relative residual",
        tolerance=1e-10,
    )


def make_cold(batch: int, n: int, sides: int, backend: str) -> Problem:
    """Matrix and right-hand sides in, solution out. Ours also checks its input and refines once."""
    matrix, rhs = _data(batch, n, sides)
    rounds = None if n < 2048 else 3  # seconds each, lstsq half a minute
    stock = [
        Contender("linalg.solve", lambda: torch.linalg.solve(matrix, rhs), rounds=rounds),
        Contender("linalg.inv @ b", lambda: torch.linalg.inv(matrix) @ rhs, rounds=rounds),
        Contender("linalg.lstsq", lambda: torch.linalg.lstsq(matrix, rhs).solution, rounds=rounds and 1),
        Contender("cholesky, cholesky_solve", lambda: torch.cholesky_solve(rhs, torch.linalg.cholesky(matrix))),
    ]
    ours = Contender("rewrite_core", lambda: spd_solve(matrix, rhs, backend=backend))
    return _problem(ours, stock, matrix, rhs, factoring=True)


def make_warm(batch: int, n: int, sides: int, backend: str) -> Problem:
    """A second solve with the same matrix: everybody has its factor, or inverse, at hand. The inverse is aside, as a
    product with it is no solve of LAPACK's: nothing is checked, its residual is mostly larger (14 times at n = 1024),
    and for an ill-conditioned matrix it is lost."""
    matrix, rhs = _data(batch, n, sides)
    factor, inverse = spd_factor(matrix, backend), torch.linalg.inv(matrix)
    lower, pivoted = torch.linalg.cholesky(matrix), torch.linalg.lu_factor(matrix)
    stock = [
        Contender("cholesky_solve", lambda: torch.cholesky_solve(rhs, lower)),
        Contender("linalg.lu_solve", lambda: torch.linalg.lu_solve(*pivoted, rhs)),
        Contender("inverse @ b", lambda: inverse @ rhs, aside=True),
    ]
    return _problem(Contender("rewrite_core", lambda: factor.solve(rhs)), stock, matrix, rhs, factoring=False)


def make_directions(n: int, rank: int, factored: bool, backend: str) -> Problem:
    """The directions of 40 context keys, against whitening by the symmetric root C^(-1/2), as the reference does it;
    `factored`: ours has its factor at hand, and the root too is tried at hand."""
    matrix, keys = _data(1, n, 40)
    keys = keys.T.contiguous()
    moment = SecondMoment(n)
    moment._sum, moment.count = matrix * (4 * n), 4 * n  # as many keys as _data draws
    moment.factor  # noqa: B018

    def root(dtype: torch.dtype) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix.to(dtype))
        return vectors * values.rsqrt() @ vectors.mT

    def whiten(white: Tensor) -> Tensor:
        top = torch.linalg.svd(keys.to(white.dtype) @ white, full_matrices=False)[2][:rank]
        return torch.linalg.qr((top @ white).T).Q.T

    def ours() -> Tensor:
        if not factored:
            moment._changed()
        return context_directions(moment, keys, rank=rank)

    roots = {dtype: root(dtype) for dtype in (torch.float64, torch.float32)}
    exact = torch.linalg.qr(whiten(roots[torch.float64]).T).Q

    def error(rows: Tensor) -> float:
        """The sine of the largest angle between the spans."""
        rows = rows.double().T
        return (rows - exact @ (exact.T @ rows)).norm(2).item()

    stock = []
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        rounds = None if n <= 512 else 3
        stock.append(
            Contender(
                f"eigh whitening in {name}", functools.partial(lambda dtype: whiten(root(dtype)), dtype), rounds=rounds
            )
        )
        if factored:
            stock.append(
                Contender(
                    f"whitening in {name}, root at hand", functools.partial(lambda dtype: whiten(roots[dtype]), dtype)
                )
            )
    return Problem(
        ours=Contender("rewrite_core", ours),
        stock=stock,
        shapes={"matrix": [n, n], "keys": list(keys.shape)},
        dtype="float64",
        operations=(0 if factored else n**3 / 3) + 2 * n * n * (len(keys) + rank),
        traffic=8 * (n * (n + 1) // 2 + n * (len(keys) + rank)),
        error=error,
        error_kind="sine of the angle to the exact directions",
        tolerance=1e-8,
    )


def bench_solve(measure: Callable[[], None]) -> None:
    measure()
