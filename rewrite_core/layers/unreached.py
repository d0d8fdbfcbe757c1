"""Why a layer is not reached: no hook of it is called in a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapters.base import LayerAdapter
from ..modes import repeatable
from .fingerprints import Forward, tensors_among
from .latents import for_generator
from .memory import storage_of


class Uses(TorchDispatchMode):
    """Notes which memory the operations of a forward pass take."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in Trace

    def __init__(self) -> None:
        super().__init__()
        self._storages: set[int | None] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._storages.update(map(storage_of, tensors_among((*args, *(kwargs or {}).values()))))
        return operation(*args, **(kwargs or {}))

    def of(self, module: nn.Module) -> bool:
        """Whether they took a parameter of the module itself."""
        places = (storage_of(parameter) for parameter in module.parameters(recurse=False))
        return any(place is not None and place in self._storages for place in places)


# what a forward pass does that never calls a module
BYPASSED = (
    "uses its weight without calling the module (as conv.forward(x) or F.conv2d(x, conv.weight) do), so that no hook "
    "sees its "
    "keys; call the module itself, conv(x)"
)


def uses_of_a_pass(generator: nn.Module, forward: Forward, latents: Tensor) -> Uses:
    """Which memory a whole pass takes."""
    with torch.no_grad(), repeatable(generator, ("uses", id(forward))), Uses() as uses:
        forward(generator, for_generator(latents, generator))
    return uses


def why_unreached(name: str, adapter: LayerAdapter, generator: nn.Module, forward: Forward, latents: Tensor) -> str:
    """What to do about a layer whose module was not called in a pass on `latents`: one sentence. Runs another pass."""
    if uses_of_a_pass(generator, forward, latents).of(adapter.module):
        return f"The forward pass never calls {name!r}: it {BYPASSED}."
    other = _forward_of_another(generator)
    if other is not None:
        return (
            f"The forward pass never reached {name!r}: {other} has a forward put on it (compiled, or replaced), "
            "and in a copy that is still the original's; compile the copy itself (torch.compile(copy)), or copy the "
            "generator first."
        )
    modules: list[Any] = list(generator.modules())
    if any(type(part).__name__ == "DataParallel" and len(part.device_ids) > 1 for part in modules):
        return (
            f"The forward pass never reached {name!r}, which DataParallel may run in copies of its own; put what is "
            "inside "
            "(.module) in its place."
        )
    return f"The forward pass never reached {name!r}; bind a layer that this generator really runs."


def _forward_of_another(generator: nn.Module) -> str | None:
    """A module with a forward put on it that may be one of a module that is not in the generator."""
    own = set(generator.modules())
    for name, module in generator.named_modules():
        forward = vars(module).get("forward")
        owner = getattr(forward, "__self__", None)
        if hasattr(forward, "_torchdynamo_orig_callable") or (isinstance(owner, nn.Module) and owner not in own):
            return repr(name) if name else "the generator"
    return None
