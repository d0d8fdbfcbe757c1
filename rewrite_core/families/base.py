"""What a generator family tells the library about a layer: its key, its weight, and what follows the convolution."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclasses.dataclass(frozen=True)
class Capture:
    """One call of a layer on N latents: the key map and whatever else the value depends on."""

    key: Tensor  # [N, I, h, w], what the convolution really multiplies
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # e.g. "style" [N, I], "noise"

    def to_dtype(self, dtype) -> Capture:
        return Capture(self.key.to(dtype), {name: part.to(dtype) for name, part in self.extra.items()})


@dataclasses.dataclass(frozen=True)
class PostOperation:
    """What a layer does after its linear operator, per output channel:

    ``value = gain * leaky_relu(m * linear + shift, slope)`` with ``m = 1``, or, where `style` is given,
    StyleGAN2's demodulation ``m_o = (sum_{i,y,x} (style_i W_oiyx)^2 + eps)^(-1/2)``.
    """

    shift: Tensor | None = None  # broadcasts to the value [N, O, H, W]
    slope: float = 1.0
    gain: float = 1.0
    style: Tensor | None = None  # [N, I], the constant weight scale included
    eps: float = 0.0


Box = tuple[int, int, int, int]
"""top, left, bottom, right; the last two exclusive."""


class LayerFamily(abc.ABC):
    """One bindable layer of a generator. Subclasses live one per file in ``rewrite_core/families``."""

    name: ClassVar[str]

    def __init__(self, path: str, module: nn.Module):
        self.path = path  # of the module that owns the weight
        self.module = module

    @classmethod
    @abc.abstractmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerFamily | None:
        """The layer at `path` if it is of this family, else None. Generators' own classes are known by their
        attributes, not by isinstance: unpickled generators bring their own copy of them."""

    def refusal(self) -> str | None:
        """Why this layer, though of this family, cannot be edited; None where it can."""
        if not isinstance(self.weight, nn.Parameter):
            return "its weight is computed by a hook or a parametrization, not used as stored"
        if is_lazy(self.weight):
            return "its weight has no shape before the generator's first run; run it once"
        return None

    @property
    def site(self) -> nn.Module:
        """The module whose call is intercepted; the forward pass stops there."""
        return self.module

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    def canonical(self, weight: Tensor) -> Tensor:
        """The weight as [O, I, kh, kw]; a view where possible."""
        return weight

    def native(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        return weight

    @abc.abstractmethod
    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        """The key, and what else the value needs, from the arguments of the intercepted call."""

    @abc.abstractmethod
    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operator. key [N, I', h, w], weight [O', I', kh, kw] -> [N, O', H, W] for any
        I' and O': the solver also runs it on one-hot kernels over a single map."""

    @abc.abstractmethod
    def post_operation(self, capture: Capture) -> PostOperation | None:
        """What follows the linear operator; None where that is unknown or couples channels."""

    @abc.abstractmethod
    def value(self, capture: Capture, weight: Tensor) -> Tensor:
        """The value [N, O, H, W], differentiable in `weight` [O, I, kh, kw]."""

    def crop(self, capture: Capture, key_box: Box, value_box: Box) -> Capture:
        """The capture restricted to a box of the key map and the matching box of the value."""
        top, left, bottom, right = key_box
        return Capture(capture.key[:, :, top:bottom, left:right], dict(capture.extra))

    def replace_value(self, output: Tensor, value: Tensor) -> Tensor:
        """The output of the intercepted call with its value replaced (to render an edited feature map)."""
        return value.to(output)
