"""Binding: find one layer of a generator, or say why it cannot be found or edited."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from ..adapters import ADAPTERS, family_names
from ..adapters.base import LayerAdapter
from ..adapters.offloading import gather
from ..errors import ArgumentError, RewriteCoreError, UnknownLayerError, quoted
from .bound import BoundLayer
from .fingerprints import Forward

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrapped(generator: nn.Module, name: str = "") -> tuple[nn.Module, str]:
    """What is inside torch.compile, DataParallel and the like, which share its weights, and a layer's name in there."""
    if not isinstance(generator, nn.Module):
        raise ArgumentError(f"bind needs a torch.nn.Module, not {type(generator).__name__}.")
    while True:
        wrapped = _WRAPPERS.get(type(generator).__name__, "")
        inside = getattr(generator, wrapped, None)
        if not isinstance(inside, nn.Module):
            break
        generator, name = inside, name.removeprefix(f"{wrapped}.")
    if isinstance(generator, torch.jit.ScriptModule):
        raise RewriteCoreError(
            "A scripted or traced generator runs without Python and cannot be stopped at a layer; bind the module that "
            "it was made from, and load its state dict into that."
        )
    return generator, name


def check_forward(forward: object) -> None:
    """Raises ArgumentError for anything but a function, or None."""
    if forward is not None and not callable(forward):
        raise ArgumentError(
            f"forward is a function of the generator and latents that returns images, or None, not {forward!r}."
        )


def bindable(generator: nn.Module, general: bool = False) -> tuple[dict[str, LayerAdapter], dict[str, str]]:
    """The layers of known families by name (and those of family "general" too if `general`), and why others, though of
    such a family, cannot be edited."""
    found: dict[str, LayerAdapter] = {}
    refused: dict[str, str] = {}
    for path, module in generator.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        adapter = next((each for kind in ADAPTERS if (each := kind.recognise(generator, path)) is not None), None)
        # a compiled part lends its attributes: what is in it is found under two names
        if adapter is None or any(adapter.module is other.module for other in found.values()):
            continue
        reason = adapter.refusal()
        if reason is not None:
            refused[adapter.path] = reason
        elif general or adapter.known:
            found[adapter.path] = adapter
    return found, refused


def bind(generator: nn.Module, name: str, forward: Forward | None = None, family: str | None = None) -> BoundLayer:
    """Bind one layer of `generator` for rewriting. Nothing in the generator is changed.

    A layer may run more than once in a forward pass. Where each run has a part of the latents (a decoder with slicing)
    it is as if it ran once. Where a latent has several runs (tiles, a loop, a layer in two places) their keys can be
    collected, all of them, and no edit can be solved. An edit of a weight that another module shares changes that
    module, which is why :func:`list_layers` leaves such layers out. Where accelerate offloads weights, those of this
    layer are brought to where it runs, and stay there; the rest is left as it is.

    Args:
        generator: any torch module that makes images from latents. Of one in torch.compile, DataParallel or
            DistributedDataParallel the module inside is bound, whose weights it shares.
        name: dotted path of the layer, as in ``generator.named_modules()``.
        forward: ``forward(generator, latents) -> images`` where ``generator(latents)`` is not the right call (labels,
            truncation, timesteps). Latents arrive on the device and in the precision of the generator's first weight,
            one or several rows at a time: what it adds to a row must not depend on the row's place among them.
        family: insist on one family by name instead of recognising it.

    Raises:
        UnknownLayerError: no such layer, or not one that can be bound; suggests the nearest names.
        ArgumentError: an argument of a wrong type.
        RewriteCoreError: the generator is no module, or scripted.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"name is the dotted path of a layer, such as 'layer8.conv', not {name!r}.")
    check_forward(forward)
    generator, name = unwrapped(generator, name)
    known = sorted(family_names())
    if family is not None and family not in known:
        raise RewriteCoreError(f"There is no family {family!r}; choose from {known}, or leave it out.")
    try:
        module = generator.get_submodule(name)  # by any of its names, where a module has several
    except AttributeError:
        raise _unknown(generator, name, f"The generator has no layer {quoted(name)}") from None
    if isinstance(module, torch.jit.ScriptModule):
        problem = f"Layer {name!r} is scripted, and can only be bound as the Python module it was made from"
        raise _unknown(generator, name, problem)
    adapters = [adapter for kind in ADAPTERS if (adapter := kind.recognise(generator, name)) is not None]
    for adapter in adapters:
        if family is None or adapter.family == family:
            for part in (adapter.module, adapter.site):
                gather(generator, part)
            reason = adapter.refusal()
            if reason:
                raise UnknownLayerError(f"Layer {name!r} cannot be edited: {reason}.")
            return BoundLayer(generator, adapter, forward)
    if adapters:
        found = " or ".join(dict.fromkeys(repr(adapter.family) for adapter in adapters))
        raise UnknownLayerError(f"Layer {name!r} is of family {found}, not {family!r}; leave the family out.")
    problem = f"Layer {name!r} is a {type(module).__name__}, not a layer this library can bind"
    raise _unknown(generator, name, problem)


def _unknown(generator: nn.Module, name: str, problem: str) -> UnknownLayerError:
    """The problem with a name, and the nearest names that have none."""
    names = list(bindable(generator)[0])
    if not names:
        advice = "only convolutions, linear layers and the families in the README can be bound"
        if isinstance(generator, torch.fx.GraphModule):
            advice = "bind the module that this graph was exported from"
        return UnknownLayerError(f"{problem}; it has no bindable layer at all, so {advice}.")
    inside = [path for path in names if path.startswith(f"{name}.")]
    near = inside or difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
    return UnknownLayerError(f"{problem}; did you mean {' or '.join(map(repr, near[:3]))}?")
