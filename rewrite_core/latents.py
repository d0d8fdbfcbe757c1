"""The standard set of latents that selections, collections and edits index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import RewriteCoreError


def sample_latents(channels: int, count: int, seed: int = 1) -> Tensor:
    """`count` standard-normal latents of `channels` coordinates: float32 [count, channels].

    The rows are those of ``numpy.random.RandomState(seed).standard_normal``, drawn row by row in
    float64, so a longer sample begins with the rows of a shorter one and selections made elsewhere
    with the same seed point at the same pictures.
    """
    if channels < 1 or count < 1:
        raise RewriteCoreError(
            f"sample_latents needs at least one channel and one latent, not ({channels}, {count})."
        )
    rows = np.random.RandomState(seed).standard_normal(channels * count).reshape(count, channels)
    return torch.from_numpy(rows).float()
