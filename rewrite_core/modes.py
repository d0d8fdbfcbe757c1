"""What a generator is put into while the library runs it, and taken out of afterwards. For threads, too: see
:func:`evaluating` and :func:`seeded`."""

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
from torch.nn.utils import parametrize

_SEED = 0

# The modules that passes have put into eval mode, and the flag that each had before the first of them did.
_evaluated: dict[object, list[tuple[nn.Module, bool]]] = {}
_evaluated_lock = threading.Lock()


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The module and all in it, each once: ``modules()`` in a third of the time, which every pass spends."""
    found = {module: None}
    waiting = [module]
    while waiting:
        for part in waiting.pop()._modules.values():
            if part is not None and part not in found:
                found[part] = None
                waiting.append(part)
    return list(found)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration; every submodule's own flag is restored afterwards.

    The flags alone are set: an ``eval()`` or ``train()`` of the user's own may do more, such as merge weights. Where
    several threads are inside at a time, the last one out restores. A flag belongs to the module and not to a thread: a
    pass of the user's own beside them runs in eval mode as well, and ``train()`` called meanwhile is undone.
    """
    own: object = object()
    try:
        with _evaluated_lock:
            before = {id(part): flag for held in _evaluated.values() for part, flag in held}
            _evaluated[own] = [  # frozen modules have no flag
                (part, before.get(id(part), part.training)) for part in parts_of(module) if hasattr(part, "training")
            ]
            for part, _ in _evaluated[own]:
                _set(part, False)
        yield
    finally:
        with _evaluated_lock:
            flags = _evaluated.pop(own, [])
            inside = {id(part) for held in _evaluated.values() for part, _ in held}
            for part, flag in flags:
                if id(part) not in inside:
                    _set(part, flag)


def _set(part: nn.Module, flag: bool) -> None:
    """Set a module's flag where it is another: a module takes microseconds to be told what it knows."""
    if part.training is not flag:
        part.training = flag


class _Use:
    """One pass's use of a random generator."""

    drew = False


class _Source:
    """A random generator of the whole process, which passes in several threads may want seeded at a time. Those that
    draw run one after the other (`alone`); the last one out puts back what the first one found."""

    def __init__(
        self,
        get: Callable[[], Any],
        put: Callable[[Any], object],
        seed: Callable[[], object],
        bits: Callable[[Any], bytes] = pickle.dumps,
    ):
        self._get, self._put, self._seed, self._bits = get, put, seed, bits
        self._lock, self._drawing = threading.Lock(), threading.RLock()
        self._inside = 0

    def state(self) -> bytes:
        """What the generator is at, to compare."""
        return self._bits(self._get())

    @contextlib.contextmanager
    def seeded(self, alone: bool = True) -> Iterator[_Use]:
        use, start = _Use(), b""
        with self._drawing if alone else contextlib.nullcontext():
            with self._lock:
                before = self._get()
                if not self._inside:
                    self._first = before
                self._inside += 1
                watched = alone or self._inside == 1  # else it may be another pass that draws
                if watched:
                    self._seed()
                    start = self.state()
            try:
                yield use
            finally:
                with self._lock:
                    self._inside -= 1
                    if alone or (watched and not self._inside):
                        use.drew = self.state() != start
                    if not self._inside:
                        self._put(self._first)
                    elif alone:
                        self._put(before)


def _numpy_state() -> dict[str, Any]:
    return dict(np.random.get_state(legacy=False))


def _seed_numpy() -> None:
    if _numpy_state()["bit_generator"] == "MT19937":  # no other can be seeded in place
        np.random.seed(_SEED)


def _bytes_of(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


_TORCH = _Source(
    torch.get_rng_state, torch.set_rng_state, lambda: torch.default_generator.manual_seed(_SEED), _bytes_of
)
_PYTHON = _Source(random.getstate, random.setstate, lambda: random.seed(_SEED))
_NUMPY = _Source(_numpy_state, np.random.set_state, _seed_numpy)


@functools.cache
def _cuda(index: int) -> _Source:
    generator = torch.cuda.default_generators[index]
    return _Source(generator.get_state, generator.set_state, lambda: generator.manual_seed(_SEED), _bytes_of)


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


# Which sources a generator's last whole pass of a kind drew from. From Python's and NumPy's other threads may draw:
# where that pass did not, or no class of the generator's could, they are left alone.
_drawn: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, dict[_Source, bool]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def seeded(module: nn.Module, kind: Hashable = None) -> Iterator[None]:
    """The same random numbers every time from torch, on the CPU and on the module's devices, and, where the files of
    its classes name them and it draws from them, from NumPy's global generator and Python's; the caller's are left as
    they are.

    So the noise that a generator draws is the same in every forward pass over as many latents, but for what it draws
    from a ``torch.Generator`` or ``numpy.random.Generator`` of its own. Passes of one `kind` go the same way through
    the module. These generators are the process's: passes that draw from one run one after the other, whatever thread
    they are in, and what a thread of the user's draws from them meanwhile is seeded as well.
    """
    parts = parts_of(module)
    devices = {tensor.device for part in parts for tensor in part._parameters.values() if tensor is not None}
    indices = sorted(device.index for device in devices if device.type == "cuda")
    kinds = {base for each in set(map(type, parts)) for base in each.__mro__}
    last = _drawn.get(module, {}).get(kind, {})
    uses: dict[_Source, _Use] = {}
    left: dict[_Source, bytes] = {}
    with contextlib.ExitStack() as stack:
        for source in (_TORCH, *map(_cuda, indices)):
            uses[source] = stack.enter_context(source.seeded(alone=last.get(source, True)))
        if any(map(_may_draw, kinds)):
            for source in (_PYTHON, _NUMPY):
                if last.get(source, True):
                    uses[source] = stack.enter_context(source.seeded())
                else:
                    left[source] = source.state()
        yield
        drew = {source: source.state() != before for source, before in left.items()}
    # not after a pass that was interrupted: it may have drawn later
    _drawn.setdefault(module, {})[kind] = drew | {source: use.drew for source, use in uses.items()}


_eager_lock = threading.Lock()
_eager: list[Any] = []  # of each pass that is inside: the stance that the first of them has set


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Without what was compiled, for all threads; the last one out puts the caller's stance back."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and to import it takes seconds
        yield
        return
    with _eager_lock:
        _eager.append(_eager[0] if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager_lock:
            stance = _eager.pop()
            if not _eager:
                stance.__exit__(None, None, None)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without what the caller's ``parametrize.cached()`` holds, which may be of train mode; and neither there nor in
    the caller's autocast is a weight left that was made without a graph."""
    if parametrize._cache_enabled:
        parametrize._cache.clear()
    try:
        yield
    finally:
        if parametrize._cache_enabled:
            parametrize._cache.clear()
        torch.clear_autocast_cache()


@contextlib.contextmanager
def repeatable(module: nn.Module, kind: Hashable = None) -> Iterator[None]:
    """:func:`evaluating`, :func:`seeded` and eagerly, whatever was compiled: a compiled call has no hooks to stop
    at."""
    with evaluating(module), seeded(module, kind), _eagerly(), _uncached():
        yield
