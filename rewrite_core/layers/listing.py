"""Which layers of a generator can be bound: what one forward pass shows of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Capture, LayerAdapter
from ..errors import RewriteCoreError, warn
from ..modes import repeatable
from .binding import bindable, check_forward, unwrapped
from .bound import BoundLayer
from .fingerprints import Forward, plain_call
from .latents import for_generator
from .memory import overlap, storage_of
from .passes import Hooks
from .unreached import BYPASSED, uses_of_a_pass, why_unreached


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One bindable layer as :func:`list_layers` reports it. Map sizes are (height, width), of a sequence (length,), of
    a volume (depth, height, width)."""

    name: str
    family: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    key_size: tuple[int, ...]
    value_size: tuple[int, ...]
    solver: str


def list_layers(
    generator: nn.Module, latents: Tensor, forward: Forward | None = None, general: bool = False
) -> list[LayerInfo]:
    """Every layer that can be bound, in the order the generator runs them.

    `latents` [N, ...]: two are enough. ``solver`` is what ``rewrite(solver="lm")`` would use there: "closed_form" (for
    L2; "lm" for L1) or "lm"; it is "adam" where what follows the layer is unknown. Left out, with a warning that says
    why, is a layer that runs more than once for a latent, shares its weight with another module, sees more or fewer
    maps than latents, is not called as a module, or puts out what its family does not explain.

    With `general`, also other modules that own a weight (equalised layers of mapping networks, convolutions with a
    forward of their own): of these only what they put out is known, so they are rewritten by solver "adam", through
    autograd and on the whole map.

    Raises:
        ArgumentError: an argument of a wrong type.
        RewriteCoreError: the generator is scripted.
    """
    check_forward(forward)
    generator, _ = unwrapped(generator)
    few = for_generator(latents, generator)[:2]
    found, refused = bindable(generator, general)
    looks = [_Look(BoundLayer(generator, adapter, forward)) for adapter in found.values()]
    if not looks:
        warn(_nothing_to_bind(refused))
        return []
    reached: list[_Look] = []
    with Hooks() as hooks:
        for look in looks:
            look.hook(hooks, reached)
        with torch.no_grad(), repeatable(generator, ("list", id(forward))):
            (forward or plain_call)(generator, few)
    owners = _Owners(generator)
    infos = []
    for look in reached:
        reason = look.left_out(len(few)) or owners.shared(look.layer._adapter)
        if reason:
            _leave_out(look.layer, reason)
        elif look.info is not None:
            infos.append(look.info)
    _warn_of_unreached([look.layer for look in looks if look not in reached], few, none_reached=not reached)
    return infos


def _leave_out(layer: BoundLayer, reason: str) -> None:
    warn(f"Layer {layer.name!r} is left out: {reason}.")


def _nothing_to_bind(refused: Mapping[str, str]) -> str:
    if not refused:
        return "This generator has no layer that can be bound."
    name, reason = next(iter(refused.items()))
    return f"This generator has no layer that can be bound: {name!r} cannot be edited, as {reason}."


def _warn_of_unreached(layers: list[BoundLayer], latents: Tensor, none_reached: bool) -> None:
    """Of layers that are not called, tell those whose weights are used all the same; and where that is all, the
    reason."""
    if not layers:
        return
    generator, forward = layers[0].generator, layers[0]._forward
    uses = uses_of_a_pass(generator, forward, latents)
    owners = _Owners(generator)
    bypassed = [layer for layer in layers if uses.of(layer.module) and not owners.shared(layer._adapter)]
    for layer in bypassed:
        _leave_out(layer, f"the forward pass {BYPASSED}")
    if none_reached and not bypassed:
        warn(why_unreached(layers[0].name, layers[0]._adapter, generator, forward, latents))


class _Look:
    """What a pass shows of one layer."""

    def __init__(self, layer: BoundLayer):
        self.layer = layer
        self.info: LayerInfo | None = None
        self._runs = 0
        self._rows = 0  # maps that it was given, in all runs
        self._sizes: set[tuple[int, ...]] = set()
        self._problem: str | None = None
        self._capture: Capture | None = None
        self._busy = False  # its value is being computed, which may run the module

    def hook(self, hooks: Hooks, reached: list[_Look]) -> None:
        """Look at the runs of the pass that `hooks` are of, and join the layers that it reaches."""

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._busy:
                if not self._runs:
                    reached.append(self)
                self._catch(args, kwargs)

        def compare(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._busy:
                self._compare(output)

        hooks.before(self.layer._adapter.site, catch)
        hooks.after(self.layer._adapter.site, compare)

    def _catch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._runs += 1
        try:
            capture = self.layer._adapter.capture(args, kwargs)
        except RewriteCoreError as error:
            self._problem = str(error).rstrip(".")
            return
        self._rows += len(capture.key)
        self._sizes.add(tuple(capture.key.shape[2:]))
        if self._runs == 1:
            self._capture = capture

    def _compare(self, output: Any) -> None:
        capture, self._capture = self._capture, None
        if capture is None:
            return
        self._busy = True
        try:
            value = self.layer.value(capture)
            self.info = _info_of(self.layer, capture, value)
            if not _is_made_of(self.layer, output, value):
                self._problem = (
                    f"what it puts out is not what a layer of family {self.layer.family!r} makes of its keys, so an "
                    "edit "
                    "would miss its goal; look for a hook on it, or for a forward that runs it in its own way"
                )
        except RewriteCoreError as error:
            self._problem = str(error).rstrip(".")
        finally:
            self._busy = False

    def left_out(self, latents: int) -> str | None:
        """Why the layer is none for an edit, after a pass on so many latents."""
        sliced = len(self._sizes) == 1 and self._rows == latents
        if self._problem is None and self._runs > 1 and not sliced:
            return (
                f"it runs {self._runs} times in a forward pass (for tiles, in a loop, or in several places), and an "
                "edit of "
                "its weight changes them all"
            )
        if self._problem is None and not sliced:
            return f"it sees {self._rows} maps for {latents} latents, so whose is whose is not known"
        return self._problem


def _info_of(layer: BoundLayer, capture: Capture, value: Tensor) -> LayerInfo:
    after = layer.post_operation(capture)
    exact = after is not None and after.style is None and after.slope == 1.0
    return LayerInfo(
        name=layer.name,
        family=layer.family,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel_size=tuple(layer.kernel_size),
        key_size=tuple(capture.key.shape[2:]),
        value_size=tuple(value.shape[2:]),
        solver="adam" if after is None else "closed_form" if exact else "lm",
    )


def _is_made_of(layer: BoundLayer, output: object, value: Tensor) -> bool:
    """Whether a layer's output is what its family makes of `value`, but for rounding."""
    if not isinstance(output, Tensor):
        return True
    made = layer._adapter.replace_value(output, value).double()
    rough = torch.finfo(output.dtype).eps > 1e-5 if output.is_floating_point() else True
    return bool((made - output).norm() <= (3e-2 if rough else 1e-3) * output.norm())


class _Owners:
    """The parameters and buffers of a generator, by the memory that they lie in."""

    def __init__(self, generator: nn.Module):
        self._places: dict[int, list[tuple[str, nn.Module, Tensor]]] = {}
        for name, module in generator.named_modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                storage = storage_of(tensor)
                if storage is not None:
                    self._places.setdefault(storage, []).append((name, module, tensor))

    def shared(self, adapter: LayerAdapter) -> str | None:
        """Why a layer is none for an edit where another module has its weight too; nobody has a computed one."""
        if adapter.computed is not None:
            return None
        weight = adapter.weight
        for name, module, tensor in self._places.get(storage_of(weight) or 0, ()):
            if module is not adapter.module and overlap(tensor, weight):
                return f"it shares its weight with {name!r}, which an edit would change as well"
        return None
