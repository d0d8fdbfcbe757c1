"""StyleGAN3 generators: Karras, Aittala, Laine, Härkönen, Hellsten, Lehtinen, Aila, *Alias-Free Generative
Adversarial Networks*, NeurIPS 2021 (arXiv 2106.12423).

A SynthesisLayer normalises weight and style (which its demodulation undoes), scales the input by a constant gain, and
ends with a leaky ReLU at a higher resolution between two filters, which couples pixels. So the value is taken before
that, at the demodulated convolution, where everything is per channel and "lm" applies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Capture, LayerAdapter, has, per_channel
from .modulated import ModulatedLayer, resample
from .weights import class_name


class StyleGAN3Layer(ModulatedLayer):
    """A SynthesisLayer, ToRGB included. The convolution pads fully, so its map is wider than the key's."""

    family = "stylegan3"
    _ATTRIBUTES = (
        "affine",
        "weight",
        "bias",
        "magnitude_ema",
        "is_torgb",
        "conv_kernel",
        "up_filter",
        "down_filter",
        "up_factor",
        "down_factor",
        "padding",
        "conv_clamp",
    )

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        known = class_name(module) == "SynthesisLayer" and has(module, *cls._ATTRIBUTES)
        return cls(path, module) if known else None

    @property
    def demodulates(self) -> bool:
        return not self.module.is_torgb

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        return self._capture(*args, **kwargs)

    def _capture(self, x: Tensor, w: Tensor, *settings: Any, **more: Any) -> Capture:
        module = self.module
        style = module.affine(w).to(torch.promote_types(x.dtype, torch.float32))
        if module.is_torgb:
            style = style / math.sqrt(x.shape[1] * module.conv_kernel**2)
        gain = module.magnitude_ema.rsqrt().to(style).expand(len(x), x.shape[1])
        return Capture(x.to(style.dtype) * (style * gain)[:, :, None, None], {"style": style})

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(key, weight, padding=self.module.conv_kernel - 1)

    def replace_value(self, output: Tensor, value: Tensor) -> Tensor:
        """What the rest of the layer makes of the value: bias, filtered leaky ReLU, clamp."""
        module, limit = self.module, self.module.conv_clamp
        slope, gain = (1.0, 1.0) if module.is_torgb else (0.2, math.sqrt(2))
        x = value + per_channel(module.bias.detach().to(value), 2)
        x = resample(x, module.up_filter, up=module.up_factor, pad=tuple(module.padding), gain=module.up_factor**2)
        x = F.leaky_relu(x, slope) * gain
        x = x if limit is None else x.clamp(-limit, limit)
        return resample(x, module.down_filter, down=module.down_factor).to(output)
