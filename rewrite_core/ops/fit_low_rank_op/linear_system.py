"""The reference's linear system: one damped step of each channel, over unknowns or over pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_step(
    rows: Tensor,
    curvature: Tensor,
    slopes: Tensor,
    gradient: Tensor,
    penalty: Tensor | None,
    damping: Tensor,
    dual_form: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-(H + mu I)^-1 gradient with H = rows diag(curvature) rows^T + penalty; also the mean curvature, to which the
    damping is relative, and whether the step exists.

    In dual form (fewer pixels than unknowns, no penalty) the system is over pixels:
    step = -rows S (S rows^T rows S + mu I)^-1 S^-1 slopes, S = sqrt(curvature), gradient = rows slopes.
    """
    unknowns = rows.shape[1]
    root = curvature.sqrt() if dual_form else None
    if root is not None:
        matrix = root[:, :, None] * (rows.mT @ rows) * root[:, None, :]
        right = torch.where(root > 0, slopes / root, 0.0)
    else:
        matrix = (rows * curvature[:, None, :]) @ rows.mT
        right = gradient
        if penalty is not None:
            matrix = matrix + penalty
    mean = matrix.diagonal(dim1=1, dim2=2).sum(-1) / unknowns
    mu = damping * mean
    factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(mu[:, None].expand_as(right)))
    step = -torch.cholesky_solve(right[..., None], factor)
    step = (step if root is None else rows @ (root[..., None] * step))[..., 0]
    good = (info == 0) & step.isfinite().all(-1)
    return torch.where(good[:, None], step, 0.0), mean, good
