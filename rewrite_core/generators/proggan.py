"""Progressive GAN generators (Karras et al., 2018), in the layout of the published PyTorch checkpoints.

Each layer is PixelNorm -> (nearest x2) -> convolution without bias -> WScale -> leaky ReLU 0.2.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, RewriteCoreError, quoted
from ..files import read_state_dict
from .checkpoint import build, size_of, without_prefixes

_CONVOLUTION = re.compile(r"layer(\d{1,3})\.conv\.weight")


class PixelNorm(nn.Module):
    """Divides the feature vector at each pixel by its root mean square; any [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Upsample(nn.Upsample):
    """Nearest x2; any [N, C, H, W] becomes [N, C, 2 H, 2 W]."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        learnt = torch.is_grad_enabled() and x.requires_grad
        if learnt or x.device.type != "cpu" or not x.is_contiguous():
            return super().forward(x)
        # The same numbers in a sixth of the time that torch's kernel takes: a fifth of a whole pass on the CPU.
        return x.repeat_interleave(2, 3).repeat_interleave(2, 2)


class WScale(nn.Module):
    """Equalised learning rate: ``x * gain / sqrt(fan_in) + b``, b of shape [C]."""

    def __init__(self, channels: int, fan_in: int, gain: float):
        super().__init__()
        self.scale = gain / math.sqrt(fan_in)
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.b[:, None, None]


class Layer(nn.Sequential):
    """One ProgGAN layer, `in_channels` -> `out_channels`, keeping or doubling the map size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, padding: int = 1, up: bool = False):
        parts: list[tuple[str, nn.Module]] = [("norm", PixelNorm())]
        if up:
            parts.append(("up", Upsample()))
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=False)
        nn.init.normal_(conv.weight)
        parts += [
            ("conv", conv),
            ("wscale", WScale(out_channels, in_channels, math.sqrt(2) / kernel)),
            ("relu", nn.LeakyReLU(0.2)),
        ]
        super().__init__(OrderedDict(parts))


class Output(nn.Sequential):
    """The 1x1 convolution to RGB, clamped to [-1, 1]."""

    def __init__(self, channels: int):
        conv = nn.Conv2d(channels, 3, 1, bias=False)
        nn.init.normal_(conv.weight)
        super().__init__(
            OrderedDict(norm=PixelNorm(), conv=conv, wscale=WScale(3, channels, 1.0), clamp=nn.Hardtanh(-1, 1))
        )


class ProgGAN(nn.Sequential):
    """A Progressive GAN generator: latents [N, L] or [N, L, 1, 1] -> images [N, 3, S, S] in -1..1.

    `sizes` is [L, channels at 4x4, at 8x8, ...], so ``S = 4 * 2 ** (len(sizes) - 2)``. The modules are
    named ``layer1``, ``layer2``, ... and ``output_SxS``, as in the published checkpoints.
    """

    def __init__(self, sizes: list[int]):
        if len(sizes) < 2:
            raise RewriteCoreError(f"sizes needs the latent size and at least one channel count, got {sizes}.")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["layer1"] = Layer(sizes[0], sizes[1], kernel=4, padding=3)
        layers["layer2"] = Layer(sizes[1], sizes[1])
        for before, after in itertools.pairwise(sizes[1:]):
            layers[f"layer{len(layers) + 1}"] = Layer(before, after, up=True)
            layers[f"layer{len(layers) + 1}"] = Layer(after, after)
        side = 2 ** len(sizes)
        layers[f"output_{side}x{side}"] = Output(sizes[-1])
        super().__init__(layers)
        self.sizes = list(sizes)

    def forward(self, latents: Tensor) -> Tensor:
        if latents.ndim == 2:
            latents = latents[:, :, None, None]
        return super().forward(latents)


def load_proggan(source: str | os.PathLike | Mapping[str, Any]) -> ProgGAN:
    """Builds the float32 CPU generator a checkpoint describes; its `sizes` come from the shapes.

    `source` is a file or dict `read_state_dict` understands, with the published names
    ``layerN.conv.weight``, ``layerN.wscale.b`` and ``output_SxS...``.

    Raises FileFormatError, naming the first key that is missing, unexpected or of a wrong shape.
    """
    state = without_prefixes(read_state_dict(source), lambda key: _CONVOLUTION.fullmatch(key) is not None)
    layers = [int(match[1]) for match in map(_CONVOLUTION.fullmatch, state) if match]
    sizes: list[int] = []
    for index in range(1, max(layers, default=1) + 1, 2):
        key = f"layer{index}.conv.weight"
        if key not in state:
            raise FileFormatError(
                f"This is no Progressive GAN checkpoint in the published layout: {key!r} is missing, "
                f"its first key is {quoted(next(iter(state)))}; convert the generator to that layout."
            )
        outputs, inputs = size_of(state, key, 0, 4), size_of(state, key, 1, 4)
        sizes += [outputs] if sizes else [inputs, outputs]
    return build(lambda: ProgGAN(sizes), state)
