"""What a generator is put into while the library runs it, and taken out of afterwards."""

from __future__ import annotations

import contextlib
import functools
import pickle
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_SEED = 0


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration; every submodule's own flag is restored afterwards.

    The flags alone are set: an ``eval()`` or ``train()`` of the user's own may do more, such as merge weights.
    """
    flags = [(part, part.training) for part in module.modules() if hasattr(part, "training")]  # frozen ones have none
    try:
        for part, _ in flags:
            part.training = False
        yield
    finally:
        for part, flag in flags:
            part.training = flag


class _Source:
    """A random generator of the whole process, which passes in several threads may want seeded at a time: the last of
    them puts back what the first found."""

    _lock = threading.Lock()

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], object], seed: Callable[[], object]):
        self.get, self._put, self._seed = get, put, seed
        self._inside = 0

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        with self._lock:
            before = self.get()
            if not self._inside:
                self._first = before
            self._inside += 1
            self._seed()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                self._put(before if self._inside else self._first)


def _numpy_state() -> dict[str, Any]:
    return np.random.get_state(legacy=False)


def _seed_numpy() -> None:
    if _numpy_state()["bit_generator"] == "MT19937":  # no other can be seeded in place
        np.random.seed(_SEED)


_TORCH = _Source(torch.get_rng_state, torch.set_rng_state, lambda: torch.default_generator.manual_seed(_SEED))
_PYTHON = _Source(random.getstate, random.setstate, lambda: random.seed(_SEED))
_NUMPY = _Source(_numpy_state, np.random.set_state, _seed_numpy)


@functools.cache
def _cuda(index: int) -> _Source:
    generator = torch.cuda.default_generators[index]
    return _Source(generator.get_state, generator.set_state, lambda: generator.manual_seed(_SEED))


def _names_of(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names_of, inner))


_may: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _may_draw(kind: type) -> bool:
    """Whether a method of a class, or a function in the file that defines it, names Python's or NumPy's generator."""
    if kind.__module__.split(".")[0] in ("torch", "builtins", "abc"):
        return False
    if kind not in _may:
        held = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
        owners = {key: getattr(value, "__self__", value) for key, value in held.items()}  # randn is a RandomState's
        named = {key for key, owner in owners.items() if any(owner is each for each in (random, np, np.random))}
        named |= {key for key, owner in owners.items() if isinstance(owner, random.Random | np.random.RandomState)}
        functions = (value for value in (*held.values(), *vars(kind).values()) if isinstance(value, types.FunctionType))
        # "random": imported in the function itself
        _may[kind] = any((named | {"random"}) & _names_of(function.__code__) for function in functions)
    return _may[kind]


# Whether a generator's last pass of a kind drew from _PYTHON and from _NUMPY. Where it did not, or no class of its
# could, they are left alone: other threads may draw from them.
_drawn: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, list[bool]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _seeded_where_drawn(module: nn.Module, kind: Hashable) -> Iterator[None]:
    def states() -> list[bytes]:
        return [pickle.dumps(source.get()) for source in (_PYTHON, _NUMPY)]

    if not any(_may_draw(each) for each in {base for part in module.modules() for base in type(part).__mro__}):
        yield
        return
    last = _drawn.setdefault(module, {})
    with contextlib.ExitStack() as stack:
        for source, drawn in zip((_PYTHON, _NUMPY), last.get(kind, (True, True))):
            if drawn:
                stack.enter_context(source.seeded())
        before = states()
        try:
            yield
        finally:
            last[kind] = [now != then for now, then in zip(states(), before)]


@contextlib.contextmanager
def seeded(module: nn.Module, kind: Hashable = None) -> Iterator[None]:
    """The same random numbers every time from torch, on the CPU and on the module's devices, and, where the files of its
    classes name them and it draws from them, from NumPy's global generator and Python's; the caller's are left as they
    are.

    So the noise that a generator draws is the same in every forward pass over as many latents, but for what it draws
    from a ``torch.Generator`` or ``numpy.random.Generator`` of its own. Passes of one `kind` go the same way through the
    module. These generators are the process's: what another thread draws from them meanwhile is seeded as well.
    """
    devices = {parameter.device for parameter in module.parameters()}
    indices = sorted(device.index for device in devices if device.type == "cuda")
    with contextlib.ExitStack() as stack:
        for source in (_TORCH, *map(_cuda, indices)):
            stack.enter_context(source.seeded())
        stack.enter_context(_seeded_where_drawn(module, kind))
        yield


@contextlib.contextmanager
def repeatable(module: nn.Module, kind: Hashable = None) -> Iterator[None]:
    """:func:`evaluating`, :func:`seeded` and eagerly, whatever was compiled: a compiled call has no hooks to stop at."""
    with evaluating(module), seeded(module, kind), contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and to import it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
