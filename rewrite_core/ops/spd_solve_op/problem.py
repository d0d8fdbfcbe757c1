"""What ``spd_solve`` takes and the checks of it; what a backend of it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ArgumentError, DiagonalShiftWarning, RewriteCoreError, warn
from ..memory import check_dense

EPSILON = torch.finfo(torch.float64).eps

SMALLEST = torch.finfo(torch.float64).tiny / EPSILON  # mean diagonal: below it a shift of eps times that loses digits


LARGEST_SHIFT = 1e-2  # of each diagonal entry: a matrix that needs more is no second moment


ASYMMETRY = 1e-6  # the largest |a_ij - a_ji| that rounding may have made, of the largest diagonal entry: in float64


def asymmetry(n: int, eps: float) -> float:
    """The same for sums in a type of this eps, which n may make larger."""
    return max(ASYMMETRY, n * eps)


def check_matrix(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor) or matrix.dtype not in (torch.float32, torch.float64):
        what = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ArgumentError(f"matrix must be a float64 or float32 tensor, not {what}: convert it with .double().")
    check_dense("matrix", matrix)
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise RewriteCoreError(f"matrix must be [n, n] or [B, n, n] with n >= 1, not {list(matrix.shape)}.")


def check_rhs(matrix: Tensor, rhs: Tensor) -> None:
    if not isinstance(rhs, Tensor) or not rhs.is_floating_point():
        what = rhs.dtype if isinstance(rhs, Tensor) else type(rhs).__name__
        raise ArgumentError(f"The right-hand side must be a real floating-point tensor, not {what}.")
    check_dense("The right-hand side", rhs)
    shape, rows = rhs.shape, matrix.shape[:-1]
    if shape != rows and shape[:-1] != rows:
        wanted = ", ".join(map(str, rows))
        raise RewriteCoreError(
            f"The right-hand side of a {list(matrix.shape)} matrix must be [{wanted}] or [{wanted}, m], "
            f"not {list(rhs.shape)}: keys are rows, so pass keys.T."
        )
    if not (rhs.is_cpu and matrix.is_cpu) and rhs.device != matrix.device:  # to compare devices takes longer
        raise RewriteCoreError(
            f"The right-hand side is on {rhs.device} and the matrix on {matrix.device}: move one of them."
        )


def refuse_in_graph(matrix: Tensor, what: str, instead: str) -> None:
    """Raise RewriteCoreError where a CUDA graph is being captured: `what` cannot go into it."""
    if matrix.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RewriteCoreError(f"{what}, which a CUDA graph cannot hold: {instead}.")


def warn_of_shift(shifts: list[float], means: list[float], batched: bool) -> None:
    """Tell the largest of what was added to entries of mean size, relative to these, each of one matrix."""
    relative = [size / mean for size, mean in zip(shifts, means, strict=True)]
    worst = max(range(len(means)), key=relative.__getitem__)
    where = f" {worst} of the batch" if batched else ""
    warn(
        f"The matrix{where} is rank-deficient: solved with {shifts[worst]:.3e} added to its diagonal "
        f"({relative[worst]:.1e} of the mean); use more keys, or leave dead channels out.",
        DiagonalShiftWarning,
    )


class Facts(NamedTuple):
    """What is known of one matrix when it is factored."""

    mean: float  # of the diagonal
    largest: float  # |diagonal entry|
    difference: float  # largest |a_ij - a_ji|, NaN where anything is not finite
    pivot: int  # 0, or which one, from 1 on, is not above `least` times its diagonal entry


# matrix and lower [..., n, n], rhs [..., n, m] or [..., n], whether a matrix is shifted, what `sketch` made of it -> in
# the shape of rhs, exact to rounding; where the rhs is not finite None on a CPU, NaN on a GPU, where a look would wait
Solve = Callable[[Tensor, Tensor, Tensor, bool, "Tensor | None"], "Tensor | None"]


# A factor that has solved holds its backend: functions with names, as pickle finds no others.
def _no_direct(matrix: Tensor, rhs: Tensor) -> Tensor | None:
    return None


def _no_sketch(matrix: Tensor) -> Tensor | None:
    return None


def _not_at_once(matrix: Tensor, lower: Tensor, sketch: Tensor | None, rhs: Tensor) -> Any:
    return NotImplemented


class Cholesky(NamedTuple):
    """One backend: what differs between them; checks and shifts are shared."""

    # [B, n, n] as given, the same made symmetric, least -> lower [B, n, n] of the latter, and the facts of each
    factor: Callable[[Tensor, Tensor, float], tuple[Tensor, list[Facts]]]
    solve: Solve
    # matrix and rhs -> all in one call, or None where a check fails and the long way will say which
    direct: Callable[[Tensor, Tensor], Tensor | None] = _no_direct
    # matrix -> what a solve sees its residual by, without the matrix; None: it has no need of that
    sketch: Callable[[Tensor], Tensor | None] = _no_sketch
    # matrix, lower, what `sketch` made, rhs, as given -> what `solve` does, or NotImplemented: it may be another call
    at_once: Callable[[Tensor, Tensor, Tensor | None, Tensor], Any] = _not_at_once
