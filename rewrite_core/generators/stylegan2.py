"""StyleGAN2 generators, in the layout of the widely used PyTorch port's checkpoints.

Each layer is modulation -> convolution -> demodulation -> noise -> bias -> leaky ReLU.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FileFormatError, RewriteCoreError, number, quoted
from ..files import read_state_dict
from .checkpoint import build, check_state, described, size_of, without_prefixes
from .proggan import PixelNorm

BLUR_TAPS = (1.0, 3.0, 3.0, 1.0)
NOISE_KINDS = ("fixed", "random", "none")
_LARGEST = 4096  # pixels of a side


def biased_leaky_relu(x: Tensor, bias: Tensor) -> Tensor:
    """``leaky_relu(x + bias, 0.2) * sqrt(2)`` for x [N, C] or [N, C, H, W] and bias [C]."""
    out = x + bias.view(-1, *[1] * (x.ndim - 2))
    if torch.is_grad_enabled():
        return F.leaky_relu(out, 0.2) * math.sqrt(2)
    return F.leaky_relu_(out, 0.2).mul_(math.sqrt(2))  # the same numbers, and two maps less are written


def published_channels(channel_multiplier: int = 2) -> dict[int, int]:
    """Map size -> channels as published; `channel_multiplier` is 2 for config F, 1 for config E."""
    wide = {4: 512, 8: 512, 16: 512, 32: 512}
    return wide | {size: 16384 // size * channel_multiplier for size in (64, 128, 256, 512, 1024)}


def _blur_kernel() -> Tensor:
    """[4, 4], summing to 4: what zero-insertion by two takes away, the blur gives back."""
    taps = torch.tensor(BLUR_TAPS)
    return 4 * torch.outer(taps, taps) / taps.sum() ** 2


class EqualLinear(nn.Module):
    """A linear layer with equalised learning rate, [N, inputs] -> [N, outputs].

    ``weight * lr_mul / sqrt(inputs)`` and ``bias * lr_mul`` are what it uses; `activate` adds the
    biased leaky ReLU.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, lr_mul: float = 1.0, activate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.full((outputs,), float(bias)))
        self.scale = lr_mul / math.sqrt(inputs)
        self.lr_mul = lr_mul
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        if self.activate:
            return biased_leaky_relu(F.linear(x, self.weight * self.scale), self.bias * self.lr_mul)
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class Blur(nn.Module):
    """Filters every channel by itself: [N, C, H, W] padded by `pad` (before, after), then convolved."""

    kernel: Tensor

    def __init__(self, pad: tuple[int, int]):
        super().__init__()
        self.kernel: Tensor
        self.register_buffer("kernel", _blur_kernel())
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).flip(0, 1).expand(channels, 1, -1, -1)
        return F.conv2d(F.pad(x, self.pad * 2), kernel, groups=channels)


class Upsample(nn.Module):
    """Doubles the map size by zero-insertion and a blur: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel: Tensor
        self.register_buffer("kernel", _blur_kernel())

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)


class ModulatedConv2d(nn.Module):
    """A style-modulated, demodulated convolution: x [N, I, H, W], latent [N, style_dim] -> [N, O, H', W'].

    Written in separated form, ``demodulation * linear(style * x)``, which equals the fused form of
    the paper (one weight per image) because both factors are constant over the map. With
    `upsample`, H' = 2H and W' = 2W, else the size is kept. `weight` is [1, O, I, k, k].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        style_dim: int,
        upsample: bool = False,
        demodulate: bool = True,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel, kernel))
        self.scale = 1 / math.sqrt(in_channels * kernel**2)
        self.padding = kernel // 2
        self.upsample = upsample
        self.demodulate = demodulate
        if upsample:
            excess = len(BLUR_TAPS) - 2 - (kernel - 1)
            self.blur = Blur(pad=((excess + 1) // 2 + 1, excess // 2 + 1))
        self.modulation = EqualLinear(style_dim, in_channels, bias=1.0)

    def key(self, x: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolution multiplies: key [N, I, H, W] = style * x, and the style [N, I]."""
        style = self.modulation(latent)
        return x * style[:, :, None, None], style

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operator, [N, I', H, W] and [O', I', k, k] -> [N, O', H', W'], same dtype.

        Any number of channels, any map size. The scale is the layer's own, 1/sqrt(I k^2), whatever
        the shape of `weight`, so the operator is linear in `key` and in `weight`.
        """
        weight = weight * self.scale
        if self.upsample:
            return self.blur(F.conv_transpose2d(key, weight.transpose(0, 1), stride=2))
        return F.conv2d(key, weight, padding=self.padding)

    def demodulation(self, style: Tensor, weight: Tensor) -> Tensor | None:
        """[N, O] = (sum over i, y, x of (scale * weight * style)^2 + 1e-8)^-1/2, or None.

        `style` is [N, I] and `weight` [O, I, k, k]. Summed in float32 at least: 1e-8 is zero in
        float16. None when the layer does not demodulate.
        """
        if not self.demodulate:
            return None
        wide = torch.promote_types(style.dtype, torch.float32)
        power = (weight.to(wide) * self.scale).square().sum((2, 3))
        return torch.rsqrt(F.linear(style.to(wide).square(), power) + 1e-8).to(style.dtype)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        key, style = self.key(x, latent)
        out = self.linear(key, self.weight[0])
        gain = self.demodulation(style, self.weight[0])
        if gain is None:
            return out
        gain = gain[:, :, None, None]
        # the blur's output is a module's, which a hook may keep; autocast may make the types differ
        in_place = not (torch.is_grad_enabled() or self.upsample) and gain.dtype == out.dtype
        return out.mul_(gain) if in_place else out * gain


class Noise(nn.Module):
    """``x + weight * noise``: x [N, C, H, W], noise [1 or N, 1, H, W] or None, weight [1]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        return x if noise is None else x + self.weight * noise


class BiasedLeakyReLU(nn.Module):
    """`biased_leaky_relu` with a learned bias [C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return biased_leaky_relu(x, self.bias)


class StyledConv(nn.Module):
    """One layer: modulated 3x3 convolution, noise, bias and leaky ReLU; shapes as `ModulatedConv2d`."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, upsample: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, upsample)
        self.noise = Noise()
        self.activate = BiasedLeakyReLU(out_channels)

    def forward(self, x: Tensor, latent: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.activate(self.noise(self.conv(x, latent), noise))


class ToRGB(nn.Module):
    """Adds a layer's contribution to the image: x [N, C, H, W], skip [N, 3, H/2, W/2] -> [N, 3, H, W]."""

    def __init__(self, channels: int, style_dim: int, upsample: bool = True):
        super().__init__()
        if upsample:
            self.upsample = Upsample()
        self.conv = ModulatedConv2d(channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, latent: Tensor, skip: Tensor | None = None) -> Tensor:
        out = self.conv(x, latent) + self.bias
        return out if skip is None else out + self.upsample(skip)


class ConstantInput(nn.Module):
    """The learned 4x4 map every image starts from: count -> [count, C, 4, 4]."""

    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, count: int) -> Tensor:
        return self.input.expand(count, -1, -1, -1)


class StyleGAN2(nn.Module):
    """A StyleGAN2 generator: latents [N, style_dim] -> images [N, 3, size, size], about -1..1, not clamped.

    `channels` maps each map size 4, 8, ..., `size` to its number of channels (default: as published).
    Layers are ``conv1`` at 4x4, then ``convs.0`` (doubles the map), ``convs.1``, ``convs.2`` (doubles), ...;
    state-dict names are exactly those of a checkpoint's ``g_ema``. `latent_avg` [style_dim], the mean of
    the mapped latents, is needed for a `truncation` other than 1 and is not in the state dict.

    Raises RewriteCoreError for a `size` that is no power of two >= 4 and for missing `channels`.
    """

    def __init__(
        self,
        size: int,
        style_dim: int = 512,
        n_mlp: int = 8,
        channels: Mapping[int, int] | None = None,
        channel_multiplier: int = 2,
        truncation: float = 1.0,
    ):
        super().__init__()
        if size < 4 or size & (size - 1):
            raise RewriteCoreError(f"size must be a power of two from 4 up, got {size}.")
        channels = published_channels(channel_multiplier) if channels is None else channels
        sizes = [2**level for level in range(2, size.bit_length())]
        missing = [s for s in sizes if s not in channels]
        if missing:
            raise RewriteCoreError(f"channels needs an entry for each map size {sizes}, {missing} are missing.")
        self.size = size
        self.style_dim = style_dim
        self.n_mlp = n_mlp
        self.channels = {s: channels[s] for s in sizes}
        self.truncation = number("truncation", truncation)
        self.register_buffer("latent_avg", None, persistent=False)

        mlp = [EqualLinear(style_dim, style_dim, lr_mul=0.01, activate=True) for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *mlp)
        self.input = ConstantInput(channels[4])
        self.conv1 = StyledConv(channels[4], channels[4], style_dim)
        self.to_rgb1 = ToRGB(channels[4], style_dim, upsample=False)
        self.convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        for before, after in itertools.pairwise(sizes):
            self.convs.append(StyledConv(channels[before], channels[after], style_dim, upsample=True))
            self.convs.append(StyledConv(channels[after], channels[after], style_dim))
            self.to_rgbs.append(ToRGB(channels[after], style_dim))
        self.noises = nn.Module()
        for index, side in enumerate(sizes[:1] + [s for s in sizes[1:] for _ in range(2)]):
            self.noises.register_buffer(f"noise_{index}", torch.randn(1, 1, side, side))

    def mapping(self, latents: Tensor, truncation: float | None = None) -> Tensor:
        """Mapped latents [N, style_dim], drawn towards `latent_avg`: avg + truncation * (w - avg)."""
        truncation = self.truncation if truncation is None else truncation
        if truncation != 1 and self.latent_avg is None:
            raise RewriteCoreError(
                f"truncation={truncation} needs the mean mapped latent: "
                "set latent_avg, e.g. to G.style(many latents).mean(0), or use truncation=1."
            )
        if latents.ndim != 2 or latents.shape[1] != self.style_dim:
            raise RewriteCoreError(f"latents must be [N, {self.style_dim}], got {list(latents.shape)}.")
        mapped = self.style(latents)
        return mapped if truncation == 1 else self.latent_avg + truncation * (mapped - self.latent_avg)

    def forward(self, latents: Tensor, truncation: float | None = None, noise: str = "fixed") -> Tensor:
        """Images of `latents` [N, style_dim], in the generator's dtype.

        `truncation` overrides the attribute. `noise` is "fixed" (the stored maps, the same for every
        image), "random" (fresh for each image and call) or "none". Raises RewriteCoreError for any other
        noise, for latents of another shape, and for a truncation without `latent_avg`.
        """
        if noise not in NOISE_KINDS:
            raise RewriteCoreError(f"noise must be one of {NOISE_KINDS}, got {noise!r}.")
        latent = self.mapping(latents, truncation)
        noises = [self._noise(index, noise, latent) for index in range(1 + len(self.convs))]
        x = self.conv1(self.input(len(latent)), latent, noises[0])
        image = self.to_rgb1(x, latent)
        for index, conv in enumerate(self.convs):
            x = conv(x, latent, noises[1 + index])
            if index % 2:
                image = self.to_rgbs[index // 2](x, latent, image)
        return image

    def _noise(self, index: int, kind: str, latent: Tensor) -> Tensor | None:
        if kind == "none":
            return None
        stored = getattr(self.noises, f"noise_{index}")
        return stored if kind == "fixed" else torch.randn_like(stored.expand(len(latent), -1, -1, -1))


def load_stylegan2(
    source: str | os.PathLike | Mapping[str, Any], size: int | None = None, truncation: float = 1.0
) -> StyleGAN2:
    """Builds the float32 CPU generator a checkpoint describes; sizes and channels come from its shapes.

    `source` is a file or dict `read_state_dict` understands: ``{"g_ema": ..., "latent_avg": ...}``, a
    training checkpoint with ``g_ema``, or a bare state dict (a ``latent_avg`` entry is used). Where a
    checkpoint has no ``noises`` (conversions before January 2020), they are drawn from numpy's
    ``RandomState(1)``, layer by layer.

    Raises FileFormatError, naming the first key that is missing, unexpected or of a wrong shape, and for more layers
    than any StyleGAN2 has; RewriteCoreError for a `size` that is not the checkpoint's and a truncation without
    latent_avg.
    """
    state = read_state_dict(source)
    latent_avg = state.pop("latent_avg", None)
    state = without_prefixes(state, lambda key: key.startswith(("input.", "conv1.")))

    def channels_of(name: str, axis: int, ndim: int) -> int:
        if name not in state:
            raise FileFormatError(
                f"This is no StyleGAN2 checkpoint in stylegan2-pytorch's g_ema layout: {name!r} is missing, "
                f"its first key is {quoted(next(iter(state), None))}; convert the generator to that layout."
            )
        return size_of(state, name, axis, ndim)

    def count(prefix: str) -> int:
        return len({key.split(".")[1] for key in state if key.startswith(prefix)})

    doublings = (count("convs.") + 1) // 2
    channels = {4: channels_of("input.input", 1, 4)}
    for level in range(doublings):
        channels[8 << level] = channels_of(f"convs.{2 * level}.conv.weight", 1, 5)
    found = 4 << doublings
    if size is not None and size != found:
        raise RewriteCoreError(f"The checkpoint paints {found}x{found} images, not {size}x{size}; leave size out.")
    if found > _LARGEST:
        raise FileFormatError(
            f"This checkpoint has the layers of {found}x{found} images, and no StyleGAN2 paints more than {_LARGEST}; "
            "give "
            "the state dict as published."
        )
    style_dim = channels_of("conv1.conv.modulation.weight", 1, 2)
    n_mlp = count("style.")

    def make() -> StyleGAN2:
        return StyleGAN2(found, style_dim, n_mlp, channels, truncation=truncation)

    if not any(key.startswith("noises.") for key in state):
        check_state(described(make), state, optional="noises.")  # before maps are drawn for layers that are not there
        state |= _seeded_noises(doublings)
    model = build(make, state)
    if latent_avg is not None:
        if latent_avg.numel() != style_dim:
            raise FileFormatError(f"latent_avg must have {style_dim} values, got {list(latent_avg.shape)}.")
        model.latent_avg = latent_avg.detach().reshape(style_dim).to(model.input.input.dtype, copy=True)
    elif truncation != 1:
        raise RewriteCoreError(
            f"truncation={truncation} needs latent_avg, which this checkpoint lacks; load with truncation=1."
        )
    return model


def _seeded_noises(doublings: int) -> dict[str, Tensor]:
    rng = np.random.RandomState(1)
    sides = [4 << (index + 1) // 2 for index in range(1 + 2 * doublings)]
    return {
        f"noises.noise_{index}": torch.from_numpy(rng.standard_normal((1, 1, side, side))).float()
        for index, side in enumerate(sides)
    }
