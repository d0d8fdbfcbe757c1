"""What an adapter of a generator family tells the library about a layer: its key, its weight, and what follows the
convolution."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import RewriteCoreError
from .weights import ComputedWeight, computed_weight


@dataclasses.dataclass(frozen=True)
class Call:
    """How a layer whose arithmetic is unknown was called: what it takes to call it so again."""

    place: str  # of the maps among the arguments
    positional: int  # how many arguments were, in the order of `given`
    given: dict[str, Any]  # all of them, with None for tensors
    ndim: int  # of the maps as given
    last: bool  # whether their channels are the last axis


@dataclasses.dataclass(frozen=True)
class Capture:
    """One call of a layer on N latents: the key map and whatever else the value depends on. Of a layer that runs
    once for each part of the latents it is all its runs, one after the other."""

    key: Tensor  # [N, I, *map], what the layer's weight really multiplies
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # e.g. "style" [N, I], "noise"
    call: Call | None = None
    runs: int = 1  # more than 1: those of tiles, loops and shared layers; the key has no map of each latent then

    def to_dtype(self, dtype: torch.dtype) -> Capture:
        extra = {name: part.to(dtype) for name, part in self.extra.items()}
        return dataclasses.replace(self, key=self.key.to(dtype), extra=extra)


@dataclasses.dataclass(frozen=True)
class PostOperation:
    """What a layer does after its linear operator, per output channel:

    ``value = gain * leaky_relu(m * linear + shift, slope)`` with ``m = 1``, or, where `style` is given,
    StyleGAN2's demodulation ``m_o = (sum_{i,y,x} (style_i W_oiyx)^2 + eps)^(-1/2)``.
    """

    shift: Tensor | None = None  # broadcasts to the value [N, O, *map]
    slope: float = 1.0
    gain: float = 1.0
    style: Tensor | None = None  # [N, I], the constant weight scale included
    eps: float = 0.0


Box = tuple[int, ...]
"""Where a box of a map starts on each axis, then where it ends, exclusive: top, left, bottom, right of an image."""


def window(box: Box) -> tuple[slice, ...]:
    """The index of a box in a tensor [N, C, *map]."""
    axes = len(box) // 2
    return (slice(None), slice(None), *map(slice, box[:axes], box[axes:]))


def per_channel(vector: Tensor, axes: int) -> Tensor:
    """A vector [O] (or rows [N, O]) as [1, O, 1, ...] (or [N, O, 1, ...]), to broadcast over a map of so many axes."""
    return vector.reshape(*([1] if vector.ndim == 1 else []), *vector.shape, *[1] * axes)


def in_place_of(output: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` that takes the place of what a layer put out. Raises RewriteCoreError where it is not as
    large."""
    if value.numel() != output.numel():
        raise RewriteCoreError(
            f"A value of shape {list(value.shape)} cannot take the place of what the layer puts out, "
            f"{list(output.shape)}."
        )
    return value.to(output, copy=True).reshape(output.shape)


def has(module: nn.Module | None, *names: str) -> bool:
    """Whether a module has all these attributes, without reading any: a parametrized one computes, and in train mode
    spectral norm then iterates."""
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return False
    present = {*module.__dict__, *module._parameters, *module._buffers, *module._modules}
    return all(name in present or hasattr(type(module), name) for name in names)


def absent(module: nn.Module) -> str:
    """Why weights of a module are on the meta device, and what to do."""
    hooks = module._forward_pre_hooks and computed_weight(module) is None
    if hooks or has(module, "_hf_hook"):
        return (
            "it is offloaded: its weights are on the meta device between passes, and a hook brings them; bind it by "
            "its name, which brings those of accelerate, or load the generator without offloading"
        )
    return "it is on the meta device, where weights have no values; give it some with to_empty and load_state_dict"


def unusual(weight: Tensor) -> str | None:
    """Why a weight cannot be edited as it is stored; None where it can."""
    if type(weight).__name__ == "DTensor":
        return (
            "its weight is a DTensor, sharded over processes (FSDP2, tensor parallelism); load the full state dict "
            "into a "
            "generator that is not sharded, and bind that"
        )
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}, not a plain tensor; bind a generator that is not quantised"
    if weight.is_complex():
        return f"its weight is {weight.dtype}, and keys and weights here are real"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; bind a generator that is not quantised"
    if weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}, which has no arithmetic of its own; bind a copy in bfloat16 or float32"
    if weight.ndim < 2 or not weight.numel():
        return (
            f"its weight has shape {list(weight.shape)} between passes, as where FSDP or ZeRO shard it; bind a "
            "generator that "
            "is not sharded"
        )
    return None


class LayerAdapter(abc.ABC):
    """What the library knows of one bindable layer of a generator. Subclasses live one per generator family in this
    folder.

    A *map* has any number of axes: (h, w) of an image, (L,) of a sequence, (d, h, w) of a volume, and the leading axes
    of what a linear layer is given. The kernel has as many, or none for a linear layer.
    """

    family: ClassVar[str]
    weight_name: ClassVar[str] = "weight"  # of the module's tensor that is edited
    known: ClassVar[bool] = True  # whether linear() can be run on any channels, so on a crop and on one map at a time
    module: Any  # of many classes, which are known by their attributes
    remember: Callable[[str, Tensor, Callable[[], Tensor]], Tensor] | None = None  # a session's way to do :meth:`once`

    def __init__(self, path: str, module: nn.Module):
        self.path = path  # of the module that owns the weight
        self.module = module

    def once(self, what: str, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make()` makes of a weight alone; a session remembers it, so it is not to be written to."""
        return make() if self.remember is None else self.remember(what, weight, make)

    @property
    def pointwise(self) -> bool:
        """Whether the value at a position follows from the key there alone, and nothing else."""
        return False

    @property
    def groups(self) -> int:
        """Input and output channels fall into as many groups, each with its own keys and weights."""
        return 1

    @classmethod
    @abc.abstractmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        """The layer at `path` if it is of this family, else None. Generators' own classes are known by their
        attributes, not by isinstance: unpickled generators bring their own copy of them."""

    def refusal(self) -> str | None:
        """Why this layer, though of this family, cannot be edited; None where it can."""
        if any(parameter.is_meta for parameter in self.module.parameters(recurse=False)):
            return absent(self.module)
        computed = self.computed
        if computed is not None:
            return computed.refusal()
        weight = getattr(self.module, self.weight_name, None)
        if self.weight_name in self.module._buffers:
            return "its weight is a buffer, which this library does not edit; register it as a parameter"
        if not isinstance(weight, nn.Parameter):
            return "its weight is computed by something unknown, not used as stored; fold it into a parameter first"
        if is_lazy(weight):
            return "its weight has no shape before the generator's first run; run it once"
        return unusual(weight)

    @property
    def site(self) -> nn.Module:
        """The module whose call is intercepted; the forward pass stops there."""
        return self.module

    @property
    def computed(self) -> ComputedWeight | None:
        """How the module computes its weight, where it does not use a stored one (spectral norm, parametrizations)."""
        return computed_weight(self.module, self.weight_name)

    @property
    def weight(self) -> Tensor:
        """The weight that the forward pass uses: a parameter, unless it is computed and not folded."""
        computed = self.computed
        return getattr(self.module, self.weight_name) if computed is None else computed.read()

    def canonical(self, weight: Tensor) -> Tensor:
        """The weight as [O, I, *kernel]; a view where possible. Zero between different groups."""
        return weight

    def native(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`; differentiable."""
        return weight

    def own(self, weight: Tensor) -> Tensor:
        """A weight in the module's own layout as [O, I / groups, *kernel], without the zeros of :meth:`canonical`."""
        return self.canonical(weight)

    def inside_groups(self, weight: Tensor) -> Tensor:
        """What of a weight [O, I, *kernel] is inside the layer's groups, [O, I / groups, *kernel]."""
        return weight if self.groups == 1 else self.own(self.native(weight))

    @abc.abstractmethod
    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        """The key, and what else the value needs, from the arguments of the intercepted call."""

    @abc.abstractmethod
    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operator. key [N, I', *map], weight [O', I', *kernel] -> [N, O', *map'] for any
        I' and O': the solver also runs it on one-hot kernels over a single map."""

    def used(self, key: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of a weight [O, I, *kernel], or [O, I / groups, *kernel]: its linear operator, but for
        weights between groups."""
        return self.linear(key, weight)

    def taps(self, maps: Tensor, kernel: Sequence[int]) -> Tensor:
        """The linear operator on maps [M, *map], each by itself, with every one-hot kernel of that size: [M, taps,
        *map']."""
        count = math.prod(kernel)
        kernels = torch.eye(count, dtype=maps.dtype, device=maps.device).reshape(count, 1, *kernel)
        return self.linear(maps[:, None], kernels)

    @abc.abstractmethod
    def post_operation(self, capture: Capture) -> PostOperation | None:
        """What follows the linear operator; None where that is unknown or couples channels."""

    @abc.abstractmethod
    def value(self, capture: Capture, weight: Tensor) -> Tensor:
        """The value [N, O, *map], differentiable in `weight` [O, I, *kernel] or [O, I / groups, *kernel]."""

    def crop(self, capture: Capture, key_box: Box, value_box: Box) -> Capture:
        """The capture restricted to a box of the key map and the matching box of the value."""
        return dataclasses.replace(capture, key=capture.key[window(key_box)], extra=dict(capture.extra))

    def replace_value(self, output: Tensor, value: Tensor) -> Tensor:
        """The output of the intercepted call with its value replaced (to render an edited feature map). A copy, as what
        follows may write to it."""
        return value.to(output, copy=True)
