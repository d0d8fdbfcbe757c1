"""Plain convolutions of any dimension, and linear layers, in any generator (DCGAN and autoencoder decoders among them).

The *key* is the module's input, the *value* its output, so the layer is linear in its weight up to a bias, and an L2
rewrite has the exact closed form. Batch normalisation that follows it is a scale and a shift per channel in eval mode:
it changes the goal and the loss of a channel alike and its solution not at all, so the value is taken before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import RewriteCoreError
from .base import Capture, LayerAdapter, PostOperation, in_place_of, per_channel
from .offloading import unhooked

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
TRANSPOSED = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def kind_of(module: object) -> type[nn.Module] | None:
    """The torch layer that a module is, or is made from."""
    return next((kind for kind in (*CONVOLUTIONS, *TRANSPOSED, nn.Linear) if isinstance(module, kind)), None)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass's method, or a forward that was put on this one module, takes the place of torch's."""
    kind: Any = kind_of(module)
    methods = getattr(unhooked(module), "__func__", None), getattr(type(module), "_conv_forward", None)
    return methods != (kind.forward, getattr(kind, "_conv_forward", None))


class PlainLayer(LayerAdapter):
    """What convolutions and linear layers share: a linear operator and a bias."""

    def refusal(self) -> str | None:
        if _has_own_forward(self.module):
            return f"{type(self.module).__name__} has a forward of its own, and what it computes is not known"
        return super().refusal()

    def shift(self, capture: Capture) -> Tensor | None:
        bias = self.module.bias
        return None if bias is None else per_channel(bias.detach().to(capture.key.dtype), capture.key.ndim - 2)

    def post_operation(self, capture: Capture) -> PostOperation | None:
        return PostOperation(shift=self.shift(capture))

    def value(self, capture: Capture, weight: Tensor) -> Tensor:
        linear, shift = self.used(capture.key, weight), self.shift(capture)
        return linear if shift is None else linear + shift


class ConvLayer(PlainLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: weight [O, I / groups, *kernel]."""

    family = "conv"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        kind, weight = kind_of(module), module._parameters.get("weight")
        if kind is None or (weight is not None and _has_own_forward(module) and not is_lazy(weight)):
            return None  # the latter is GeneralLayer's
        adapter = LinearLayer if kind is nn.Linear else TransposedConvLayer if kind in TRANSPOSED else ConvLayer
        return adapter(path, module)

    @property
    def groups(self) -> int:
        return self.module.groups

    def canonical(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return weight
        dense = weight.new_zeros(len(weight), self.groups * weight.shape[1], *weight.shape[2:])
        self._blocks(dense).copy_(weight.unflatten(0, (self.groups, -1)).movedim(0, -1))
        return dense

    def native(self, weight: Tensor) -> Tensor:
        return weight if self.groups == 1 else self._blocks(weight).movedim(-1, 0).flatten(0, 1)

    def own(self, weight: Tensor) -> Tensor:
        return weight

    def _blocks(self, weight: Tensor) -> Tensor:
        """The weights inside groups, [O / groups, I / groups, *kernel, groups] of a weight [O, I, *kernel]; a view."""
        blocks = weight.unflatten(1, (self.groups, -1)).unflatten(0, (self.groups, -1))
        return blocks.diagonal(dim1=0, dim2=2)

    @property
    def pointwise(self) -> bool:
        module = self.module
        unpadded = isinstance(module.padding, str) or not any(module.padding)
        return set(module.kernel_size) == set(module.stride) == {1} and unpadded

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        key = args[0] if args else kwargs["input"]
        return Capture(key[None] if key.ndim == 1 + len(self.module.kernel_size) else key)  # one map, no batch

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(key, weight, groups=1)

    def used(self, key: Tensor, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return self.linear(key, weight)
        if weight.shape[1] == key.shape[1]:  # with zeros between groups
            weight = self.inside_groups(weight)
        return self._convolve(key, weight, self.groups)

    def taps(self, maps: Tensor, kernel: Sequence[int]) -> Tensor:
        """As views of the padded maps, and one copy: in a tenth of the time of a convolution with one-hot kernels."""
        module = self.module
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(maps[:, None], module._reversed_padding_repeated_twice, mode)[:, 0]
        for axis, (size, step, gap) in enumerate(zip(kernel, module.stride, module.dilation, strict=True), 1):
            padded = padded.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        axes = len(kernel)
        return padded.movedim([*range(1 + axes, 1 + 2 * axes)], [*range(1, 1 + axes)]).flatten(1, axes)

    def _convolve(self, key: Tensor, weight: Tensor, groups: int) -> Tensor:
        """With a weight [O, I / groups, *kernel]."""
        module, padding = self.module, self.module.padding
        if module.padding_mode != "zeros":
            key, padding = F.pad(key, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(module, kind))
        return convolve(key, weight, None, module.stride, padding, module.dilation, groups)

    def replace_value(self, output: Tensor, value: Tensor) -> Tensor:
        return in_place_of(output, value)


class TransposedConvLayer(ConvLayer):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``: weight [I, O / groups, *kernel]."""

    family = "conv_transpose"

    def canonical(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return weight.transpose(0, 1)
        dense = weight.new_zeros(len(weight), self.groups * weight.shape[1], *weight.shape[2:])
        self._blocks(dense).copy_(weight.unflatten(0, (self.groups, -1)).movedim(0, -1))
        return dense.transpose(0, 1)

    def native(self, weight: Tensor) -> Tensor:
        return super().native(weight.transpose(0, 1))

    def own(self, weight: Tensor) -> Tensor:
        return self._turned(weight, self.groups)

    @staticmethod
    def _turned(weight: Tensor, groups: int) -> Tensor:
        """[I, O / groups, *kernel] as [O, I / groups, *kernel], and the other way round."""
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        """Raises RewriteCoreError where an ``output_size`` asks for more than the layer's own output padding."""
        capture, module = super().capture(args[:1], kwargs), self.module
        wanted = args[1] if len(args) > 1 else kwargs.get("output_size")
        if wanted is not None:
            settings = zip(
                capture.key.shape[2:],
                module.stride,
                module.padding,
                module.dilation,
                module.kernel_size,
                module.output_padding,
                strict=True,
            )
            usual = [(n - 1) * step - 2 * pad + gap * (k - 1) + extra + 1 for n, step, pad, gap, k, extra in settings]
            if list(wanted)[-len(usual) :] != usual:
                raise RewriteCoreError(
                    f"Layer {self.path!r} is called with output_size={list(wanted)} and makes maps of {usual} by "
                    "itself, so "
                    "its output padding is not its own; give the layer that output_padding instead."
                )
        return capture

    def taps(self, maps: Tensor, kernel: Sequence[int]) -> Tensor:
        return LayerAdapter.taps(self, maps, kernel)

    def _convolve(self, key: Tensor, weight: Tensor, groups: int) -> Tensor:
        module, weight = self.module, self._turned(weight, groups)
        convolve = next(function for kind, function in TRANSPOSED.items() if isinstance(module, kind))
        return convolve(
            key, weight, None, module.stride, module.padding, module.output_padding, groups, module.dilation
        )


class LinearLayer(PlainLayer):
    """``nn.Linear``: weight [O, I], and a key at each of the leading positions: of input [N, ..., I] the map is what is
    between N and I (the tokens of a language model), and of input [N, I] one position."""

    family = "linear"

    @property
    def pointwise(self) -> bool:
        return True

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        return cls(path, module) if isinstance(module, nn.Linear) else None

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        rows = args[0] if args else kwargs["input"]
        rows = rows.reshape(*[1] * (2 - rows.ndim), *rows.shape)
        return Capture(rows[:, :, None] if rows.ndim == 2 else rows.movedim(-1, 1))

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        return F.linear(key.movedim(1, -1), weight).movedim(-1, 1)

    def replace_value(self, output: Tensor, value: Tensor) -> Tensor:
        return in_place_of(output, value.movedim(1, -1))
