"""A rewrite as a ``torch.nn.utils.parametrize`` parametrization, which can be switched on and off."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapters.weights import Folded, Parametrized
from ..errors import MismatchError, flag
from ..layers.bound import BoundLayer
from ..modes import evaluating
from .stack import delta, module_lock, writing


class LowRankChange(nn.Module):
    """``W -> W + Lambda D`` while `enabled`; made by :meth:`rewrite_core.Rewrite.parametrize`.

    It sits in ``module.parametrizations`` and holds D and Lambda as buffers, so it is saved, moved and cast with the
    generator, and its factors are in the state dict beside the original weight.
    """

    directions: Tensor
    coefficients: Tensor

    def __init__(self, bound: BoundLayer, directions: Tensor, coefficients: Tensor):
        super().__init__()
        device = bound.parameter.device
        self.register_buffer("directions", directions.detach().to(device, copy=True))
        self.register_buffer("coefficients", coefficients.detach().to(device, copy=True))
        self._layer = bound._adapter
        self._enabled = True
        self._order = list(bound.module._parameters)  # torch puts a parameter back as the last

    @property
    def enabled(self) -> bool:
        """Whether the change is in the weight."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        on = flag("enabled", on)
        with module_lock(self._layer.module), writing():
            self._enabled = on

    def forward(self, weight: Tensor) -> Tensor:
        if not self._enabled:
            return weight
        return (weight + self._layer.native(delta(self.directions, self.coefficients))).to(weight.dtype)

    def remove(self) -> None:
        """Take it off the module, whose weight is then as it was, bit for bit. Raises MismatchError where it is not on
        the module any more, or under a rewrite that is applied."""
        with module_lock(self._layer.module), writing():
            self._remove()

    def _remove(self) -> None:
        module: Any = self._layer.module
        name = self._layer.weight_name
        stages: Any = module.parametrizations[name] if parametrize.is_parametrized(module, name) else []
        place = next((i for i, stage in enumerate(stages) if stage is self), None)
        if place is None:
            raise MismatchError("This parametrization is not on the module any more, so there is nothing to remove.")
        if any(isinstance(stage, Folded) for stage in [*stages][place:]):
            raise MismatchError(
                "A rewrite was applied on top of this parametrization; revert that first, then remove this."
            )
        if len(stages) == 1:
            # torch takes the weight's property off the class, which a deep copy shares with the original
            kind = type(module)
            own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            ordered = {key: module._parameters[key] for key in self._order if key in module._parameters}
            module._parameters = ordered | module._parameters  # in one step: an interrupt loses none
        else:
            del stages[place]


def attach(bound: BoundLayer, directions: Tensor, coefficients: Tensor) -> LowRankChange:
    """Register a change on the layer's module.

    Raises MismatchError for a weight that a hook or method computes, as torch parametrizes stored ones only.
    """
    computed = bound._adapter.computed
    if computed is not None and not isinstance(computed, Parametrized):
        raise MismatchError(
            f"The weight of {bound.name!r} is computed by a hook or a method, which torch cannot parametrize; use "
            "apply()."
        )
    change = LowRankChange(bound, directions, coefficients)
    with evaluating(bound.module):  # registering computes once, and spectral norm iterates in train mode
        parametrize.register_parametrization(bound.module, bound._adapter.weight_name, change)
    return change
