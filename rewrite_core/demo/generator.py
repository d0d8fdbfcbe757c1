"""The embedded generator: paints a chapel scene from its latent."""

from __future__ import annotations

import os

from torch import Tensor, nn

from ..files import read_state_dict
from ..generators.proggan import ProgGAN
from ..generators.stylegan2 import StyleGAN2
from .world import IMAGE_SIZE, LATENT_SIZE

_WIDTH = 128  # of the mapping network
_CHANNELS = {4: 192, 8: 160, 16: 128, 32: 64, 64: 32}


def _mapping() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(LATENT_SIZE, _WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(_WIDTH, _WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(_WIDTH, _WIDTH),
        nn.LeakyReLU(0.2),
    )


class ProgGANChapels(nn.Module):
    """Latents [N, 16] -> images [N, 3, 64, 64] in -1..1: a mapping network, then a ProgGAN.

    The mapping turns the standard-normal factors into nearly discrete ones, so that the features of
    a spire are the same in every scene that has one: what makes a rank-one rewrite generalise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mapping = _mapping()
        self.synthesis = ProgGAN([_WIDTH, *_CHANNELS.values()])

    def forward(self, latents: Tensor) -> Tensor:
        return self.synthesis(self.mapping(latents))


class StyleGAN2Chapels(nn.Module):
    """The same task and channels with a StyleGAN2: trained to compare (README), not shipped."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = _mapping()
        self.synthesis = StyleGAN2(IMAGE_SIZE, style_dim=_WIDTH, n_mlp=0, channels=_CHANNELS)

    def forward(self, latents: Tensor) -> Tensor:
        return self.synthesis(self.mapping(latents), noise="none").clamp(-1, 1)


ARCHITECTURES: dict[str, type[ProgGANChapels] | type[StyleGAN2Chapels]] = {
    "proggan": ProgGANChapels,
    "stylegan2": StyleGAN2Chapels,
}


def load_chapels(path: str | os.PathLike, architecture: str = "proggan") -> ProgGANChapels | StyleGAN2Chapels:
    """A generator that training.py wrote, in eval mode, float32."""
    generator = ARCHITECTURES[architecture]()
    generator.load_state_dict({name: tensor.float() for name, tensor in read_state_dict(path).items()})
    return generator.eval()
