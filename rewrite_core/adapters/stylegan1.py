"""StyleGAN generators: Karras, Laine, Aila, *A Style-Based Generator Architecture for Generative Adversarial Networks*,
CVPR 2019 (arXiv 1812.04948).

Their weights are equalised: stored at unit variance, and multiplied with a constant as they are used. What is edited is
the stored weight, so that an edited state dict loads where the original did; the constant is part of the linear
operator. Noise, leaky ReLU and AdaIN follow. AdaIN normalises over the map, so the value is the convolution's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Capture, LayerAdapter, has
from .conv import ConvLayer, LinearLayer, PlainLayer, kind_of
from .weights import class_name


def _equalising_hook(module: nn.Module) -> Any | None:
    """The hook that makes ``weight`` of ``weight_orig``, where it is a constant times it."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "EqualLR" and getattr(hook, "name", None) == "weight":
            return hook
    return None


class _Equalised(PlainLayer):
    """Shared by layers with an EqualLR hook: the stored weight and the constant."""

    family = "stylegan1"
    weight_name = "weight_orig"

    @property
    def constant(self) -> float:
        with torch.no_grad():
            hook: Any = _equalising_hook(self.module)
            return float(hook.compute_weight(_Ones(self.module)).flatten()[0])

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        return super().linear(key, weight * self.constant)  # type: ignore[safe-super]  # beside a ConvLayer


class _Ones:
    """Stands for a module whose stored weight is all ones, so that the hook's result is its constant."""

    def __init__(self, module: Any):
        self.weight_orig = torch.ones(1).expand(module.weight_orig.shape)


class EqualisedConvLayer(_Equalised, ConvLayer):
    """An ``nn.Conv2d`` in an EqualConv2d. Also binds as the EqualConv2d itself."""

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module: Any = generator.get_submodule(path)
        for part in ("conv", "linear"):
            inner: Any = getattr(module, part, None)
            if kind_of(inner) and _equalising_hook(inner):
                path, module = f"{path}.{part}".lstrip("."), getattr(module, part)
        if kind_of(module) is None or _equalising_hook(module) is None:
            return None
        return (EqualisedLinearLayer if kind_of(module) is nn.Linear else EqualisedConvLayer)(path, module)

    def refusal(self) -> str | None:
        plain = kind_of(self.module) is nn.Conv2d and self.module.groups == 1
        return super().refusal() if plain else "it is equalised, but no plain two-dimensional convolution"

    def taps(self, maps: Tensor, kernel: Sequence[int]) -> Tensor:
        return super().taps(maps, kernel) * self.constant


class EqualisedLinearLayer(_Equalised, LinearLayer):
    """An ``nn.Linear`` in an EqualLinear."""


class FusedUpsampleLayer(PlainLayer):
    """Upsampling and convolution in one: a transposed convolution by a blurred kernel. Weight [I, O, k, k]."""

    family = "stylegan1"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        known = class_name(module) == "FusedUpsample" and has(module, "weight", "bias", "multiplier", "pad")
        return cls(path, module) if known else None

    def refusal(self) -> str | None:
        return LayerAdapter.refusal(self)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)

    def native(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        return Capture(args[0] if args else kwargs["input"])

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        kernel = F.avg_pool2d(F.pad(weight * self.module.multiplier, (1, 1, 1, 1)), 2, stride=1)
        return F.conv_transpose2d(key, kernel.transpose(0, 1), stride=2, padding=self.module.pad)
