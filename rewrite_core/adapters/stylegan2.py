"""Layers of StyleGAN2 generators, in the layout of the widely used PyTorch port.

Each layer is modulation -> convolution -> demodulation -> noise -> bias -> leaky ReLU; see ``modulated.py`` for what
that is as an associative memory. ``stylegan2_nvidia.py`` binds the other popular form.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Capture, LayerAdapter, PostOperation, has, per_channel
from .modulated import ModulatedLayer, as_drawn_next, resample
from .weights import class_name


class StyleGAN2Layer(ModulatedLayer):
    """``conv1.conv`` and ``convs.N.conv``: a modulated convolution. Also binds as ``conv1`` and ``convs.N``.

    The key carries the style (s * x). The value is the layer's output after demodulation, noise, bias and
    leaky ReLU; of a ``to_rgbs.N.conv``, which has none of these, it is the convolution's own output. Both our own
    modules and those of the port with grouped convolutions, known by their attributes.
    """

    family = "stylegan2"
    _ATTRIBUTES = ("weight", "modulation", "demodulate", "upsample", "scale", "padding")

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module: Any = generator.get_submodule(path)
        if has(getattr(module, "conv", None), *cls._ATTRIBUTES):
            return cls(f"{path}.conv".lstrip("."), module.conv, module if hasattr(module, "activate") else None)
        if not has(module, *cls._ATTRIBUTES):
            return None
        parent = generator.get_submodule(path.rpartition(".")[0])
        styled = getattr(parent, "conv", None) is module and hasattr(parent, "activate")
        return cls(path, module, parent if styled else None)

    def __init__(self, path: str, module: nn.Module, styled: nn.Module | None):
        super().__init__(path, module)
        self._styled: Any = styled  # the StyledConv around the convolution; None in ToRGB

    def refusal(self) -> str | None:
        if getattr(self.module, "downsample", False):
            return "it is a modulated convolution that downsamples, which no StyleGAN2 generator has"
        if self._styled is not None and not (hasattr(self._styled.activate, "bias") and hasattr(self._styled, "noise")):
            return f"{type(self._styled).__name__} is not StyleGAN2's noise, bias and leaky ReLU"
        reason, shape = super().refusal(), list(self.weight.shape)
        return reason or (None if len(shape) == 5 else f"its weight has shape {shape}, not [1, O, I, k, k]")

    @property
    def site(self) -> nn.Module:
        return self.module if self._styled is None else self._styled

    @property
    def scale(self) -> float:
        return float(self.module.scale)

    @property
    def demodulates(self) -> bool:
        return self.module.demodulate

    def canonical(self, weight: Tensor) -> Tensor:
        return weight[0]

    def native(self, weight: Tensor) -> Tensor:
        return weight[None]

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        x, latent, noise = self._arguments(*args, **kwargs)
        style = self.module.modulation(latent)
        capture = Capture(x * style[:, :, None, None], {"style": style})
        if self._styled is not None:
            if noise is None and class_name(self._styled.noise) == "NoiseInjection":  # draws its own
                shape = [side * (2 if self.module.upsample else 1) for side in x.shape[2:]]
                with as_drawn_next(x.device):
                    noise = x.new_empty(len(x), 1, *shape).normal_()
            if noise is not None:
                capture.extra["noise"] = noise
        return capture

    @staticmethod
    def _arguments(input: Tensor, style: Tensor | None = None, noise: Tensor | None = None, **renamed: Any) -> tuple:
        return input, renamed.get("latent", style), noise

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        if self.module.upsample:
            blur, (before, after) = self.module.blur, self.module.blur.pad
            # contiguous: to the same bits, in half the time
            turned = self.once("turned", weight, lambda: (weight * self.scale).transpose(0, 1).contiguous())
            return resample(F.conv_transpose2d(key, turned, stride=2), blur.kernel, pad=(before, after) * 2)
        scaled = self.once("scaled", weight, lambda: weight * self.scale)
        return F.conv2d(key, scaled, padding=self.module.padding)

    def after(self, capture: Capture) -> PostOperation:
        if self._styled is None:
            return PostOperation()
        activate, dtype, shift = self._styled.activate, capture.key.dtype, None
        if activate.bias is not None:
            shift = per_channel(activate.bias.detach().flatten().to(dtype), 2)
        if "noise" in capture.extra:
            noise = self._styled.noise.weight.detach().to(dtype) * capture.extra["noise"]
            shift = noise if shift is None else shift + noise
        slope, gain = getattr(activate, "negative_slope", 0.2), getattr(activate, "scale", math.sqrt(2))
        return PostOperation(shift, slope, gain)
