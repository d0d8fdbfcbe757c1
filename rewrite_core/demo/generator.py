"""The embedded generator: paints a chapel scene from its latent."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..families.proggan import ProgGAN
from .world import LATENT_SIZE

PROGGAN_SIZES = (128, 192, 160, 128, 64, 32)


class ProgGANChapels(nn.Module):
    """Latents [N, 16] -> images [N, 3, 64, 64] in -1..1: a mapping network, then a ProgGAN.

    The mapping turns the standard-normal factors into nearly discrete ones, so that the features of
    a spire are the same in every scene that has one: what makes a rank-one rewrite generalise.
    """

    def __init__(self, sizes: tuple[int, ...] = PROGGAN_SIZES):
        super().__init__()
        width = sizes[0]
        self.mapping = nn.Sequential(
            nn.Linear(LATENT_SIZE, width), nn.LeakyReLU(0.2),
            nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, width), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.synthesis = ProgGAN(list(sizes))

    def forward(self, latents: Tensor) -> Tensor:
        return self.synthesis(self.mapping(latents))
