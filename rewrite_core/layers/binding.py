"""Binding: reach one layer of a generator without touching the generator.

A bound layer gives the *key* (the feature vector that the layer's weight really multiplies), the *value*
(the layer's output) and the editable weight as [O, I, *kernel]. The forward pass stops at the layer. A *map* has the
axes that the layer's data has: (h, w) of an image, (L,) of a sequence, (d, h, w) of a volume.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor, nn

from ..adapters import FAMILIES, family_names
from ..adapters.base import Box, Capture, LayerFamily, PostOperation
from ..clock import stage
from ..errors import RewriteCoreError, UnknownLayerError
from ..modes import repeatable
from .fingerprints import Trace, Traced, tensor_fingerprint
from .latents import for_generator

Forward = Callable[[nn.Module, Tensor], Tensor]


class _Stop(BaseException):
    """Ends a forward pass at the bound layer. Not an Exception, so that no generator swallows it."""


def _call(generator: nn.Module, latents: Tensor) -> Tensor:
    return generator(latents)


class BoundLayer:
    """One editable layer of a generator; make it with :func:`bind`.

    Attributes: ``generator``, ``name`` (path of the module that owns the weight), ``family``,
    ``in_channels``, ``out_channels``, ``kernel_size``, ``groups`` (of a grouped convolution; its weight is given as the
    dense one, [O, I, *kernel], with zeros between groups, and what a change has there is not used).
    """

    def __init__(self, generator: nn.Module, layer: LayerFamily, forward: Forward | None = None):
        self.generator = generator
        self._layer = layer
        self._forward = forward or _call
        self._traced: Traced | None = None
        self._known_weight: tuple[bytes, str] | None = None  # a weight's digest, and its fingerprint
        self.name = layer.path
        self.family = layer.name
        self.groups = layer.groups
        self.out_channels, self.in_channels, *self.kernel_size = layer.canonical(layer.weight).shape

    def __repr__(self) -> str:
        kernel = "x".join(map(str, self.kernel_size))
        return f"BoundLayer({self.name!r}, {self.family}, {self.in_channels} -> {self.out_channels}, {kernel})"

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight."""
        return self._layer.module

    @property
    def parameter(self) -> Tensor:
        """The weight that the generator uses, in its own layout: a parameter, but for one that is computed (spectral
        norm, parametrizations) and not folded by a rewrite, which is a tensor."""
        return self._layer.weight

    @property
    def weight(self) -> Tensor:
        """The weight as [O, I, *kernel] (detached; a view, but for grouped convolutions and computed weights)."""
        return self._layer.canonical(self._layer.weight.detach())

    def to_native(self, weight: Tensor) -> Tensor:
        """A weight [O, I, *kernel] in the layout the generator stores."""
        return self._layer.native(weight)

    def fold(self) -> None:
        """Where the weight is computed (spectral norm, parametrizations), make it a parameter with what is computed."""
        if self._layer.computed is not None:
            self._layer.computed.fold()

    def unfold(self) -> None:
        """Undo :meth:`fold`, bit for bit; what has become of the parameter is lost."""
        if self._layer.computed is not None:
            self._layer.computed.unfold()

    def capture(self, latents: Tensor) -> Capture:
        """Run the generator up to the layer: the key map and what else the value depends on.

        Of a layer that runs more than once in a forward pass this is the first run, as nothing after it is reached.
        Noise that the generator draws is the same in every call on as many latents.
        """
        caught: list[Capture] = []
        with stage("generator"):
            run_to([self], latents, lambda number, capture: caught.append(capture))
        return caught[0]

    def capture_each(self, latents: Tensor) -> Capture:
        """:meth:`capture` with one map per latent.

        Raises RewriteCoreError where the layer sees more or fewer of them, so that none can be told apart.
        """
        capture = self.capture(latents)
        if len(capture.key) != len(latents):
            raise RewriteCoreError(
                f"{self.name!r} sees {len(capture.key)} maps for {len(latents)} latents, so it is not known whose is "
                "whose; give a `forward` that runs it once per latent (such as one without guidance), or another layer."
            )
        return capture

    def keys(self, latents: Tensor) -> Tensor:
        """Key maps [N, I, *map] of latents [N, ...]."""
        return self.capture_each(latents).key

    def values(self, latents: Tensor) -> Tensor:
        """Value maps [N, O, *map] of latents [N, ...]."""
        with torch.no_grad():
            return self.value(self.capture_each(latents))

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operator on key [N, I', *map] with weight [O', I', *kernel]."""
        return self._layer.linear(key, weight)

    def value(self, capture: Capture, weight: Tensor | None = None) -> Tensor:
        """The value of a capture under `weight` [O, I, *kernel] (default: the current one), differentiable."""
        weight = self.weight if weight is None else weight
        return self._layer.value(capture, weight.to(capture.key.dtype))  # under autocast, not the weight's own

    def post_operation(self, capture: Capture) -> PostOperation | None:
        """What the layer does per channel after its linear operator; None where unknown."""
        return self._layer.post_operation(capture)

    @property
    def known(self) -> bool:
        """Whether what the layer does with its weight is known, so that :meth:`linear` runs on any channels."""
        return self._layer.known

    def crop(self, capture: Capture, key_box: Box, value_box: Box) -> Capture:
        """A capture restricted to a box of the map (DESIGN: the convolution zero-pads at its edge)."""
        return self._layer.crop(capture, key_box, value_box)

    def render(self, latents: Tensor, value: Tensor | None = None) -> Tensor:
        """Images of latents; with `value`, the images that follow from that value at this layer."""
        handle = None
        if value is not None:
            runs = 0

            def swap(module, args, output):
                nonlocal runs
                runs += 1
                if runs > 1:
                    raise RewriteCoreError(
                        f"{self.name!r} runs more than once in a forward pass, so it has no one value to replace; "
                        "choose a layer that list_layers names."
                    )
                return self._layer.replace_value(output, value)

            handle = self._layer.site.register_forward_hook(swap)
        try:
            with torch.no_grad(), repeatable(self.generator, id(self._forward)):
                return self._forward(self.generator, for_generator(latents, self.generator))
        finally:
            if handle is not None:
                handle.remove()

    @property
    def own_forward(self) -> Forward | None:
        """How the generator is called, where the user said so."""
        return None if self._forward is _call else self._forward

    def fingerprint(self, latents: Tensor) -> str:
        """A fingerprint of all that the key depends on in the generator: every parameter and buffer that an
        operation before the layer takes, and the parameters, buffers and plain attributes (slopes, strides, modes, a
        truncation; not those that a pass writes, nor lists) of every module that starts before it. An edit of this
        layer, or of a later one, leaves it as it is, unless the weight is tied to one that is used earlier. Of a
        `forward` of your own the tensors, numbers and strings that it holds are seen (a label, a truncation).

        The first call runs the generator on one latent; later ones only read the weights, every bit of them, as long
        as the generator's modules and their attributes are the same."""
        known = self._traced and self._traced.still(self, latents)
        if known:
            return known
        trace = Trace([self], latents)
        with trace:
            run_to([self], latents[:1], lambda number, capture: None, trace)
        return trace.fingerprint(0)

    def weight_fingerprint(self, weight: Tensor) -> str:
        """:func:`tensor_fingerprint` of a weight [O, I, *kernel] of this layer. The last one is known again by a digest
        at the speed of memory, a tenth of the time."""
        data = weight.detach().cpu().contiguous()
        digest = xxhash.xxh3_128(f"{data.dtype}|{tuple(data.shape)}|".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
        told = digest.digest()
        if self._known_weight is None or self._known_weight[0] != told:
            self._known_weight = told, tensor_fingerprint(weight)
        return self._known_weight[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_traced": None}  # it holds weak references


def run_to(
    layers: Sequence[BoundLayer], latents: Tensor, consume: Callable[[int, Capture], object], trace: Trace | None = None
) -> None:
    """Run the generator that `layers` share on latents [N, ...], until each of them has been reached once.

    ``consume(number, capture)`` is called as ``layers[number]`` is reached, so a key map lives no longer than the
    generator itself needs it, and is seen before the generator can write to it. What it raises ends the pass.
    `trace`, entered by the caller, is told of each layer that is reached.

    Raises:
        UnknownLayerError: the forward pass ended before it reached them all.
    """
    waiting = dict(enumerate(layers))
    problems: list[Exception] = []
    handles = []
    for number, layer in enumerate(layers):

        def reach(module, args, kwargs, number=number):
            layer = waiting.pop(number, None)
            if layer is None:  # a later run
                return
            try:
                capture = layer._layer.capture(args, kwargs)
                if trace is not None:
                    trace.reached(number)
                consume(number, capture)
            except Exception as error:
                problems.append(error)
            if problems or not waiting:
                raise _Stop

        handles.append(layer._layer.site.register_forward_pre_hook(reach, with_kwargs=True))
    first = layers[0]
    try:
        kind = (id(first._forward), *(layer.name for layer in layers))
        with torch.no_grad(), repeatable(first.generator, kind):
            first._forward(first.generator, for_generator(latents, first.generator))
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if problems:
        raise problems[0]
    if waiting:
        name = next(iter(waiting.values())).name
        raise UnknownLayerError(
            f"The forward pass never reached {name!r}; bind a layer that this generator really runs."
        )


def check_together(layers: Sequence[BoundLayer]) -> None:
    """Raise RewriteCoreError where one forward pass does not reach all of `layers`, each once."""
    if not layers:
        raise RewriteCoreError("There is no layer to run to; give at least one.")
    for layer in layers[1:]:
        if layer.generator is not layers[0].generator or layer._forward is not layers[0]._forward:
            raise RewriteCoreError(
                f"{layers[0].name!r} and {layer.name!r} are not bound to the same generator object with the same "
                "`forward`, so one pass cannot serve both; run them one by one."
            )
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise RewriteCoreError(f"A layer is given twice in {names}; give each one once.")


def _unwrapped(generator: nn.Module, name: str = "") -> tuple[nn.Module, str]:
    """What is inside torch.compile, DataParallel and the like, which share its weights, and a layer's name in there."""
    if not isinstance(generator, nn.Module):
        raise RewriteCoreError(f"bind needs a torch.nn.Module, not {type(generator).__name__}.")
    while True:
        wrapped = {
            "OptimizedModule": "_orig_mod",
            "DataParallel": "module",
            "DistributedDataParallel": "module",
        }.get(type(generator).__name__)
        if not isinstance(getattr(generator, wrapped or "", None), nn.Module):
            break
        generator, name = getattr(generator, wrapped), name.removeprefix(f"{wrapped}.")
    if isinstance(generator, torch.jit.ScriptModule):
        raise RewriteCoreError(
            "A scripted or traced generator runs without Python and cannot be stopped at a layer; bind the module that "
            "it was made from, and load its state dict into that."
        )
    return generator, name


def _bindable(generator: nn.Module, general: bool = False) -> dict[str, LayerFamily]:
    """The layers of known families by name, and those of family "general" too if `general`."""
    found: dict[str, LayerFamily] = {}
    for path, module in generator.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for family in FAMILIES:
            layer = family.recognise(generator, path)
            if layer is not None:
                # a compiled part lends its attributes: what is in it is found under two names
                able = layer.refusal() is None and (general or layer.known)
                if able and all(layer.module is not other.module for other in found.values()):
                    found[layer.path] = layer
                break
    return found


def _shared_with(generator: nn.Module, layer: LayerFamily) -> str | None:
    """Another module that owns the layer's weight too; nobody owns a computed one."""
    if layer.computed is not None:
        return None
    weight = layer.weight
    for name, module in generator.named_modules():
        if module is not layer.module and any(tensor is weight for tensor in module._parameters.values()):
            return name
    return None


def bind(generator: nn.Module, name: str, forward: Forward | None = None, family: str | None = None) -> BoundLayer:
    """Bind one layer of `generator` for rewriting. Nothing in the generator is changed.

    Keys and values are those of the layer's first run in a forward pass; an edit of a layer that runs more than
    once changes the other runs as well, and one of a weight that another module shares changes that module, which is
    why :func:`list_layers` leaves such layers out.

    Args:
        generator: any torch module that makes images from latents. Of one in torch.compile, DataParallel or
            DistributedDataParallel the module inside is bound, whose weights it shares.
        name: dotted path of the layer, as in ``generator.named_modules()``.
        forward: ``forward(generator, latents) -> images`` where ``generator(latents)`` is not the right call (labels,
            truncation, timesteps). Latents arrive on the device and in the precision of the generator's first weight, one
            or several rows at a time: what it adds to a row must not depend on the row's place among them.
        family: insist on one family by name instead of recognising it.

    Raises:
        UnknownLayerError: no such layer, or not one that can be bound; suggests the nearest names.
        RewriteCoreError: the generator is no module, or scripted.
    """
    generator, name = _unwrapped(generator, name)
    known = sorted(family_names())
    if family is not None and family not in known:
        raise RewriteCoreError(f"There is no family {family!r}; choose from {known}, or leave it out.")
    try:
        module = generator.get_submodule(name)  # by any of its names, where a module has several
    except AttributeError:
        problem = f"The generator has no layer {name!r}"
    else:
        scripted = isinstance(module, torch.jit.ScriptModule)
        families = () if scripted else FAMILIES
        layers = [layer for kind in families if (layer := kind.recognise(generator, name)) is not None]
        for layer in layers:
            if family is None or layer.name == family:
                reason = layer.refusal()
                if reason:
                    raise UnknownLayerError(f"Layer {name!r} cannot be edited: {reason}.")
                return BoundLayer(generator, layer, forward)
        if layers:
            found = " or ".join(dict.fromkeys(repr(layer.name) for layer in layers))
            raise UnknownLayerError(f"Layer {name!r} is of family {found}, not {family!r}; leave the family out.")
        if scripted:
            problem = f"Layer {name!r} is scripted, and can only be bound as the Python module it was made from"
        else:
            problem = f"Layer {name!r} is a {type(module).__name__}, not a layer this library can bind"
    bindable = list(_bindable(generator))
    if not bindable:
        advice = "only convolutions, linear layers and the families in the README can be bound"
        if isinstance(generator, torch.fx.GraphModule):
            advice = "bind the module that this graph was exported from"
        raise UnknownLayerError(f"{problem}; it has no bindable layer at all, so {advice}.")
    inside = [path for path in bindable if path.startswith(f"{name}.")]
    near = inside or difflib.get_close_matches(name, bindable, n=3, cutoff=0.3) or bindable
    raise UnknownLayerError(f"{problem}; did you mean {' or '.join(map(repr, near[:3]))}?")


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


def _is_made_of(layer: BoundLayer, output: object, value: Tensor) -> bool:
    """Whether a layer's output is what its family makes of `value`, but for rounding."""
    if not isinstance(output, Tensor):
        return True
    made = layer._layer.replace_value(output, value).double()
    rough = torch.finfo(output.dtype).eps > 1e-5 if output.is_floating_point() else True
    return bool((made - output).norm() <= (3e-2 if rough else 1e-3) * output.norm())


def list_layers(
    generator: nn.Module, latents: Tensor, forward: Forward | None = None, general: bool = False
) -> list[LayerInfo]:
    """Every layer that can be bound, in the order the generator runs them.

    `latents` [N, ...]: two are enough. ``solver`` is what ``rewrite(solver="lm")`` would use there: "closed_form" (for
    L2; "lm" for L1) or "lm"; it is "adam" where what follows the layer is unknown. Left out, with a warning that says
    why, is a layer that runs more than once in a forward pass, shares its weight with another module, sees more or fewer
    maps than latents, or puts out what its family does not explain.

    With `general`, also other modules that own a weight (equalised layers of mapping networks, convolutions with a
    forward of their own): of these only what they put out is known, so they are rewritten by solver "adam", through
    autograd and on the whole map.
    """
    generator, _ = _unwrapped(generator)
    bindable = _bindable(generator, general)
    layers = {path: BoundLayer(generator, layer, forward) for path, layer in bindable.items()}
    if not layers:
        return []
    few = for_generator(latents, generator)[:2]
    captures: dict[str, Capture] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    runs = dict.fromkeys(layers, 0)
    unknown: dict[str, str] = {}
    busy: set[str] = set()  # whose value is being computed, which may run the module
    handles = []
    for path, layer in layers.items():

        def catch(module, args, kwargs, path=path, layer=layer):
            if path in busy:
                return
            runs[path] += 1
            if runs[path] == 1:
                try:
                    captures[path] = layer._layer.capture(args, kwargs)
                except RewriteCoreError as error:
                    unknown[path] = str(error)

        def compare(module, args, output, path=path, layer=layer):
            if path in busy or path in sizes or path not in captures:
                return
            busy.add(path)
            try:
                value = layer.value(captures[path])
                sizes[path] = tuple(value.shape[2:])
                if not _is_made_of(layer, output, value):
                    unknown[path] = (
                        f"what it puts out is not what a layer of family {layer.family!r} makes of its keys, so an edit would "
                        "miss its goal; look for a hook on it, or for a forward that runs it in its own way"
                    )
            except RewriteCoreError as error:
                unknown[path] = str(error)
            finally:
                busy.discard(path)

        handles.append(layer._layer.site.register_forward_pre_hook(catch, with_kwargs=True))
        handles.append(layer._layer.site.register_forward_hook(compare))
    try:
        with torch.no_grad(), repeatable(generator):
            (forward or _call)(generator, few)
    finally:
        for handle in handles:
            handle.remove()
    for path, capture in captures.items():
        if runs[path] == 1 and len(capture.key) != len(few):
            unknown.setdefault(
                path, f"it sees {len(capture.key)} maps for {len(few)} latents, so whose is whose is not known"
            )
    for path, reason in unknown.items():
        captures.pop(path, None)
        warnings.warn(f"Layer {path!r} is left out: {reason}", stacklevel=2)
    infos = []
    for path, capture in captures.items():
        layer = layers[path]
        if runs[path] > 1:
            warnings.warn(
                f"Layer {path!r} is left out: it runs {runs[path]} times in a forward pass, and an edit of its weight "
                "changes them all.",
                stacklevel=2,
            )
            continue
        other = _shared_with(generator, layer._layer)
        if other is not None:
            warnings.warn(
                f"Layer {path!r} is left out: it shares its weight with {other!r}, which an edit would change as well.",
                stacklevel=2,
            )
            continue
        with torch.no_grad():
            after = layer.post_operation(capture)
        exact = after is not None and after.style is None and after.slope == 1.0
        infos.append(
            LayerInfo(
                name=path,
                family=layer.family,
                in_channels=layer.in_channels,
                out_channels=layer.out_channels,
                kernel_size=tuple(layer.kernel_size),
                key_size=tuple(capture.key.shape[2:]),
                value_size=sizes[path],
                solver="adam" if after is None else "closed_form" if exact else "lm",
            )
        )
    return infos
