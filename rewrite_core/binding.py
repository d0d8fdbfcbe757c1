"""Binding: reach one layer of a generator without touching the generator.

A bound layer gives the *key* (the feature vector that the convolution really multiplies), the *value*
(the layer's output) and the editable weight as [O, I, kh, kw]. The forward pass stops at the layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .errors import RewriteCoreError, UnknownLayerError
from .families import FAMILIES, Box, Capture, LayerFamily, PostOperation

Forward = Callable[[nn.Module, Tensor], Tensor]


class _Stop(BaseException):
    """Ends a forward pass at the bound layer. Not an Exception, so that no generator swallows it."""


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration; every submodule's own flag is restored afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def _call(generator: nn.Module, latents: Tensor) -> Tensor:
    return generator(latents)


def _hash_tensor(digest, name: str, tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous()
    digest.update(f"{name}|{data.dtype}|{tuple(data.shape)}|".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy())


def tensor_fingerprint(tensor: Tensor) -> str:
    """A 32-digit fingerprint of a tensor's dtype, shape and bits."""
    digest = hashlib.blake2b(digest_size=16)
    _hash_tensor(digest, "", tensor)
    return digest.hexdigest()


class BoundLayer:
    """One editable layer of a generator; make it with :func:`bind`.

    Attributes: ``generator``, ``name`` (path of the module that owns the weight), ``family``,
    ``in_channels``, ``out_channels``, ``kernel_size``.
    """

    def __init__(self, generator: nn.Module, layer: LayerFamily, forward: Forward | None = None):
        self.generator = generator
        self._layer = layer
        self._forward = forward or _call
        self.name = layer.path
        self.family = layer.name
        self.out_channels, self.in_channels, *self.kernel_size = layer.canonical(layer.weight).shape

    def __repr__(self) -> str:
        kernel = "x".join(map(str, self.kernel_size))
        return f"BoundLayer({self.name!r}, {self.family}, {self.in_channels} -> {self.out_channels}, {kernel})"

    @property
    def module(self) -> nn.Module:
        """The module that owns the weight."""
        return self._layer.module

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the generator stores it, in its own layout."""
        return self._layer.weight

    @property
    def weight(self) -> Tensor:
        """The weight as [O, I, kh, kw] (detached view)."""
        return self._layer.canonical(self._layer.weight.detach())

    def to_native(self, weight: Tensor) -> Tensor:
        """A weight [O, I, kh, kw] in the layout the generator stores."""
        return self._layer.native(weight)

    def _to_device(self, latents: Tensor) -> Tensor:
        weight = self.parameter
        return latents.to(device=weight.device, dtype=weight.dtype if latents.is_floating_point() else None)

    def capture(self, latents: Tensor) -> Capture:
        """Run the generator up to the layer: the key map and what else the value depends on."""
        caught: list[Capture] = []

        def stop(module, args, kwargs):
            caught.append(self._layer.capture(args, kwargs))
            raise _Stop

        handle = self._layer.site.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), _evaluating(self.generator):
                self._forward(self.generator, self._to_device(latents))
        except _Stop:
            return caught[0]
        finally:
            handle.remove()
        raise UnknownLayerError(
            f"The forward pass never reached {self.name!r}; bind a layer that this generator really runs."
        )

    def keys(self, latents: Tensor) -> Tensor:
        """Key maps [N, I, h, w] of latents [N, ...]."""
        return self.capture(latents).key

    def values(self, latents: Tensor) -> Tensor:
        """Value maps [N, O, H, W] of latents [N, ...]."""
        with torch.no_grad():
            return self.value(self.capture(latents))

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear operator on key [N, I', h, w] with weight [O', I', kh, kw]."""
        return self._layer.linear(key, weight)

    def value(self, capture: Capture, weight: Tensor | None = None) -> Tensor:
        """The value of a capture under `weight` [O, I, kh, kw] (default: the current one), differentiable."""
        return self._layer.value(capture, self.weight if weight is None else weight)

    def post_operation(self, capture: Capture) -> PostOperation | None:
        """What the layer does per channel after its linear operator; None where unknown."""
        return self._layer.post_operation(capture)

    def crop(self, capture: Capture, key_box: Box, value_box: Box) -> Capture:
        """A capture restricted to a box of the map (DESIGN: the convolution zero-pads at its edge)."""
        return self._layer.crop(capture, key_box, value_box)

    def render(self, latents: Tensor, value: Tensor | None = None) -> Tensor:
        """Images of latents; with `value`, the images that follow from that value at this layer."""
        handle = None
        if value is not None:

            def swap(module, args, output):
                return self._layer.replace_value(output, value.to(self.parameter.dtype))

            handle = self._layer.site.register_forward_hook(swap)
        try:
            with torch.no_grad(), _evaluating(self.generator):
                return self._forward(self.generator, self._to_device(latents))
        finally:
            if handle is not None:
                handle.remove()

    def fingerprint(self, latents: Tensor) -> str:
        """A fingerprint of every weight that the key depends on: those of all modules that start before
        the layer does. An edit of this layer, or of a later one, leaves it as it is."""
        started: list[tuple[str, nn.Module]] = []
        handles = []
        for name, module in self.generator.named_modules():
            handles.append(
                module.register_forward_pre_hook(lambda module, args, name=name: started.append((name, module)))
            )
        try:
            self.capture(latents[:1])
        finally:
            for handle in handles:
                handle.remove()
        digest = hashlib.blake2b(digest_size=16)
        for name, module in sorted({name: module for name, module in started}.items()):
            whole = module is self._layer.site  # its own submodules have not started yet
            tensors = dict(module.named_parameters(recurse=whole)) | dict(module.named_buffers(recurse=whole))
            for key in sorted(tensors):
                if tensors[key] is not self.parameter:
                    _hash_tensor(digest, f"{name}.{key}", tensors[key])
        return digest.hexdigest()


def _bindable(generator: nn.Module) -> dict[str, LayerFamily]:
    found: dict[str, LayerFamily] = {}
    for path, _ in generator.named_modules():
        for family in FAMILIES:
            layer = family.recognise(generator, path)
            if layer is not None:
                if layer.refusal(generator, layer.path) is None:
                    found.setdefault(layer.path, layer)
                break
    return found


def bind(generator: nn.Module, name: str, forward: Forward | None = None, family: str | None = None) -> BoundLayer:
    """Bind one layer of `generator` for rewriting. Nothing in the generator is changed.

    Args:
        generator: any torch module that makes images from latents.
        name: dotted path of the layer, as in ``generator.named_modules()``.
        forward: ``forward(generator, latents) -> images`` where ``generator(latents)`` is not the right call.
        family: insist on one family by name instead of recognising it.

    Raises:
        UnknownLayerError: no such layer, or not one that can be bound; suggests the nearest names.
    """
    if not isinstance(generator, nn.Module):
        raise RewriteCoreError(f"bind needs a torch.nn.Module, not {type(generator).__name__}.")
    names = dict(generator.named_modules())
    if name in names:
        for kind in FAMILIES:
            if family is not None and family not in (kind.name, *(sub.name for sub in kind.__subclasses__())):
                continue
            layer = kind.recognise(generator, name)
            if layer is None or (family is not None and layer.name != family):
                continue
            reason = layer.refusal(generator, layer.path)
            if reason:
                raise UnknownLayerError(f"Layer {name!r} cannot be edited: {reason}.")
            return BoundLayer(generator, layer, forward)
        problem = f"Layer {name!r} is a {type(names[name]).__name__}, not a convolution this library can bind"
        if family is not None:
            problem += f" as family {family!r}"
    else:
        problem = f"The generator has no layer {name!r}"
    bindable = list(_bindable(generator))
    if not bindable:
        raise UnknownLayerError(f"{problem}; it has no bindable convolution at all.")
    near = difflib.get_close_matches(name, bindable, n=3, cutoff=0.3) or bindable[:3]
    raise UnknownLayerError(f"{problem}; did you mean {' or '.join(map(repr, near))}?")


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One bindable layer as :func:`list_layers` reports it. Map sizes are (height, width)."""

    name: str
    family: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    key_size: tuple[int, int]
    value_size: tuple[int, int]
    solver: str


def list_layers(generator: nn.Module, latents: Tensor, forward: Forward | None = None) -> list[LayerInfo]:
    """Every layer that can be bound, in the order the generator runs them.

    `latents` [N, ...]: one is enough. ``solver`` is what ``rewrite(solver="lm")`` would use there:
    "closed_form" (for L2; "lm" for L1), "lm", or "adam" where what follows the layer is unknown.
    """
    layers = _bindable(generator)
    captures: dict[str, Capture] = {}
    handles = []
    for path, layer in layers.items():

        def catch(module, args, kwargs, path=path, layer=layer):
            captures.setdefault(path, layer.capture(args, kwargs))

        handles.append(layer.site.register_forward_pre_hook(catch, with_kwargs=True))
    try:
        with torch.no_grad(), _evaluating(generator):
            weight = next(generator.parameters())
            (forward or _call)(generator, latents[:1].to(weight.device, weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
    infos = []
    for path, capture in captures.items():
        layer = layers[path]
        weight = layer.canonical(layer.weight.detach())
        with torch.no_grad():
            value = layer.value(capture, weight)
            after = layer.post_operation(capture)
        exact = after is not None and after.style is None and after.slope == 1.0
        infos.append(
            LayerInfo(
                name=path,
                family=layer.name,
                in_channels=weight.shape[1],
                out_channels=weight.shape[0],
                kernel_size=tuple(weight.shape[2:]),
                key_size=tuple(capture.key.shape[2:]),
                value_size=tuple(value.shape[2:]),
                solver="adam" if after is None else "closed_form" if exact else "lm",
            )
        )
    return infos
