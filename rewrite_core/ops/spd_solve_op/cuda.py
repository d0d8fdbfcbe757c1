"""``spd_solve`` by a CUDA kernel of our own (csrc/spd_solve.cu): factor, solve and refine in one launch."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...backends import extension
from ..cuda_kernels import capability, first_launch, index_of, missing, not_run
from ..memory import address, plain
from .problem import EPSILON, LARGEST_SHIFT, SMALLEST, Cholesky, Facts, asymmetry, warn_of_shift

# What "auto" takes this backend for: the largest n for which the GPU check has recorded it as faster than torch.linalg,
# by compute capability. No GPU has run it yet.
FASTER_UP_TO: dict[tuple[int, int], int] = {}

MEAN, PIVOT, SHIFT, VERDICT, FACTS = 0, 3, 4, 5, 6  # columns of what the kernel tells (csrc/spd_solve_cuda.h)


@functools.cache
def _blocks(n: int, index: int) -> int:
    """Of the GPU's blocks, how many work together on one matrix; 0 where it does not fit."""
    with torch.cuda.device(index):
        return extension().spd_solve_blocks(n=n, device=index)


def supports(matrix: Tensor, rhs: Tensor | None = None) -> str | None:
    """None where the kernel can run, else why not."""
    reason = missing(matrix, "matrix", "spd_solve_cuda")
    if reason is not None:
        return reason
    n = matrix.shape[-1]
    try:
        blocks = _blocks(n, index_of(matrix))
    except RuntimeError as error:
        return not_run(error)
    if not blocks:
        return f"a matrix with n = {n} is more than it takes: the shared memory of one block, of 8 or 16, up to n = 512"
    return None


def declines(matrix: Tensor, rhs: Tensor | None = None) -> str | None:
    """None where it was measured to be faster than torch.linalg."""
    have = capability(index_of(matrix))
    if matrix.shape[-1] <= FASTER_UP_TO.get(have, 0):
        return None
    return "no GPU check has recorded it as faster than torch.linalg here; ask for it by name to try it"


def _launch(
    matrix: Tensor,
    rhs: Tensor,
    given: Tensor | None = None,
    factor: Tensor | None = None,
    lower: Tensor | None = None,
    *,
    least: float,
    difference: float = math.inf,
    smallest: float = -math.inf,
    shifts: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queue one launch: x and the facts. matrix, given, factor, lower [B, n, n], rhs [B, n, m]; contiguous float64."""
    x, index = torch.empty_like(rhs), index_of(matrix)
    facts, blocks = matrix.new_empty(len(matrix), FACTS), _blocks(matrix.shape[-1], index)
    if len(matrix):  # nothing is launched of no matrix
        first_launch("spd_solve", index, blocks > 1)
    with torch.cuda.device(index):
        extension().spd_solve_cuda(
            matrix=address(matrix),
            given=address(matrix if given is None else given),
            factor=address(factor),
            lower=address(lower),
            rhs=address(rhs),
            x=address(x),
            facts=address(facts),
            batch=len(matrix),
            n=matrix.shape[-1],
            sides=rhs.shape[-1],
            asymmetry=difference,
            smallest_mean=smallest,
            least=least,
            first_shift=EPSILON if shifts else 0.0,
            largest_shift=LARGEST_SHIFT,
            blocks=blocks,
            device=index,
            stream=torch.cuda.current_stream(index).cuda_stream,
        )
    return x, facts


def _whole(data: Tensor, dimensions: int) -> Tensor:
    """The same in float64, in memory as the kernel reads it, with a batch of one where there is none."""
    data = plain(data).double().contiguous()
    return data if data.ndim == dimensions else data[None]


def _sides(matrix: Tensor, rhs: Tensor) -> Tensor:
    """[B, n, m]."""
    return _whole(rhs.unsqueeze(-1) if rhs.ndim < matrix.ndim else rhs, 3)


def _factor(given: Tensor, matrix: Tensor, least: float) -> tuple[Tensor, list[Facts]]:
    lower = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    matrix, given = _whole(matrix, 3), _whole(given, 3)
    _, facts = _launch(matrix, matrix.new_empty(*matrix.shape[:2], 0), given, lower=lower, least=least)
    rows = facts.cpu().tolist()  # the only wait
    return lower, [Facts(mean, largest, apart, int(pivot)) for mean, largest, apart, pivot, *_ in rows]


def _solve(matrix: Tensor, lower: Tensor, rhs: Tensor, shifted: bool, sketch: Tensor | None = None) -> Tensor:
    """The kernel looks at the residual itself; a right-hand side that is not finite comes out as NaN."""
    x, _ = _launch(_whole(matrix, 3), _sides(matrix, rhs), factor=_whole(lower, 3), least=0.0)
    return x.view(rhs.shape)


def _direct(matrix: Tensor, rhs: Tensor) -> Tensor | None:
    if matrix.dtype != torch.float64:  # sums in float32 are made symmetric first
        return None
    n = matrix.shape[-1]
    x, facts = _launch(
        _whole(matrix, 3),
        _sides(matrix, rhs),
        least=n * EPSILON,
        difference=asymmetry(n, EPSILON),
        smallest=SMALLEST,
        shifts=True,
    )
    rows = facts.cpu()  # the only wait
    if rows[:, VERDICT].any():
        return None  # the long way says what is wrong
    if rows[:, SHIFT].any():
        means = rows[:, MEAN]
        warn_of_shift((rows[:, SHIFT] * means).tolist(), means.tolist(), batched=matrix.ndim == 3)
    return x.view(rhs.shape)


run_cuda = Cholesky(_factor, _solve, _direct)
