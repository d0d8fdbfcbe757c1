"""``spd_solve`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Cholesky


def _examine(matrix: Tensor) -> Tensor:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    difference = (matrix - matrix.mT).abs().amax((-2, -1))  # of infinity with itself: NaN, which amax keeps
    return torch.stack([diagonal.mean(-1), diagonal.abs().amax(-1), difference], -1)


def _factor(matrix: Tensor, least: float) -> tuple[Tensor, Tensor]:
    lower, info = torch.linalg.cholesky_ex(matrix)
    pivots, diagonal = (part.diagonal(dim1=-2, dim2=-1) for part in (lower, matrix))
    bad = pivots.square() <= least * diagonal
    return lower, torch.where(info == 0, (bad.any(-1) * (bad.int().argmax(-1) + 1)).to(info), info)


def _solve(matrix: Tensor, lower: Tensor, rhs: Tensor) -> Tensor | None:
    if rhs.device.type == "cpu" and not torch.isfinite(rhs).all():  # elsewhere a look would wait
        return None
    vectors = rhs.ndim < matrix.ndim
    b = rhs.unsqueeze(-1) if vectors else rhs
    x = torch.cholesky_solve(b, lower)
    x = x + torch.cholesky_solve(b - matrix @ x, lower)  # one step of iterative refinement
    return x.squeeze(-1) if vectors else x


run_reference = Cholesky(_examine, _factor, _solve)
