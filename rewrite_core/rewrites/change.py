"""A change of one layer's weight: applied, reverted, saved, and in the forms that other tools take."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Box
from ..edits.edit import Edit
from ..errors import MismatchError, SolverError, flag, number, printable, quoted, warn
from ..layers.binding import bind, unwrapped
from ..layers.bound import BoundLayer
from ..layers.fingerprints import tensor_fingerprint
from ..layers.memory import blocks
from ..statistics.second_moment import SecondMoment
from ..waits import all_on_host, on_gpu
from . import stack as stacks
from .exports import edited_state_dict, lora_factors
from .parametrization import LowRankChange, attach
from .sizes import size_on_keys
from .stack import Change, Stack
from .storage import finite, load_rewrite, save_rewrite
from .trust import Limited


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a change was found: what :class:`Rewrite` has under the same names."""

    losses: list[float] = dataclasses.field(default_factory=list)
    final_loss: float | None = None
    last_loss: float | None = None
    status: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    box: Box | tuple[Box, ...] | None = None
    protected: Tensor | None = None
    limited: Limited | None = None


def _norm(weight: Tensor) -> Tensor:
    """|weight|, float64. On a CPU torch adds up float32 rows many times faster than in float64: they are taken where
    no square of theirs can be lost."""
    if weight.device.type == "cpu" and weight.dtype != torch.float64:
        rows = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(rows, dtype=torch.float64)
        if 1e-6 < norm.item() < 1e18:
            return norm
    return torch.linalg.vector_norm(weight, dtype=torch.float64)


class _Here(threading.local):
    """What one thread does with a change: threads may share it, and apply it to a generator each."""

    def __init__(self) -> None:
        self.layers: list[BoundLayer] = []  # that it was applied to, the last one last
        self.entered: list[BoundLayer] = []  # one for each `with` block that is open


class Rewrite:
    """A rank-R change of one layer's weight: ``W1 = W0 + Lambda D``.

    Attributes:
        directions: D, [R, I], orthonormal rows.
        coefficients: Lambda, [O, R, *kernel].
        losses: the loss before the first step, then one entry per step ("lm": before and after).
        final_loss: the loss of the finished change over the region it was fitted to, in float32 at least; None where
            nothing was fitted (zero). Applied, a float16 or bfloat16 weight is rounded, and a fitted box has the rest
            of its map around it instead of zeros: the loss measured then differs by that.
        last_loss: the loss after the last step of a solver that counts steps. "adam" and "unconstrained" return the
            best step, whose loss is `final_loss`. None for the others, and for a loaded change.
        solver: what really ran: "lm", "closed_form", "adam", "projected", "unconstrained" or "zero".
        status: for "lm", how many output channels ended in each status; for "projected" and "unconstrained", how many
            ran as what: "fused" in one kernel call, or step by step through "autograd".
        seconds: wall time of each stage, none counted twice: "generator" (its forward passes up to the layer), "check"
            (whether the moment is the layer's; it has forward passes of its own), "directions", "goal", "preserve" and
            "fit".
        size: |dW| / |W0|, of Frobenius norms: up to 0.5 pictures stay whole, above 1 look before you believe. None for
            a file that does not say, until it is applied.
        protected: orthonormal rows [k, I] that span what the change was asked to leave as it is
            (:class:`rewrite_core.Protect`), with what the rewrites protect that were on the layer then; None where
            nothing is. While this change is applied, later ones of the layer keep it, too.
        limited: what the trust bound did to the change, a :class:`rewrite_core.Limited`; None: nothing.
        remaining: how many of the I directions of key space were left to change, I - k.
        layer, rank, groups, edit, box: the layer's name, R, the groups of a grouped convolution (else 1), the edit,
            which knows the latents it was solved on, the fitted box of the value map (where several are fitted, a
            tuple of them, picture by picture).
    """

    def __init__(
        self,
        layer: str,
        directions: Tensor,
        coefficients: Tensor,
        fitted_to: str,
        solver: str,
        fit: Fit | None = None,
        edit: Edit | None = None,
        bound: BoundLayer | None = None,
        groups: int = 1,
    ):
        fit = fit or Fit()
        self.layer = layer
        self.directions = directions
        self.coefficients = coefficients
        self.fitted_to = fitted_to  # fingerprint of the weight the change was fitted to
        self.solver = solver
        self.losses = list(fit.losses)
        self.final_loss = fit.final_loss
        self.last_loss = fit.last_loss
        self.edit = edit
        self.status = fit.status
        self.seconds = fit.seconds
        self.box = fit.box
        self.protected = fit.protected
        self.limited = fit.limited
        self.groups = groups if bound is None else bound.groups
        self._size: float | Callable[[], float] | None = None
        if bound is not None:  # a GPU's is read when it is asked for
            size = self._size_on(bound.parameter)
            self._size = size if on_gpu(bound.parameter) else size()
        self._made_on = bound  # where apply() acts; None for a loaded or copied one
        self._layers: list[BoundLayer] = []  # that it was applied to and may still be on, the last one last
        self._here = _Here()

    def __getstate__(self) -> dict:
        """A copied or pickled rewrite knows no generator: it must not take a copy of one along."""
        state = self.__dict__ | {"_made_on": None, "_layers": [], "_size": self.size}
        return {key: value for key, value in state.items() if key != "_here"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._here = _Here()

    @property
    def size(self) -> float | None:
        if callable(self._size):
            self._size = self._size()
        return self._size

    @size.setter
    def size(self, size: float | None) -> None:
        self._size = size

    @property
    def rank(self) -> int:
        return len(self.directions)

    @property
    def remaining(self) -> int:
        return self.directions.shape[1] - (0 if self.protected is None else len(self.protected))

    def _facts(self) -> str:
        loss = f", loss {self.losses[0]:.4g} -> {self.final_loss:.4g}" if self.losses else ""
        return f"rank {self.rank}, {printable(self.solver[:60])}{loss}"  # what a file says

    def __repr__(self) -> str:
        return f"Rewrite({quoted(self.layer)}, {self._facts()})"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, how large, and the edit that it came from."""
        size = "" if self.size is None else f", |dW| / |W| {self.size:.2f}"
        edit = "" if self.edit is None else self.edit._repr_html_()
        return f"<div><b>Rewrite of {html.escape(self.layer)}</b>: {html.escape(self._facts() + size)}{edit}</div>"

    def weight_delta(self) -> Tensor:
        """Lambda D, [O, I, *kernel], in the coefficients' dtype; of rank at most R as [O kh kw, I]."""
        return stacks.delta(self.directions, self.coefficients)

    def _size_on(self, weight: Tensor) -> Callable[[], float]:
        """A function that returns |Lambda D| / |weight|: from D D^T, which is small, without making Lambda D. It is
        computed at once; on a GPU the function waits for it."""
        outputs = self.coefficients.double()[..., None].flatten(2)  # [O, R, taps]
        outputs = outputs.unflatten(0, (self.groups, -1))
        rows = self.directions.double().unflatten(1, (self.groups, -1)).transpose(0, 1)  # a group has its part of D
        square = torch.einsum("gort,grs,gost->", outputs, rows @ rows.mT, outputs)
        weight = weight.detach()
        norms = [_norm(weight[block]) for block in blocks(weight)]

        def size() -> float:
            found, *norms_found = (number.item() for number in all_on_host([square, *norms]))
            whole = norms_found[0] if len(norms_found) == 1 else math.hypot(*norms_found)
            return math.sqrt(max(0.0, found)) / whole if whole else math.inf

        return size

    def size_on_keys(self, moment: SecondMoment, generator: nn.Module | BoundLayer | None = None) -> float:
        """sqrt(tr dW C dW^T / tr W C W^T): how much it changes the layer's linear output on ordinary keys, as a share
        of that output. Compare changes of one layer by it.

        Of a kernel with several taps each tap is counted by itself, and they are summed.

        Args:
            moment: of the layer's keys, C.
            generator: as in :meth:`apply`; it is only read.

        Raises MismatchError where the moment is of another layer.
        """
        bound = self._target(generator, "size_on_keys")
        moment.check(bound)
        stack = stacks.read(bound)
        weight = bound.weight if stack is None else bound.from_native(stack["base"])
        return size_on_keys(bound, moment, self.weight_delta(), weight)

    @property
    def _id(self) -> str:
        """What this change is, by its bits: a saved and loaded one, or a copy, is the same change."""
        return tensor_fingerprint(self.directions) + tensor_fingerprint(self.coefficients)

    # --- which generator

    def _bind(self, generator: nn.Module | BoundLayer) -> BoundLayer:
        if isinstance(generator, BoundLayer):
            bound = generator
        else:
            module, name = unwrapped(generator, self.layer)
            with contextlib.suppress(AttributeError):  # bind() says that there is none
                module = module.get_submodule(name)
            with stacks.module_lock(module):  # which another thread may be folding
                bound = bind(generator, self.layer)
        if bound.name != self.layer:
            raise MismatchError(f"This rewrite is of layer {self.layer!r}, not {bound.name!r}.")
        wanted = (self.coefficients.shape[0], self.directions.shape[1], *self.coefficients.shape[2:])
        found = (bound.out_channels, bound.in_channels, *bound.kernel_size)
        if found != wanted:
            raise MismatchError(
                f"This rewrite changes a weight of shape {list(wanted)} and {self.layer!r} has {list(found)}; it was "
                "made for another generator."
            )
        return bound

    def _target(self, generator: nn.Module | BoundLayer | None, call: str) -> BoundLayer:
        """The layer to act on: of `generator`, else of the one it was made on, else of that it was applied to last."""
        if generator is None:
            known = self._places(others=self._made_on is None)
            if not known:
                raise MismatchError(f"This rewrite was loaded or copied; name the generator to change: {call}(G).")
            generator = self._made_on or known[-1]
        return self._bind(generator)

    def _is_on(self, bound: BoundLayer) -> bool:
        with stacks.module_lock(bound.module), stacks.weight_lock(bound._adapter):
            stack = stacks.read(bound)
        return stack is not None and self._id in stack["rewrites"]

    def _places(self, others: bool = True) -> list[BoundLayer]:
        """Where it may be on, the likeliest last: those that other threads applied it to, the one that it was made on,
        and those that this thread applied it to."""
        made_on = [] if self._made_on is None else [self._made_on]
        return [*(self._layers if others else []), *made_on, *self._here.layers]

    def _where_on(self, places: list[BoundLayer]) -> BoundLayer | None:
        """The last of `places` that it is on."""
        return next((place for place in reversed(places) if self._is_on(place)), None)

    def _remember(self, bound: BoundLayer) -> None:
        """Before the write: an interrupt after it must not leave a generator that revert() does not know of."""
        for layers in (self._layers, self._here.layers):
            layers.append(bound)

    def _forget(self, kept: BoundLayer | None = None) -> None:
        """Drop the generators that it is off, but for `kept`; a loaded one keeps the last. Outside of any lock, as it
        takes others."""
        last = [] if self._made_on is not None else self._here.layers[-1:]
        last += [] if kept is None else [kept]
        for layers in (self._layers, self._here.layers):
            for i, place in reversed([*enumerate(layers)]):
                twice = any(place.module is later.module for later in layers[i + 1 :])
                if twice or (place not in last and not self._is_on(place)):
                    with contextlib.suppress(ValueError):  # another thread dropped it
                        layers.remove(place)

    # --- apply and revert

    @torch.inference_mode(False)  # what is kept on the module outlives the caller's inference mode
    def apply(
        self, generator: nn.Module | BoundLayer | None = None, strength: float = 1.0, force: bool = False
    ) -> Rewrite:
        """Change the weight in place, to ``W0 + strength Lambda D``; returns self. Rewrites stack, on one layer or on
        several.

        A generator in torch.compile or in a captured CUDA graph sees the change, as its weight's memory stays. Where
        the weight is computed (spectral norm, parametrizations) a graph that was captured before does not: capture it
        again.

        Args:
            generator: by default the one that the rewrite was made on. A loaded or copied one acts on the one that it
                was applied to last.
            strength: how much of the change; 0.5 is half of it, -1 its inverse. It is on record for :meth:`revert`.
            force: apply it also where the layer's weight is not the one it was fitted to (a finetuned copy). Rewrites
                that something else has changed the weight over are then part of it, and can no longer be reverted.

        Raises:
            MismatchError: the weight is not the one that this was fitted to, this or its equal is applied already, or
                the weight was changed by something else since other rewrites were applied.
            NonFiniteError: the weight would overflow its precision. Nothing is changed then.
        """
        strength, force = number("strength", strength), flag("force", force)
        bound = self._target(generator, "apply")
        with stacks.module_lock(bound.module), stacks.weight_lock(bound._adapter), stacks.writing():
            stack = self._below(bound, stacks.settle(bound), force)
            kept = None if self.protected is None else self.protected.detach().clone()
            change = Change(self.directions.detach().clone(), self.coefficients.detach().clone(), strength, kept)
            weight = stacks.plus(bound, stack["weight"], change)
            stacks.check_finite(bound, weight)
            if self.size is None:
                self.size = self._size_on(stack["base"])()
            self._remember(bound)
            stacks.write(bound, stack["base"], weight, stacks.changes(stack) | {self._id: change})
        self._forget(kept=bound)
        return self

    def _below(self, bound: BoundLayer, stack: Stack | None, force: bool) -> Stack:
        """The record that this change goes on top of, where it may."""
        present = bound.parameter.detach().clone()
        fresh: Stack = {"base": present, "weight": present, "rewrites": {}}
        if stack is not None and not stacks.holds(bound, stack["weight"]) and self._fits(bound, present):
            # something else has changed the weight, and this is a change of what it made of it
            warn(
                f"The weight of {self.layer!r} was changed by something else since rewrites were applied to it; they "
                "are part of it or gone, and can no longer be reverted."
            )
            return fresh
        if stack is not None and self._id in stack["rewrites"]:
            raise MismatchError("This rewrite is applied already; revert it first.")
        if stack is not None and not force:
            stacks.check_untouched(
                bound,
                stack,
                "a rewrite that is fitted to it as it is now can be applied, this one with force=True only",
            )
        if stack is None or not stacks.holds(bound, stack["weight"]):
            stack = fresh
        if not force and not any(self._fits(bound, weight) for weight in (stack["base"], stack["weight"])):
            self._refuse_weight(bound)
        return stack

    def _fits(self, bound: BoundLayer, weight: Tensor) -> bool:
        """Whether it was fitted to a weight in native layout."""
        return bound.is_weight(bound.from_native(weight.to(bound.parameter.dtype)), self.fitted_to)

    def _refuse_weight(self, bound: BoundLayer) -> None:
        raise MismatchError(
            f"The weight of {self.layer!r}, {bound.parameter.dtype} now, is not the one this rewrite was fitted to "
            "(another model, another precision, or other edits below it); go back to that one, or pass force=True.",
            advice={"force": True},
        )

    @torch.inference_mode(False)
    def revert(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> Rewrite:
        """Undo :meth:`apply`, bit for bit, whatever its strength; other rewrites on the layer stay. Returns self.

        A generator that was moved or cast since goes back to its original weight, moved or cast. Layers that share one
        weight are reverted in the opposite order of applying.

        Args:
            generator: where to revert, for instance a copy of a rewritten generator. By default the one that this
                object was last applied to and is still on: after apply(A) and apply(B), first B, then A.
            force: revert also where something else has changed the weight since, which is lost then.

        Raises MismatchError where this rewrite is not applied, or something else has changed the weight.
        """
        force = flag("force", force)
        places = self._places() if generator is None else [self._bind(generator)]
        bound = self._where_on(places)
        if bound is None:
            for place in places:  # what an interrupt left half done
                with stacks.module_lock(place.module), stacks.weight_lock(place._adapter), stacks.writing():
                    stacks.settle(place)
            raise MismatchError("This rewrite is not applied, so there is nothing to revert; on a copy, use revert(G).")
        with stacks.module_lock(bound.module), stacks.weight_lock(bound._adapter), stacks.writing():
            stacks.check_stored(bound)  # with force, too
            stack = stacks.settle(bound)
            if stack is None or self._id not in stack["rewrites"]:
                raise MismatchError("This rewrite was reverted by another thread just now.")
            if not force:
                stacks.check_untouched(
                    bound,
                    stack,
                    "leave it, to keep what it is now; revert(force=True) loses that, for the weight recorded then",
                )
            rest = {key: change for key, change in stacks.changes(stack).items() if key != self._id}
            weight = stack["base"]
            for change in rest.values():
                weight = stacks.plus(bound, weight, change)
            stacks.write(bound, stack["base"], weight, rest)
        self._forget()
        return self

    @property
    def applied(self) -> bool:
        """Whether this change is on a generator that this object was made on or applied to."""
        return any(map(self._is_on, self._places()))

    def __enter__(self) -> Rewrite:
        """Apply, unless it is applied already; leaving the outermost `with` block reverts in either case, so
        ``with change:`` and ``with change.apply(G):`` are alike."""
        bound = self._where_on(self._places(others=self._made_on is None))
        if bound is None:
            self.apply()
            bound = self._here.layers[-1]
        self._here.entered.append(bound)
        return self

    def __exit__(self, *_: object) -> None:
        bound = self._here.entered.pop()
        inner = any(outer.module is bound.module for outer in self._here.entered)
        if not inner and self._is_on(bound):
            self.revert(bound)

    # --- in the forms that other tools take

    @torch.inference_mode(False)
    def state_dict(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> dict[str, Any]:
        """The generator's plain state dict with this change in it (and those that are applied); a copy. The generator
        is only read. Of a generator in torch.compile or DataParallel it is that of the module inside.

        A weight that was computed (spectral norm, parametrizations) is in it under its plain name, as it is used: load
        it into the generator with that norm left out. Otherwise it loads where the original did.

        Arguments and errors are those of :meth:`apply`.
        """
        force = flag("force", force)
        bound = self._target(generator, "state_dict")
        with stacks.module_lock(bound.module), stacks.weight_lock(bound._adapter):
            stack = stacks.read(bound)
            if stack is not None and self._id in stack["rewrites"]:
                return edited_state_dict(bound, bound.parameter)
            stack = self._below(bound, stack, force)
            weight = stacks.plus(bound, stack["weight"], Change(self.directions, self.coefficients, 1.0))
            stacks.check_finite(bound, weight)
            return edited_state_dict(bound, weight)

    def lora(self) -> tuple[Tensor, Tensor]:
        """The change as a LoRA-style pair (A, B), with B A = Lambda D and no further scale.

        Of a linear layer A is D, [R, I], and B is Lambda, [O, R]. Of a convolution with t taps A is [R t, I, *kernel],
        the weight of a convolution like the layer's, and B [O, R t, 1, ...], of a 1x1 one after it: rank R for 1x1
        layers.

        Raises SolverError for a grouped convolution, which uses parts of Lambda D only.
        """
        if self.groups > 1 or any(bound.groups > 1 for bound in self._places()):
            raise SolverError(f"{self.layer!r} is a grouped convolution, which one pair of factors does not describe.")
        return lora_factors(self.directions, self.coefficients)

    def parametrize(self, generator: nn.Module | BoundLayer | None = None, force: bool = False) -> LowRankChange:
        """Register the change as a ``torch.nn.utils.parametrize`` parametrization instead of applying it.

        ``.enabled = False`` on what is returned switches it off, ``.remove()`` takes it off again;
        ``torch.nn.utils.parametrize.remove_parametrizations`` leaves it in the weight for good.

        Raises:
            MismatchError: as :meth:`apply`; and for a weight that is computed by a hook or a method.
        """
        force = flag("force", force)
        bound = self._target(generator, "parametrize")
        with stacks.module_lock(bound.module), stacks.weight_lock(bound._adapter), stacks.writing():
            if self._is_on(bound):
                raise MismatchError("This rewrite is applied already; revert it first, or use either way alone.")
            if not force and not bound.is_weight(None, self.fitted_to):
                self._refuse_weight(bound)
            return attach(bound, self.directions, self.coefficients)

    def save(self, path: str | os.PathLike) -> None:
        """Write directions and coefficients as safetensors, with the layer, the fingerprint of the weight they
        were fitted to, the solver and the edit; all or nothing."""
        losses = [self.losses[0], self.final_loss] if self.losses else []
        metadata = {
            "layer": self.layer,
            "rank": self.rank,
            "groups": self.groups,
            "solver": self.solver,
            "weight_layout": "OIHW",
            "fitted_to": self.fitted_to,
            "loss": losses if all(finite(loss) is not None for loss in losses) else [],
            "size": finite(self.size),
            "remaining": self.remaining,
            "limited": None if self.limited is None else dataclasses.asdict(self.limited),
        }
        tensors = {"directions": self.directions, "coefficients": self.coefficients}
        if self.protected is not None:
            tensors["protected"] = self.protected
        save_rewrite(path, tensors, metadata, self.edit)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Rewrite:
        """Read a saved rewrite; ``Rewrite.load(path).apply(G)`` changes G as the original did, bit for bit.

        Raises FileFormatError on a truncated or foreign file, MaskError or SelectionError on a bad edit in it.
        """
        factors, facts, edit = load_rewrite(path)
        losses = facts["loss"]
        fit = Fit(losses, losses[-1] if losses else None, protected=factors.get("protected"), limited=facts["limited"])
        change = cls(
            facts["layer"],
            factors["directions"],
            factors["coefficients"],
            facts["fitted_to"],
            facts["solver"],
            fit,
            edit,
            groups=facts["groups"],
        )
        change.size = facts["size"]
        return change
