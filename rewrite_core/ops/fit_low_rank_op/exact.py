"""The reference's closed form: the linear l2 problem, from one factor."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Model
from .problem import (
    CONVERGED,
    DEGENERATE,
    MAX_ITERATIONS,
    NEGLIGIBLE,
    NONFINITE,
    PIVOT,
    REFINEMENTS,
    SHIFTED,
    SHIFTS,
    ZERO_RESIDUAL,
)


def _factor_exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Cholesky factor with the smallest diagonal shift that has one; the shift; whether there is none."""
    size = matrix.diagonal(dim1=1, dim2=2).amax(-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    added, pending = torch.zeros_like(size), torch.ones_like(size, dtype=torch.bool)
    factor = torch.zeros_like(matrix)
    for power in (None, *range(SHIFTS)):  # no shift, then PIVOT, 10 PIVOT, ...: the smallest that factors
        added = torch.where(pending, 0.0 if power is None else PIVOT * 10.0**power * size, added)
        trial, info = torch.linalg.cholesky_ex(matrix + added[:, None, None] * eye)
        good = (info == 0) & (trial.diagonal(dim1=1, dim2=2).square().amin(-1) > 0.5 * PIVOT * size)
        factor = torch.where((pending & good)[:, None, None], trial, factor)
        pending = pending & ~good
        if not pending.any():
            break
    return factor, added, pending


def fit_exactly(
    model: Model, weights: Tensor, penalty: Tensor | None, penalty_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The linear l2 problem of n channels by one factor, or one per channel where penalty_scale differs."""
    wanted = model.target - model.gain * (model.base + model.shift)
    gram = model.gain**2 * (model.basis * weights) @ model.basis.T
    right = model.gain * (wanted * weights) @ model.basis.T
    matrix = gram[None]
    if penalty is not None and penalty_scale is not None:
        shared = bool((penalty_scale == penalty_scale[0]).all())
        matrix = gram + (penalty_scale[:1] if shared else penalty_scale)[:, None, None] * penalty
    factor, added, failed = _factor_exact(matrix)
    size = matrix.diagonal(dim1=1, dim2=2).amax(-1)

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        data = (weights * (model.gain * (x @ model.basis) - wanted) ** 2).sum(-1)
        if penalty is None or penalty_scale is None:
            return data, data
        return data, data + penalty_scale * (x * (x @ penalty)).sum(-1)

    zero = torch.zeros_like(right)
    x = zero
    for _ in range(REFINEMENTS):  # each time the shift's error shrinks by shift / eigenvalue
        rest = right - (matrix @ x[..., None])[..., 0]
        x = x + torch.cholesky_solve(rest[..., None], factor.expand(len(x), -1, -1))[..., 0]
    (initial, first), (data, last) = objective(zero), objective(x)
    worse = ~(last < first)  # also NaN
    status = torch.where(added > 0, SHIFTED, CONVERGED).expand(len(x)).clone()
    level = (weights * model.target.abs()).sum(-1)
    status[(size == 0).expand(len(x))] = DEGENERATE
    if model.gain == 0 or not weights.any():
        status.fill_(DEGENERATE)
    if weights.any():
        status[~(initial.sqrt() > NEGLIGIBLE * level)] = ZERO_RESIDUAL
    status[~initial.isfinite() | (failed & (size != 0)).expand(len(x))] = NONFINITE
    keep = worse | (status > MAX_ITERATIONS) & (status != SHIFTED)
    return (
        torch.where(keep[:, None], zero, x),
        torch.where(keep, initial, data),
        initial,
        torch.ones_like(status),
        status,
    )
