"""The standard set of latents that selections, collections and edits index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import RewriteCoreError


def check_latents(latents: Tensor) -> None:
    """Raises TypeError for anything but a tensor."""
    if not isinstance(latents, Tensor):
        raise TypeError(
            f"latents must be a torch tensor [N, ...], not {type(latents).__name__}: use torch.as_tensor, or "
            "torch.stack for several tensors."
        )


def for_generator(latents: Tensor, generator: nn.Module) -> Tensor:
    """The latents on the device and, where they are no integers, in the precision of the generator's first weight."""
    check_latents(latents)
    first = next((weight for weight in generator.parameters() if weight.is_floating_point()), None)
    if first is None:
        return latents
    latents = latents.to(dtype=first.dtype if latents.is_floating_point() else None)
    if first.device.type == "cuda" and latents.device.type == "cpu":
        return latents.pin_memory().to(first.device, non_blocking=True)  # without waiting for what the GPU is at
    return latents.to(first.device)


def sample_latents(channels: int, count: int, seed: int = 1) -> Tensor:
    """`count` standard-normal latents of `channels` coordinates: float32 [count, channels].

    The rows are those of ``numpy.random.RandomState(seed).standard_normal``, drawn row by row in
    float64, so a longer sample begins with the rows of a shorter one and selections made elsewhere
    with the same seed point at the same pictures.
    """
    if channels < 1 or count < 1:
        raise RewriteCoreError(f"sample_latents needs at least one channel and one latent, not ({channels}, {count}).")
    rows = np.random.RandomState(seed).standard_normal(channels * count).reshape(count, channels)
    return torch.from_numpy(rows).float()
