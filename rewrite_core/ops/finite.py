"""Whether numbers are finite, for every check of them."""

from __future__ import annotations

import cmath

import torch
from torch import Tensor

from ..waits import likely


def all_finite(numbers: Tensor) -> bool:
    """Whether there is no NaN and no infinity. On a CPU by the sum, which shows either, at the speed of memory; where
    finite numbers add up to infinity each is looked at."""
    if numbers.is_cpu:
        wide = torch.promote_types(numbers.dtype, torch.float32)
        if cmath.isfinite(numbers.sum(dtype=wide).item()):
            return True
    return likely(numbers.isfinite().all())
