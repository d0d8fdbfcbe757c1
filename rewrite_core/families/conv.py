"""Plain convolutions, ``nn.Conv2d`` and ``nn.ConvTranspose2d``, in any generator (DCGAN among them).

The *key* is the module's input, the *value* its output, so the layer is linear in its weight up to a
bias, and an L2 rewrite has the exact closed form.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Capture, LayerFamily, PostOperation


class ConvLayer(LayerFamily):
    """``nn.Conv2d``: weight [O, I, kh, kw]."""

    name = "conv"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerFamily | None:
        module = generator.get_submodule(path)
        if isinstance(module, nn.ConvTranspose2d):
            return TransposedConvLayer(path, module)
        return ConvLayer(path, module) if isinstance(module, nn.Conv2d) else None

    def refusal(self) -> str | None:
        kind = nn.ConvTranspose2d if isinstance(self.module, nn.ConvTranspose2d) else nn.Conv2d
        # a subclass's methods, and a forward that was put on this one module
        methods = getattr(self.module.forward, "__func__", None), getattr(type(self.module), "_conv_forward", None)
        if methods != (kind.forward, getattr(kind, "_conv_forward", None)):
            return f"{type(self.module).__name__} has a forward of its own, and what it computes is not known"
        if self.module.groups != 1:
            return f"it is a grouped convolution ({self.module.groups} groups), whose inputs no one direction spans"
        return super().refusal()

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        return Capture(args[0] if args else kwargs["input"])

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        # the module's own convolution, so that padding modes are honoured
        return self.module._conv_forward(key, weight, None)

    def post_operation(self, capture: Capture) -> PostOperation:
        bias = self.module.bias
        return PostOperation(shift=None if bias is None else bias.detach()[None, :, None, None])

    def value(self, capture: Capture, weight: Tensor) -> Tensor:
        linear = self.linear(capture.key, weight)
        bias = self.module.bias
        return linear if bias is None else linear + bias.detach().to(linear.dtype)[:, None, None]


class TransposedConvLayer(ConvLayer):
    """``nn.ConvTranspose2d``: weight [I, O, kh, kw]."""

    name = "conv_transpose"

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)

    def native(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        module = self.module
        return F.conv_transpose2d(
            key, weight.transpose(0, 1), None, module.stride, module.padding, module.output_padding, 1, module.dilation
        )
