"""A change of one layer's weight: applied, reverted, saved, and in the forms that other tools take."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from ..adapters.base import Box
from ..edits.edit import Edit
from ..errors import FileFormatError, MismatchError, NonFiniteError, RewriteCoreError, SolverError
from ..files import load_record, save_record
from ..layers.binding import BoundLayer, bind
from ..layers.fingerprints import tensor_fingerprint
from ..solvers.problem import combine
from .parametrization import LowRankChange, attach

_VERSION = 1


class _Stack(TypedDict):
    """The rewrites that are on one module's weight, and that weight before and after them.

    Kept as an attribute of the module itself: no global state, and it is copied, pickled and dropped with the
    module. Plain containers of plain tensors, so that none of that needs this library, a Rewrite or its generator.
    """

    base: Tensor  # the weight before the first rewrite, as the module stored it then
    weight: Tensor  # the weight with all of them, to notice when something else changes it
    rewrites: dict[str, tuple[Tensor, Tensor]]  # content id: directions and coefficients, in the order applied


_STACK = "_rewrite_core_stack"


def _holds(bound: BoundLayer, weight: Tensor) -> bool:
    """Whether the layer's parameter is `weight`, wherever the generator was moved or cast to since."""
    parameter = bound.parameter.detach()
    return torch.equal(parameter, weight.to(parameter))


def _stack_of(bound: BoundLayer) -> _Stack | None:
    """What is on the layer's weight, on the weight's device; None where nothing is, or where the weight has been put
    back by other means (load_state_dict)."""
    stack: _Stack | None = getattr(bound.module, _STACK, None)
    if stack is None or (_holds(bound, stack["base"]) and not _holds(bound, stack["weight"])):
        return None
    device = bound.parameter.device
    return {**stack, "base": stack["base"].to(device), "weight": stack["weight"].to(device)}


def _delta(directions: Tensor, coefficients: Tensor) -> Tensor:
    return combine(coefficients.double(), directions.double()).to(coefficients.dtype)


def _plus(bound: BoundLayer, weight: Tensor, directions: Tensor, coefficients: Tensor) -> Tensor:
    """A weight in native layout with a rewrite on it. A float16 or bfloat16 weight is added to in the coefficients'
    float32 and rounded once."""
    delta = bound.to_native(_delta(directions, coefficients)).to(weight.device)
    return (weight + delta).to(weight.dtype)


def _check_untouched(bound: BoundLayer, stack: _Stack) -> None:
    if _holds(bound, stack["weight"]):
        return
    was, now = stack["weight"].dtype, bound.parameter.dtype
    tied = [
        name
        for name, module in bound.generator.named_modules()
        if module is not bound.module and hasattr(module, _STACK)
        if any(parameter is bound.parameter for parameter in module.parameters(recurse=False))
    ]
    if tied:
        reason = f"is shared with {tied[0]!r}, which has been rewritten too; revert that rewrite first, or use"
    elif was != now:
        reason = f"was {was} when a rewrite was applied and is {now} with other values now; restore it, or use"
    else:
        reason = "was changed by something else since a rewrite was applied; restore it, or use"
    raise MismatchError(
        f"The weight of {bound.name!r} {reason} revert(force=True) to go back to the weight recorded then."
    )


def _check_stored(bound: BoundLayer) -> None:
    """Raise MismatchError where the weight became computed over the rewrites: what is written to it would be lost."""
    computed = bound._layer.computed
    if computed is not None and not computed.folded:
        raise MismatchError(
            f"The weight of {bound.name!r} is computed by a parametrization or norm that was put on it after this "
            "rewrite was applied; take that off first."
        )


def _write(bound: BoundLayer, weight: Tensor) -> None:
    # a parameter made in inference mode can only be changed in inference mode
    with torch.inference_mode(bound.parameter.is_inference()), torch.no_grad():
        bound.parameter.copy_(weight)


class Rewrite:
    """A rank-R change of one layer's weight: ``W1 = W0 + Lambda D``.

    Attributes:
        directions: D, [R, I], orthonormal rows.
        coefficients: Lambda, [O, R, *kernel].
        losses: the loss before the first step, then one entry per step ("lm": before and after).
        final_loss: the loss of the finished change over the region it was fitted to, in float32 at least; None where
            nothing was fitted (zero). Applied, a float16 or bfloat16 weight is rounded, and a tight region has the rest
            of its map around it instead of zeros: the loss measured then differs by that.
        solver: what really ran: "lm", "closed_form", "adam", "projected", "unconstrained" or "zero".
        status: for "lm", how many output channels ended in each status; for "projected" and "unconstrained", how many
            ran as what: "fused" in one kernel call, or step by step through "autograd".
        seconds: wall time of each stage, none counted twice: "generator" (its forward passes up to the layer), "check"
            (whether the moment is the layer's; it has forward passes of its own), "directions", "goal", "preserve" and
            "fit".
        layer, rank, groups, edit, box: the layer's name, R, the groups of a grouped convolution (else 1), the edit, the
            fitted box of the value map (where several regions are fitted, a tuple of theirs, picture by picture).
    """

    def __init__(
        self,
        layer: str,
        directions: Tensor,
        coefficients: Tensor,
        fitted_to: str,
        solver: str,
        losses: Sequence[float] = (),
        final_loss: float | None = None,
        edit: Edit | None = None,
        status: dict[str, int] | None = None,
        seconds: dict[str, float] | None = None,
        box: Box | tuple[Box, ...] | None = None,
        bound: BoundLayer | None = None,
        groups: int = 1,
    ):
        self.layer = layer
        self.directions = directions
        self.coefficients = coefficients
        self.fitted_to = fitted_to  # fingerprint of the weight the change was fitted to
        self.solver = solver
        self.losses = list(losses)
        self.final_loss = final_loss
        self.edit = edit
        self.status = status or {}
        self.seconds = seconds or {}
        self.box = box
        self.groups = groups if bound is None else bound.groups
        # where apply() acts by default comes last, after the other layers this is still applied to
        self._layers = [] if bound is None else [bound]
        self._entered: list[BoundLayer] = []  # one for each `with` block that is open

    def __getstate__(self) -> dict:
        """A copied or pickled rewrite knows no generator: it must not take a copy of one along."""
        return self.__dict__ | {"_layers": [], "_entered": []}

    @property
    def rank(self) -> int:
        return len(self.directions)

    def __repr__(self) -> str:
        loss = f", loss {self.losses[0]:.4g} -> {self.final_loss:.4g}" if self.losses else ""
        return f"Rewrite({self.layer!r}, rank {self.rank}, {self.solver}{loss})"

    def weight_delta(self) -> Tensor:
        """Lambda D, [O, I, *kernel], in the coefficients' dtype; of rank at most R as [O kh kw, I]."""
        return _delta(self.directions, self.coefficients)

    @property
    def _id(self) -> str:
        """What this change is, by its bits: a saved and loaded one, or a copy, is the same change."""
        return tensor_fingerprint(self.directions) + tensor_fingerprint(self.coefficients)

    def _bind(self, generator: nn.Module | BoundLayer) -> BoundLayer:
        bound = generator if isinstance(generator, BoundLayer) else bind(generator, self.layer)
        if bound.name != self.layer:
            raise MismatchError(f"This rewrite is of layer {self.layer!r}, not {bound.name!r}.")
        wanted = (self.coefficients.shape[0], self.directions.shape[1], *self.coefficients.shape[2:])
        if tuple(bound.weight.shape) != wanted:
            raise MismatchError(
                f"This rewrite changes a weight of shape {list(wanted)} and {self.layer!r} has "
                f"{list(bound.weight.shape)}; it was made for another generator."
            )
        return bound

    def _is_on(self, bound: BoundLayer) -> bool:
        stack = _stack_of(bound)
        return stack is not None and self._id in stack["rewrites"]

    @torch.inference_mode(False)  # what is kept on the module outlives the caller's inference mode
    def apply(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> Rewrite:
        """Change the weight in place; returns self. Rewrites stack, on one layer or on several.

        Args:
            generator: by default the one that the rewrite was made on, or applied to last.
            force: apply it also where the layer's weight is not the one it was fitted to (a finetuned copy). Rewrites
                that something else has changed the weight over are then part of it, and can no longer be reverted.

        Raises:
            MismatchError: the weight is not the one that this was fitted to, this or its equal is applied already, or
                the weight was changed by something else since other rewrites were applied.
            NonFiniteError: the weight would overflow its precision. Nothing is changed then.
        """
        if generator is None and not self._layers:
            raise MismatchError("This rewrite was loaded or copied; name the generator to change: apply(G).")
        bound = self._bind(self._layers[-1] if generator is None else generator)
        stack = _stack_of(bound)
        if stack is not None and self._id in stack["rewrites"]:
            raise MismatchError("This rewrite is applied already; revert it first.")
        if stack is not None and not force:
            _check_untouched(bound, stack)
        if stack is None or not _holds(bound, stack["weight"]):
            base = bound.parameter.detach().clone()
            stack = _Stack(base=base, weight=base, rewrites={})
        below = (bound._layer.canonical(stack[name].to(bound.parameter.dtype)) for name in ("base", "weight"))
        if not force and all(bound.weight_fingerprint(weight) != self.fitted_to for weight in below):
            raise MismatchError(
                f"The weight of {self.layer!r}, {bound.parameter.dtype} now, is not the one this rewrite was fitted to "
                "(another model, another precision, or other edits below it); go back to that one, or pass force=True.",
                advice={"force": True},
            )
        record = self.directions.detach().clone(), self.coefficients.detach().clone()
        weight = _plus(bound, stack["weight"], *record)
        if not torch.isfinite(weight.to(bound.parameter.dtype)).all():
            raise NonFiniteError(
                f"With this rewrite the weight of {self.layer!r} would hold NaN or infinity in "
                f"{bound.parameter.dtype}, so nothing was changed; use a generator of a wider type."
            )
        bound.fold()
        _write(bound, weight)
        rewrites = stack["rewrites"] | {self._id: record}
        setattr(bound.module, _STACK, _Stack(base=stack["base"], weight=weight, rewrites=rewrites))
        self._layers = [other for other in self._layers if other.module is not bound.module and self._is_on(other)]
        self._layers.append(bound)
        return self

    @torch.inference_mode(False)
    def revert(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> Rewrite:
        """Undo :meth:`apply`, bit for bit; other rewrites on the layer stay. Returns self.

        A generator that was moved or cast since goes back to its original weight, moved or cast. Layers that share one
        weight are reverted in the opposite order of applying.

        Args:
            generator: where to revert, for instance a copy of a rewritten generator. By default the one that this
                object was last applied to and is still on: after apply(A) and apply(B), first B, then A.
            force: revert also where something else has changed the weight since, which is lost then.

        Raises MismatchError where this rewrite is not applied, or something else has changed the weight.
        """
        places = self._layers if generator is None else [self._bind(generator)]
        bound = next((place for place in reversed(places) if self._is_on(place)), None)
        if bound is None:
            raise MismatchError("This rewrite is not applied, so there is nothing to revert; on a copy, use revert(G).")
        _check_stored(bound)  # with force, too
        stack = _stack_of(bound)
        if not force:
            _check_untouched(bound, stack)
        rest = {key: change for key, change in stack["rewrites"].items() if key != self._id}
        weight = stack["base"]
        for record in rest.values():
            weight = _plus(bound, weight, *record)
        _write(bound, weight)
        if rest:
            setattr(bound.module, _STACK, _Stack(base=stack["base"], weight=weight, rewrites=rest))
        else:
            delattr(bound.module, _STACK)
            bound.unfold()
        return self

    @property
    def applied(self) -> bool:
        """Whether this change is on a generator that this object was made on or applied to."""
        return any(map(self._is_on, self._layers))

    def __enter__(self) -> Rewrite:
        """Apply, unless it is applied already; leaving the outermost `with` block reverts in either case, so
        ``with change:`` and ``with change.apply(G):`` are alike."""
        if not (self._layers and self._is_on(self._layers[-1])):
            self.apply()
        self._entered.append(self._layers[-1])
        return self

    def __exit__(self, *_) -> None:
        bound = self._entered.pop()
        inner = any(outer.module is bound.module for outer in self._entered)
        if not inner and self._is_on(bound):
            self.revert(bound)

    # --- in the forms that other tools take

    def state_dict(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> dict[str, Tensor]:
        """The generator's plain state dict with this change in it (and those that are applied); a copy. The generator
        is left as it is. Of a generator in torch.compile or DataParallel it is that of the module inside.

        A weight that was computed (spectral norm, parametrizations) is in it under its plain name, as it is used: load
        it into the generator with that norm left out. Otherwise it loads where the original did.

        Arguments and errors are those of :meth:`apply`.
        """
        if generator is None and not self._layers:
            raise MismatchError("This rewrite was loaded or copied; name the generator: state_dict(G).")
        bound = self._bind(self._layers[-1] if generator is None else generator)
        on, places = self._is_on(bound), list(self._layers)
        stack = getattr(bound.module, _STACK, None)
        before = None if stack is None else bound.parameter.detach().clone()
        if not on:
            self.apply(bound, force)
        try:
            state = {  # a module's extra state is anything
                key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                for key, value in bound.generator.state_dict().items()
            }
            name, weight = bound._layer.weight_name, bound.parameter.detach().clone()
        finally:
            if not on:
                if stack is None:
                    self.revert(bound)
                else:  # forced, apply() has made others' rewrites part of what is below
                    _write(bound, before)
                    setattr(bound.module, _STACK, stack)
                self._layers = places
        path = next(path for path, module in bound.generator.named_modules() if module is bound.module)
        prefix = f"{path}." if path else ""  # in a compiled part not the layer's name
        state = {key: value for key, value in state.items() if not key.startswith(f"{prefix}parametrizations.{name}.")}
        return state | {f"{prefix}{name}": weight}

    def lora(self) -> tuple[Tensor, Tensor]:
        """The change as a LoRA-style pair (A, B), with B A = Lambda D and no further scale.

        Of a linear layer A is D, [R, I], and B is Lambda, [O, R]. Of a convolution with t taps A is [R t, I, *kernel],
        the weight of a convolution like the layer's, and B [O, R t, 1, ...], of a 1x1 one after it: rank R for 1x1
        layers.

        Raises SolverError for a grouped convolution, which uses parts of Lambda D only.
        """
        if self.groups > 1 or any(bound.groups > 1 for bound in self._layers):
            raise SolverError(f"{self.layer!r} is a grouped convolution, which one pair of factors does not describe.")
        kernel = self.coefficients.shape[2:]
        taps = math.prod(kernel)
        one_hot = torch.eye(taps, dtype=self.directions.dtype, device=self.directions.device)
        a = torch.einsum("ri,st->rsit", self.directions, one_hot).reshape(self.rank * taps, -1, *kernel)
        return a, self.coefficients.reshape(len(self.coefficients), -1, *[1] * len(kernel)).clone()

    def parametrize(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> LowRankChange:
        """Register the change as a ``torch.nn.utils.parametrize`` parametrization instead of applying it.

        ``.enabled = False`` on what is returned switches it off, ``.remove()`` takes it off again;
        ``torch.nn.utils.parametrize.remove_parametrizations`` leaves it in the weight for good.

        Raises:
            MismatchError: as :meth:`apply`; and for a weight that is computed by a hook or a method.
        """
        if generator is None and not self._layers:
            raise MismatchError("This rewrite was loaded or copied; name the generator to change: parametrize(G).")
        bound = self._bind(self._layers[-1] if generator is None else generator)
        if self._is_on(bound):
            raise MismatchError("This rewrite is applied already; revert it first, or use either way alone.")
        if not force and bound.weight_fingerprint(bound.weight) != self.fitted_to:
            raise MismatchError(
                f"The weight of {self.layer!r}, {bound.parameter.dtype} now, is not the one this rewrite was fitted to "
                "(another model, another precision, or other edits below it); go back to that one, or pass force=True.",
                advice={"force": True},
            )
        return attach(bound, self.directions, self.coefficients)

    def save(self, path: str | os.PathLike) -> None:
        """Write directions and coefficients as safetensors, with the layer, the fingerprint of the weight they
        were fitted to, the solver and the edit; all or nothing."""
        metadata = {
            "layer": self.layer,
            "rank": self.rank,
            "groups": self.groups,
            "solver": self.solver,
            "weight_layout": "OIHW",
            "fitted_to": self.fitted_to,
            "loss": [self.losses[0], self.final_loss] if self.losses else [],
            "edit": None if self.edit is None else self.edit.to_json(),
        }
        tensors = {"directions": self.directions.cpu(), "coefficients": self.coefficients.cpu()}
        save_record(path, "rewrite", _VERSION, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Rewrite:
        """Read a saved rewrite; ``Rewrite.load(path).apply(G)`` changes G as the original did, bit for bit.

        Raises FileFormatError on a truncated or foreign file, MaskError or SelectionError on a bad edit in it.
        """
        name = os.fspath(path)
        tensors, metadata = load_record(path, "rewrite", _VERSION)
        directions, coefficients = tensors.get("directions"), tensors.get("coefficients")
        metadata = metadata if isinstance(metadata, dict) else {}
        texts = [metadata.get(field) for field in ("layer", "fitted_to", "solver")]
        losses, edit = metadata.get("loss", []), metadata.get("edit")
        groups = metadata.get("groups", 1)  # older files do not say
        if (
            directions is None
            or coefficients is None
            or not all(isinstance(text, str) for text in texts)
            or not isinstance(losses, list)
            or not all(isinstance(loss, (int, float)) for loss in losses)
            or not isinstance(edit, str | None)
            or not isinstance(groups, int)
        ):
            raise FileFormatError(f"{name} is not a whole rewrite; make it again.")
        if directions.ndim != 2 or coefficients.ndim < 2 or coefficients.shape[1] != len(directions):
            raise FileFormatError(f"{name} holds directions and coefficients that do not match; make it again.")
        if not all(part.is_floating_point() and part.isfinite().all() for part in (directions, coefficients)):
            raise FileFormatError(f"{name} holds NaN, infinity or no floating-point numbers; make it again.")
        try:
            edit = None if edit is None else Edit.from_json(edit)
        except RewriteCoreError as error:
            raise type(error)(f"{name}: {error}") from error
        layer, fitted_to, solver = texts
        final_loss = losses[-1] if losses else None
        return cls(layer, directions, coefficients, fitted_to, solver, losses, final_loss, edit, groups=groups)
