"""What values each unit of a layer takes over many images (GAN Dissection's population)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, NonFiniteError, RewriteCoreError, whole_number
from ..layers.bound import BoundLayer
from ..layers.latents import check_latents
from ..ops.finite import all_finite
from .checks import check_keys, check_layer
from .key_stream import stream_keys
from .masks import Mask, batch_mask, check_mask, positions_that_count
from .sums import checked


class UnitQuantiles:
    """What values each unit (key channel) takes over many images, in bounded memory.

    Keeps every s-th key, doubling s whenever `capacity` keys are held, and each unit's true maximum.
    """

    def __init__(self, channels: int, capacity: int = 8192):
        channels = whole_number("The number of units", channels)
        self._capacity = whole_number("The number of keys to keep", capacity)
        self._rows = torch.empty(0, channels, dtype=torch.float32, device="cpu")
        self._stride = 1
        self._seen = 0
        self.maximum = torch.full((channels,), -torch.inf, dtype=torch.float32, device="cpu")

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Add keys [N, C, *map], those where `mask` [N, *map], if given, is not 0.

        Raises NonFiniteError, and adds nothing, on NaN or infinity.
        """
        features = checked(features, len(self.maximum))
        if features.is_complex() or features.layout != torch.strided:
            raise ArgumentError("Features must be a dense tensor of real numbers; use .to_dense(), or .real.")
        rows = features.movedim(1, -1)
        rows = rows.reshape(-1, features.shape[1]) if mask is None else rows[positions_that_count(features, mask)]
        rows = rows.float().cpu()
        if not all_finite(rows):
            raise NonFiniteError("The features hold NaN or infinity; leave those images out.")
        if not len(rows):
            return
        self.maximum = torch.maximum(self.maximum, rows.amax(0))
        first = -self._seen % self._stride
        self._seen += len(rows)
        self._rows = torch.cat([self._rows, rows[first :: self._stride]])
        while len(self._rows) > self._capacity:
            self._rows = self._rows[::2]
            self._stride *= 2

    def quantile(self, keys: Tensor) -> Tensor:
        """The share of the population below each entry of keys [n, C]; 1 only at a unit's maximum. Float64 [n, C]."""
        check_keys(keys)
        if keys.ndim != 2 or keys.shape[1] != len(self.maximum):
            raise RewriteCoreError(f"Keys are rows [n, {len(self.maximum)}], not {list(keys.shape)}.")
        if not self._seen:
            raise RewriteCoreError("These quantiles are of no keys yet; update or collect them first.")
        keys = keys.detach().float().cpu()
        sample = self._rows.sort(0).values.T.contiguous()
        below = torch.searchsorted(sample, keys.T.contiguous()).T.double() / len(self._rows)
        below = below.clamp(max=1 - 0.5 / self._seen)
        # a picture made in another batch differs from itself by rounding
        return torch.where(keys >= self.maximum - 1e-5 * self.maximum.abs(), 1.0, below)


def collect_unit_quantiles(
    layer: BoundLayer,
    latents: Tensor,
    batch_size: int = 16,
    progress: bool = False,
    mask: Mask | None = None,
) -> UnitQuantiles:
    """Quantiles of each unit of the layer's key over the images of `latents`, for ``directions="units"``.

    `mask` says which positions count, as in :func:`collect_second_moment`.
    """
    check_layer(layer)
    check_latents(latents)
    if len(latents) == 0:
        raise RewriteCoreError("There are no latents to take quantiles over; give at least one.")
    check_mask(mask, latents)
    quantiles = UnitQuantiles(layer.in_channels)

    def add(keys: Tensor, done: int) -> None:
        first = done - len(keys)
        quantiles.update(keys, batch_mask(mask, first, latents[first:done]))

    stream_keys(layer, latents, batch_size, progress, f"unit quantiles of {layer.name}", add)
    return quantiles
