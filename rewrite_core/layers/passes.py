"""Hooks that see one forward pass of the library's own, and no other.

Hooks belong to a module and not to a thread. While the library collects from a generator, other threads may run it (a
web service that renders) or collect from it as well; and a `forward` of the user's own may call the library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_registering = threading.Lock()  # torch numbers hooks without one, and two of one number replace each other
_running: ContextVar[Hooks | None] = ContextVar("rewrite_core_running", default=None)


class Stop(BaseException):
    """Ends a forward pass at a layer. Not an Exception, so that no generator swallows it."""


class Hooks:
    """A context around one forward pass: the hooks that are registered in it run in that pass alone."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Hooks:
        self._token = _running.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _running.reset(self._token)
        with _registering:
            for handle in self._handles:
                handle.remove()

    @property
    def running(self) -> bool:
        """Whether the pass that runs here is its own."""
        return _running.get() is self

    def before(
        self,
        module: nn.Module,
        hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
        *,
        first: bool = False,
    ) -> None:
        """Call ``hook(module, args, kwargs)`` before the module runs; with `first`, before its other hooks do."""
        with _registering:
            own = _Own(self, hook)
            self._handles.append(module.register_forward_pre_hook(own, prepend=first, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
        """Call ``hook(module, args, output)`` after the module has run; it may return another output."""
        with _registering:
            self._handles.append(module.register_forward_hook(_Own(self, hook)))


class _Own:
    """A hook that runs in its own pass alone. Of a copy of the module, which another thread may make or save
    meanwhile, it is a hook that does nothing."""

    def __init__(self, hooks: Hooks, hook: Callable[..., Any]):
        self._hooks, self._hook = hooks, hook

    def __call__(self, *args: Any) -> Any:
        # to another thread's pass torch may hand fewer arguments while the hook is being registered or removed
        return self._hook(*args) if self._hooks.running else None

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _nothing


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def numbers_of_own(module: nn.Module) -> set[int]:
    """Torch's numbers of the hooks that passes of the library have on a module at the moment."""
    hooks = [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]
    return {number for number, hook in hooks if isinstance(hook, _Own)}
