"""``spd_solve`` in plain PyTorch: on a GPU what runs, with few launches and one wait."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..finite import all_finite
from ..memory import plain
from .problem import EPSILON, SMALLEST, Cholesky, Facts, asymmetry


def _on_cpu(data: Tensor) -> bool:
    return data.is_cpu


def _facts(given: Tensor, lower: Tensor, info: Tensor, least: float) -> list[Facts]:
    """Four launches and a copy, the only wait; what is small is done with on the host."""
    n = given.shape[-1]
    difference = (given - given.mT).amax((-2, -1))  # with its negative in the mirror: no abs; infinity makes a NaN
    diagonals = [part.diagonal(dim1=-2, dim2=-1) for part in (given, lower)]
    read = torch.cat([*diagonals, difference[:, None], info[:, None].to(given.dtype)], -1).cpu().numpy()
    diagonal, pivots = read[:, :n], read[:, n : 2 * n]
    with np.errstate(invalid="ignore", over="ignore"):  # of what is not finite, as `difference` says
        noise = ~(pivots**2 > least * diagonal)
        mean, largest = diagonal.mean(-1), np.abs(diagonal).max(-1)
    pivot = np.where(read[:, 2 * n + 1] != 0, read[:, 2 * n + 1], noise.any(-1) * (noise.argmax(-1) + 1)).astype(int)
    return list(map(Facts, mean.tolist(), largest.tolist(), read[:, 2 * n].tolist(), pivot.tolist()))


def _factor(given: Tensor, matrix: Tensor, least: float) -> tuple[Tensor, list[Facts]]:
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower, _facts(given, lower, info, least)


def _solve(matrix: Tensor, lower: Tensor, rhs: Tensor, shifted: bool, sketch: Tensor | None = None) -> Tensor | None:
    """On a GPU refined only where the matrix is shifted: without, Cholesky's residual is at rounding, of |A| |x|."""
    if _on_cpu(rhs) and not all_finite(rhs):
        return None
    vectors = rhs.ndim < matrix.ndim
    b = rhs.unsqueeze(-1) if vectors else rhs
    x = torch.cholesky_solve(b, lower)
    if shifted or _on_cpu(rhs):
        x = x + torch.cholesky_solve(b - matrix @ x, lower)  # one step of iterative refinement
    return x.squeeze(-1) if vectors else x


def _direct(matrix: Tensor, rhs: Tensor) -> Tensor | None:
    """On a GPU: solves before it knows whether the matrix is sound, so that there is one wait, at the end."""
    if _on_cpu(matrix) or matrix.dtype != torch.float64:  # sums in float32 are made symmetric first
        return None
    matrix, n = plain(matrix), matrix.shape[-1]
    lower, info = torch.linalg.cholesky_ex(matrix)
    x = _solve(matrix, lower, plain(rhs.double()), shifted=False)
    many = matrix.ndim == 3
    facts = _facts(*((matrix, lower, info) if many else (matrix[None], lower[None], info[None])), n * EPSILON)
    limit = asymmetry(n, EPSILON)
    sound = (each.difference <= limit * each.largest and each.mean >= SMALLEST and not each.pivot for each in facts)
    return x if all(sound) else None


run_reference = Cholesky(_factor, _solve, _direct)
