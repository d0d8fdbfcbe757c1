"""Weights that a module computes before it uses them: spectral and weight norm, parametrizations, pruning.

An edit must change what the forward pass really uses, and what is computed cannot be written to. So while a rewrite is
on such a layer its weight is *folded*: what it computes in eval mode becomes a parameter of its own, the change is
added to that, and the computation rests. With the last rewrite gone the module is put back, to the bit. A folded module
is the plain one of its kind, so its state dict loads where the norm was left out.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..modes import evaluating

NAME = "weight"
METHODS = ("W_", "sn_weights")  # of the spectrally normalised layers in two BigGAN and GAN collections
_RECORD = "_rewrite_core_folded"


def computed_weight(module: nn.Module, name: str = NAME) -> ComputedWeight | None:
    """How `module` computes its weight; None where it stores the weight, or computes it in a way not known."""
    if parametrize.is_parametrized(module, name):
        return Parametrized(module, name)
    if name != NAME:
        return None
    record = getattr(module, _RECORD, None)
    if record is not None:
        return Hooked(module) if "_forward_pre_hooks" in record else Normalised(module)
    if _method(module) is not None:
        return Normalised(module)
    return Hooked(module) if NAME not in module._parameters and _hook(module) is not None else None


def class_name(module: nn.Module) -> str:
    """The name of a module's class, which torch renames as it parametrizes the module."""
    kind = type(module)
    return (kind.__bases__[0] if parametrize.is_parametrized(module) else kind).__name__


def _method(module: nn.Module) -> str | None:
    """The method that computes the weight of an SNConv2d or SNLinear."""
    named = class_name(module).startswith("SN")
    return next((name for name in METHODS if named and callable(getattr(type(module), name, None))), None)


def _method_name(module: nn.Module) -> str:
    name = _method(module)
    assert name is not None, "found when the layer was recognised"
    return name


def _hook(module: nn.Module) -> int | None:
    """The number of the forward pre-hook that computes the weight, as torch and others write them."""
    for number, hook in module._forward_pre_hooks.items():
        if NAME in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return number
    return None


class ComputedWeight(abc.ABC):
    """One way to compute a weight. ``module.weight`` is a parameter while it is folded."""

    def __init__(self, module: nn.Module, name: str = NAME):
        self.module: Any = module
        self.name = name

    @property
    @abc.abstractmethod
    def folded(self) -> bool:
        """Whether the weight is folded, and wholly so."""

    @property
    @abc.abstractmethod
    def parameter(self) -> nn.Parameter:
        """Where the weight is while it is folded."""

    def read(self) -> Tensor:
        """The weight that the forward pass uses in eval mode."""
        if self.folded:
            return self.parameter
        self.unfold()  # what an interrupt has left half folded
        with torch.no_grad(), evaluating(self.module):
            return self.compute().detach()

    def fold(self) -> None:
        """Make what is computed a parameter."""
        if not self.folded:
            trains = any(parameter.requires_grad for parameter in self.module.parameters())
            value = nn.Parameter(self.read().clone(), requires_grad=trains)
            self._fold(value)

    def refusal(self) -> str | None:
        """Why such a weight cannot be folded; None where it can."""
        return None

    @abc.abstractmethod
    def unfold(self) -> None:
        """Put the module back as it was, on the device and in the precision that the weight has now. Where nothing is
        folded nothing happens."""

    @abc.abstractmethod
    def parts(self) -> list[str]:
        """The names, in the module's state dict, of what the weight is computed from and of the folded weight."""

    @abc.abstractmethod
    def compute(self) -> Tensor:
        """The weight, of a module in eval mode that is not folded."""

    @abc.abstractmethod
    def _fold(self, value: nn.Parameter) -> None: ...


class Folded(nn.Module):
    """A parametrization that puts a stored value in the place of what was computed before it."""

    def __init__(self, value: nn.Parameter):
        super().__init__()
        self.value = value

    def forward(self, computed: Tensor) -> Tensor:
        return self.value


class Parametrized(ComputedWeight):
    """``torch.nn.utils.parametrize``. Folded, one more parametrization holds the value; the others stay. One that is
    put on top of it later computes the weight again."""

    @property
    def _stages(self) -> parametrize.ParametrizationList:
        return self.module.parametrizations[self.name]

    @property
    def folded(self) -> bool:
        return isinstance(self._stages[-1], Folded)

    @property
    def parameter(self) -> nn.Parameter:
        folded = self._stages[-1]
        assert isinstance(folded, Folded)
        return folded.value

    def parts(self) -> list[str]:
        return [f"parametrizations.{self.name}"]

    def compute(self) -> Tensor:
        computed: Tensor = self._stages()  # not what ``parametrize.cached()`` keeps
        return computed

    def _fold(self, value: nn.Parameter) -> None:
        with evaluating(self.module):  # registering computes once, and spectral norm iterates in train mode
            parametrize.register_parametrization(self.module, self.name, Folded(value))

    def unfold(self) -> None:
        if self.folded:
            del self._stages[len(self._stages) - 1]


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Buffers and attributes of the module are put back afterwards: a hook may write to them."""
    places = vars(module), module._buffers
    before = [dict(place) for place in places]
    tensors = [(value, value.clone()) for held in before for value in held.values() if isinstance(value, Tensor)]
    try:
        yield
    finally:
        for place, held in zip(places, before, strict=True):
            for name in place.keys() - held.keys():
                del place[name]
            # one by one, and only what is not in place: a pass of another thread may read them
            place.update({name: value for name, value in held.items() if place.get(name) is not value})
        for tensor, value in tensors:
            if not torch.equal(tensor, value):
                tensor.copy_(value)


class _Detached(ComputedWeight):
    """Shared by what takes parts off the module. The record of them is an attribute of the module, made of its own
    parameters and hooks: it is copied, pickled and dropped with the module.

    An interrupt may come at any line: the record is there before anything is taken off, and until everything is back.
    """

    @property
    def _record(self) -> dict[str, Any] | None:
        record: dict[str, Any] | None = getattr(self.module, _RECORD, None)
        return record

    @property
    def folded(self) -> bool:
        record = self._record
        return record is not None and record.get("whole", True)

    @property
    def parameter(self) -> nn.Parameter:
        value = self.module._parameters[NAME]
        assert value is not None
        return value

    def _take(self, value: nn.Parameter, names: list[str], **more: Any) -> None:
        """Take tensors off the module, and put the value there. `more` goes into the record."""
        module = self.module
        computed = module.__dict__.get(NAME)  # of the last pass; without its graph, which nothing can copy
        record = {
            "parameters": dict(module._parameters),
            "buffers": dict(module._buffers),
            "dtype": value.dtype,
            "computed": computed.detach() if isinstance(computed, Tensor) else None,
            "whole": False,
            "place": None,  # the device and dtype of the value, once it is taken off again
        }
        setattr(module, _RECORD, record | more)
        for name in names:
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        module.__dict__.pop(NAME, None)
        module._parameters[NAME] = value

    def _finish(self) -> None:
        getattr(self.module, _RECORD)["whole"] = True

    def unfold(self) -> None:
        module, record = self.module, self._record
        if record is None:
            return
        if record.get("whole", True):
            record["place"] = self.parameter.device, self.parameter.dtype
            record["whole"] = False
        device, dtype = record["place"] or (None, record["dtype"])

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is not None and device is not None:
                cast = dtype != record["dtype"] and tensor.is_floating_point()
                tensor.data = tensor.data.to(device=device, dtype=dtype if cast else None)
            return tensor

        for place in ("parameters", "buffers"):
            now, then = getattr(module, f"_{place}"), record[place]
            # what was not taken off has moved with the module; in one step, as a pass of another thread may read it
            back = {name: now[name] if name in now and name != NAME else moved(tensor) for name, tensor in then.items()}
            vars(module)[f"_{place}"] = back | {name: now[name] for name in now if name not in then and name != NAME}
        self._restore(record)
        if record["computed"] is not None:  # for whoever reads it before the next pass
            setattr(module, NAME, record["computed"].to(device=device, dtype=dtype))
        delattr(module, _RECORD)

    @abc.abstractmethod
    def _restore(self, record: dict[str, Any]) -> None:
        """Put back what is neither a parameter nor a buffer."""


class Hooked(_Detached):
    """A forward pre-hook that sets ``module.weight``: torch's older spectral and weight norm, pruning."""

    _HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")

    def parts(self) -> list[str]:
        tensors = [*self.module._parameters, *self.module._buffers]
        return [NAME, *(name for name in tensors if name.startswith(f"{NAME}_"))]

    def compute(self) -> Tensor:
        with _kept(self.module):
            return self._run()

    def refusal(self) -> str | None:
        if self.folded:
            return None
        with torch.no_grad(), evaluating(self.module), _kept(self.module):
            if torch.equal(self._run(), self._run()):
                return None
        return (
            "its hook changes the weight at every pass, in eval mode too; call the generator until the weight rests, "
            "or "
            "take the hook off and make what it computes a parameter"
        )

    def _run(self) -> Tensor:
        self._own_hook(self.module, ())
        weight: Tensor = self.module.weight.clone()
        return weight

    @property
    def _own_hook(self) -> Any:
        number = _hook(self.module)
        assert number is not None, "found when the layer was recognised"
        return self.module._forward_pre_hooks[number]

    def _fold(self, value: nn.Parameter) -> None:
        module, hook = self.module, self._own_hook
        more: dict[str, Any] = {}
        for kind in self._HOOKS:  # torch's spectral norm also watches the state dict
            hooks = getattr(module, kind)
            inner = {key: getattr(other, "hook", other) for key, other in hooks.items()}
            own = [key for key, each in inner.items() if each is hook or getattr(each, "fn", None) is hook]
            more[kind] = list(hooks), {key: hooks[key] for key in own}
        tensors = [*module._parameters, *module._buffers]
        self._take(value, [name for name in tensors if name.startswith(f"{NAME}_")], **more)
        for kind in self._HOOKS:
            for key in more[kind][1]:
                del getattr(module, kind)[key]
        self._finish()

    def _restore(self, record: dict[str, Any]) -> None:
        for kind in self._HOOKS:
            hooks = getattr(self.module, kind)
            order, taken = record[kind]
            hooks.update(taken)
            for key in [*order, *(key for key in list(hooks) if key not in order)]:
                if key in hooks:
                    hooks.move_to_end(key)


class Normalised(_Detached):
    """A method of the module, such as ``W_()``, that its forward calls for the weight."""

    def parts(self) -> list[str]:
        return [NAME, *self.module._buffers]

    def compute(self) -> Tensor:
        weight: Tensor = getattr(self.module, _method_name(self.module))()
        return weight

    def _fold(self, value: nn.Parameter) -> None:
        self._take(value, [NAME, *self.module._buffers])  # the singular vectors too: its state dict fits no other norm
        setattr(self.module, _method_name(self.module), functools.partial(getattr, self.module, NAME))
        self._finish()

    def _restore(self, record: dict[str, Any]) -> None:
        vars(self.module).pop(_method_name(self.module), None)
