"""What values each unit of a layer takes over many images (GAN Dissection's population)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError, RewriteCoreError
from ..layers.binding import BoundLayer
from ..layers.latents import check_latents
from .checks import check_layer
from .key_stream import stream_keys


class UnitQuantiles:
    """What values each unit (key channel) takes over many images, in bounded memory.

    Keeps every s-th key, doubling s whenever `capacity` keys are held, and each unit's true maximum.
    """

    def __init__(self, channels: int, capacity: int = 8192):
        self._rows = torch.empty(0, channels, dtype=torch.float32, device="cpu")
        self._capacity = capacity
        self._stride = 1
        self._seen = 0
        self.maximum = torch.full((channels,), -torch.inf, dtype=torch.float32, device="cpu")

    def update(self, features: Tensor) -> None:
        """Add keys [N, C, H, W]. Raises NonFiniteError, and adds nothing, on NaN or infinity."""
        rows = features.detach().movedim(1, -1).reshape(-1, features.shape[1]).float().cpu()
        if not torch.isfinite(rows).all():
            raise NonFiniteError("The features hold NaN or infinity; leave those images out.")
        self.maximum = torch.maximum(self.maximum, rows.amax(0))
        first = -self._seen % self._stride
        self._seen += len(rows)
        self._rows = torch.cat([self._rows, rows[first :: self._stride]])
        while len(self._rows) > self._capacity:
            self._rows = self._rows[::2]
            self._stride *= 2

    def quantile(self, keys: Tensor) -> Tensor:
        """The share of the population below each entry of keys [n, C]; 1 only at a unit's maximum."""
        keys = keys.float().cpu()
        sample = self._rows.sort(0).values.T.contiguous()
        below = torch.searchsorted(sample, keys.T.contiguous()).T.double() / len(self._rows)
        below = below.clamp(max=1 - 0.5 / max(self._seen, 1))
        # a picture made in another batch differs from itself by rounding
        return torch.where(keys >= self.maximum - 1e-5 * self.maximum.abs(), 1.0, below)


def collect_unit_quantiles(
    layer: BoundLayer, latents: Tensor, batch_size: int = 16, progress: bool = False
) -> UnitQuantiles:
    """Quantiles of each unit of the layer's key over the images of `latents`, for ``directions="units"``."""
    check_layer(layer)
    check_latents(latents)
    if len(latents) == 0:
        raise RewriteCoreError("There are no latents to take quantiles over; give at least one.")
    quantiles = UnitQuantiles(layer.in_channels)
    label = f"unit quantiles of {layer.name}"
    stream_keys(layer, latents, batch_size, progress, label, lambda keys, done: quantiles.update(keys))
    return quantiles
