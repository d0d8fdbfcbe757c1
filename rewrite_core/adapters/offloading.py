"""Weights that accelerate keeps elsewhere between passes (``cpu_offload``, ``device_map``), known by its hooks.

Those that are only read (before a layer) are read where they are kept. The layer that is edited is brought to where it
runs, and stays there: an edit of what a hook replaces at every pass would be lost. accelerate is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def _hook(module: nn.Module) -> Any | None:
    """accelerate's hook that brings this module's own weights; None where there is none."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "offload", False) and isinstance(getattr(each, "weights_map", None), Mapping):
            return each
    return None


def kept(module: nn.Module, name: str) -> Tensor | None:
    """The value of a parameter or buffer that is on the meta device between passes; None where it is not known."""
    hook = _hook(module)
    if hook is None or name not in hook.weights_map:
        return None
    value = hook.weights_map[name]
    return value if isinstance(value, Tensor) and not value.is_meta else None


def _in_memory(module: nn.Module, name: str) -> int | None:
    """Where in memory a value is kept, to tell shared ones; None for one on disk, which is read anew every time."""
    hook = _hook(module)
    if hook is None:
        return None
    values, prefix = hook.weights_map, getattr(hook.weights_map, "prefix", "")
    values = getattr(values, "dataset", values)
    values = getattr(values, "state_dict", values)
    value = values.get(f"{prefix}{name}") if isinstance(values, Mapping) else None
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) and not value.is_meta else None


def gather(generator: nn.Module, module: nn.Module) -> None:
    """Bring what a module of a generator, and those in it, have offloaded to where they run, for good; other hooks
    stay. What is of an unknown kind is left on the meta device, and what other modules share: they would miss an edit.
    """
    inside = list(module.modules())
    if not any(_hook(part) for part in inside):
        return
    others = [part for part in generator.modules() if part not in inside and _hook(part) is not None]
    shared = {_in_memory(part, name) for part in others for name, _ in part.named_parameters(recurse=False)} - {None}
    for part in inside:
        hook = _hook(part)
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        away = {name: kept(part, name) for name, tensor in own if tensor.is_meta}
        if hook is None or hook.place_submodules or any(value is None for value in away.values()):
            continue
        if away.keys() & set(hook.tied_params_names) or any(_in_memory(part, name) in shared for name in away):
            continue
        for name, value in away.items():
            assert value is not None
            there = value.detach().to(hook.execution_device, copy=True)
            if name in part._parameters:
                wanted = part._parameters[name]
                part._parameters[name] = nn.Parameter(there, requires_grad=wanted is not None and wanted.requires_grad)
            else:
                part._buffers[name] = there
        hook.offload = False


def unhooked(module: nn.Module) -> Callable[..., Any]:
    """The forward that accelerate's hooks are put around, where there are any: they move tensors, no more."""
    below: Callable[..., Any] = vars(module).get("_old_forward", module.forward)
    return below if hasattr(module, "_hf_hook") else module.forward
