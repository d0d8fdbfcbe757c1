"""Any other module with a weight, by running it: what it does with its weight is not known, so a rewrite of it is found
through autograd (solver "adam" or "projected") and on the whole map.

The *key* is the module's input, the *value* its output, computed by ``torch.func.functional_call`` with another weight
in the place of its own: an equalised convolution, a subclass of nn.Conv2d with a forward of its own, a modulated
convolution of an unknown generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from ..errors import RewriteCoreError, SolverError
from ..modes import evaluating
from .base import Box, Call, Capture, LayerAdapter, PostOperation, in_place_of
from .conv import TRANSPOSED, kind_of
from .offloading import unhooked


class GeneralLayer(LayerAdapter):
    """A module that owns a weight [O, I, *kernel] (or [1, O, I, *kernel]; [I, O, *kernel] in a subclass of a transposed
    convolution) and is given maps [N, I, *map], or for a weight [O, I] also [N, ..., I]. Other tensors that it is given
    are taken along, one row per latent."""

    family = "general"
    known = False
    _call: Call | None = None
    _alone = False

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        weight = module._parameters.get(cls.weight_name)
        own = getattr(unhooked(module), "__func__", None) is not type(module).forward
        of_torch = type(module).__module__.split(".")[0] == "torch" and not own
        if weight is None or of_torch or is_lazy(weight) or weight.ndim < 2:
            return None
        return cls(path, module)

    def refusal(self) -> str | None:
        if getattr(self.module, "groups", 1) != 1:
            return (
                f"{type(self.module).__name__} has a forward and groups of its own, and what it computes is not known"
            )
        return super().refusal()

    @property
    def _boxed(self) -> bool:
        """Whether the weight has a leading axis of 1, as grouped convolutions of one picture each want it."""
        weight = self.module._parameters[self.weight_name]
        return weight.ndim > 3 and len(weight) == 1 and kind_of(self.module) is None

    def canonical(self, weight: Tensor) -> Tensor:
        return weight[0] if self._boxed else weight.transpose(0, 1) if kind_of(self.module) in TRANSPOSED else weight

    def native(self, weight: Tensor) -> Tensor:
        return weight[None] if self._boxed else weight.transpose(0, 1) if kind_of(self.module) in TRANSPOSED else weight

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        given = {str(i): part for i, part in enumerate(args)} | kwargs
        extra = {name: part for name, part in given.items() if isinstance(part, Tensor)}
        place = next((name for name, part in extra.items() if part.is_floating_point()), None)
        key = None if place is None else extra.pop(place)
        shape = [] if key is None else list(key.shape)
        _, channels, *kernel = self.canonical(self.weight).shape
        last = not kernel and len(shape) > 1 and shape[-1] == channels
        if place is None or key is None or len(shape) < 2 or shape[-1 if last else 1] != channels:
            raise RewriteCoreError(
                f"Layer {self.path!r} is given {shape or None} and its weight takes {channels} channels, so what its "
                "keys "
                "are is not known"
            )
        for part in extra.values():
            if not part.is_floating_point() or part.ndim == 0 or len(part) not in (1, len(key)):
                raise RewriteCoreError(
                    f"Layer {self.path!r} is given a {part.dtype} tensor {list(part.shape)} besides its maps, which "
                    "cannot be taken along"
                )
        plain = {name: None if isinstance(part, Tensor) else part for name, part in given.items()}  # in order
        call = Call(place, len(args), plain, key.ndim, last)
        self._call, self._alone = call, not extra  # the last one, for what is asked without a capture
        return Capture(_inwards(key, call), extra, call)

    def value(self, capture: Capture, weight: Tensor) -> Tensor:
        held = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        tensors = {
            name: tensor.detach().to(weight.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in held.items()
        }
        tensors[self.weight_name] = self.native(weight)
        call = capture.call
        if call is None:
            raise SolverError(
                f"Layer {self.path!r} is not known, and cannot be run on keys alone; use solver='adam'.",
                advice={"solver": "adam"},
            )
        parts = [*(call.given | capture.extra | {call.place: _outwards(capture.key, call)}).items()]
        args, kwargs = (part for _, part in parts[: call.positional]), dict(parts[call.positional :])
        with evaluating(self.module):
            output = functional_call(self.module, tensors, tuple(args), kwargs)
        out_channels = self.canonical(self.weight).shape[0]
        if isinstance(output, Tensor) and output.ndim == call.ndim:
            value = _inwards(output, call)
            if len(value) == len(capture.key) and value.shape[1] == out_channels:
                return value
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise RewriteCoreError(
            f"Layer {self.path!r} puts out {found} and its weight has {out_channels} output channels, so what its "
            "values "
            "are is not known"
        )

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        """The value without what it is at a weight of zeros; for the layer's own numbers of channels only."""
        if weight.shape != self.canonical(self.weight).shape or not self._alone:
            raise SolverError(
                f"What layer {self.path!r} does with its weight is not known; use solver='adam', without `preserve`, "
                "and "
                "region='map'.",
                advice={"solver": "adam", "`preserve`": None, "region": "map"},
            )
        capture = Capture(key, call=self._call)
        return self.value(capture, weight) - self.value(capture, torch.zeros_like(weight))

    def post_operation(self, capture: Capture) -> PostOperation | None:
        return None

    def crop(self, capture: Capture, key_box: Box, value_box: Box) -> Capture:
        raise SolverError(
            f"Layer {self.path!r} cannot be run on a crop of its map; use region='map'.", advice={"region": "map"}
        )

    def replace_value(self, output: Tensor, value: Tensor) -> Tensor:
        return in_place_of(output, value if self._call is None else _outwards(value, self._call))


def _inwards(rows: Tensor, call: Call) -> Tensor:
    """What a layer is given or puts out, as maps [N, C, *map]."""
    rows = rows.movedim(-1, 1) if call.last else rows
    return rows[..., None] if call.ndim == 2 else rows


def _outwards(maps: Tensor, call: Call) -> Tensor:
    """The inverse of :func:`_inwards`."""
    maps = maps[..., 0] if call.ndim == 2 else maps
    return maps.movedim(1, -1) if call.last else maps
