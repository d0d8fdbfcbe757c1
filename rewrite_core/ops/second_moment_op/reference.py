"""``second_moment`` in plain PyTorch, in float64 throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def run_reference(features: Tensor, out: Tensor, groups: int = 1) -> None:
    rows = features.movedim(1, -1).reshape(-1, features.shape[1])
    most = 1 << 16 if groups == 1 else max(1, (1 << 24) // rows.shape[1])
    for block in rows.split(most):  # the float64 copy stays small
        block = block.double()
        if groups == 1:
            out.addmm_(block.T, block)
        else:
            keys = block.unflatten(1, (groups, -1)).permute(1, 2, 0)
            out += torch.bmm(keys, keys.mT)
    lower = out.tril()  # BLAS sums the two triangles in different orders
    out.copy_(lower + lower.tril(-1).mT)
