"""What the layers of StyleGAN2 and StyleGAN3 share: a style scales the key, and the output is demodulated.

Karras, Laine, Aittala, Hellsten, Lehtinen, Aila, *Analyzing and Improving the Image Quality of StyleGAN*, CVPR 2020
(arXiv 1912.04958). The modulation scales the input and the demodulation scales the output, so the convolution between
them has one weight shared by all images, whatever the generator fuses them into. The *key* is style * x.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Box, Capture, LayerAdapter, PostOperation, per_channel, window

EPS = 1e-8  # of the demodulation


class ModulatedLayer(LayerAdapter):
    """A modulated convolution. A capture's extra: "style" [N, I] and, where it adds any, "noise" [N or 1, 1, H, W]."""

    @property
    def scale(self) -> float:
        """The constant that the weight is multiplied with."""
        return 1.0

    @property
    @abc.abstractmethod
    def demodulates(self) -> bool:
        """Whether the output is divided by the norm of the styled weight."""

    def after(self, capture: Capture) -> PostOperation:
        """What follows the demodulation; nothing by default."""
        return PostOperation()

    def demodulation(self, style: Tensor, weight: Tensor) -> Tensor:
        """[N, O] = (sum over i, y, x of (scale * weight * style)^2 + eps)^-1/2 for style [N, I], weight [O, I, k, k].
        In float32 at least: eps is zero in float16."""
        wide = torch.promote_types(style.dtype, torch.float32)
        power = self.once(f"power {wide}", weight, lambda: (weight.to(wide) * self.scale).square().sum((2, 3)))
        return torch.rsqrt(F.linear(style.to(wide).square(), power) + EPS).to(style.dtype)

    def post_operation(self, capture: Capture) -> PostOperation | None:
        after = self.after(capture)
        style = capture.extra["style"] * self.scale if self.demodulates else None
        return PostOperation(after.shift, after.slope, after.gain, style, EPS)

    def value(self, capture: Capture, weight: Tensor) -> Tensor:
        out, after = self.linear(capture.key, weight), self.after(capture)
        if self.demodulates:
            out = out * per_channel(self.demodulation(capture.extra["style"], weight), 2)
        if after.shift is not None:
            out = out + after.shift
        return out if after.slope == after.gain == 1 else F.leaky_relu(out, after.slope) * after.gain

    def crop(self, capture: Capture, key_box: Box, value_box: Box) -> Capture:
        cropped = super().crop(capture, key_box, value_box)
        if "noise" in cropped.extra:
            cropped.extra["noise"] = cropped.extra["noise"][window(value_box)]
        return cropped


@contextlib.contextmanager
def as_drawn_next(device: torch.device) -> Iterator[None]:
    """Random numbers drawn in here are those that the generator draws next, and it still draws them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def resample(
    x: Tensor, taps: Tensor | None, up: int = 1, down: int = 1, pad: tuple[int, ...] = (0, 0, 0, 0), gain: float = 1.0
) -> Tensor:
    """Inserts zeros between pixels, pads (left, right, top, bottom; negative crops), filters every channel by itself
    and keeps each `down`-th pixel: x [N, C, H, W], taps [t] (separable), [t, t] or None, times `gain`."""
    if up > 1:
        wide = x.new_zeros(*x.shape[:2], x.shape[2] * up, x.shape[3] * up)
        wide[:, :, ::up, ::up] = x
        x = wide
    x = F.pad(x, pad)
    if taps is not None:
        taps = taps.to(x)
        kernels = [taps[None, :], taps[:, None]] if taps.ndim == 1 else [taps]
        for kernel in kernels:
            x = F.conv2d(x, kernel.flip(0, 1).expand(x.shape[1], 1, -1, -1), groups=x.shape[1])
    return x[:, :, ::down, ::down] * gain
