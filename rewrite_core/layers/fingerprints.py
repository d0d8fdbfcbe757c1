"""Fingerprints: how files and checks know tensors, and the weights that a layer's keys come from."""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import inspect
import re
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from ..adapters.base import LayerFamily
    from .binding import BoundLayer

# Names the algorithm. XXH3 runs at the speed of memory, so that every bit is looked at in every check: a tensor's
# version counter would not tell of writes through .data or NumPy. It guards against accidents, not against forgery.
KIND = "xxh3-3:"


def _hash_tensor(digest, name: str, tensor: Tensor) -> None:
    data = tensor.detach().cpu()
    if data.layout != torch.strided:  # a sparse buffer
        data = data.to_dense()
    data = data.resolve_conj().resolve_neg().contiguous()
    digest.update(f"{name}|{data.dtype}|{tuple(data.shape)}|".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy())


def tensor_fingerprint(tensor: Tensor) -> str:
    """A 32-digit fingerprint of a tensor's dtype, shape and bits."""
    digest = hashlib.blake2b(digest_size=16)  # small tensors; files that people share hold it
    _hash_tensor(digest, "", tensor)
    return digest.hexdigest()


class _Opaque(Exception):
    """A value that only its own methods could compare."""


_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


class _Surroundings:
    """Everything in a generator that its forward pass can branch on, but for its weights' content: modules, their
    attributes, which tensors they hold. Equal ones take the same way to a layer, unless that depends on what no
    module holds (a global variable). Raises _Opaque where an attribute is of a kind that cannot be compared."""

    def __init__(self, layer: BoundLayer, latents: Tensor):
        self._objects: list[weakref.ref] = []  # an id says nothing of an object that is gone
        self._facts = [self._of(layer._forward), tuple(latents.shape[1:]), latents.dtype, latents.device]
        for name, module in layer.generator.named_modules():
            self._facts += [name, type(module), self._identity(module)]
            for key, value in vars(module).items():
                if key == "training" or (isinstance(value, dict | set) and not value):  # passes run in eval mode
                    continue
                registered = key in ("_parameters", "_buffers", "_modules")
                self._facts.append((key, [*map(self._registered, value.items())] if registered else self._of(value)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Surroundings):
            return NotImplemented
        alive = all(reference() is not None for each in (self, other) for reference in each._objects)
        return alive and self._facts == other._facts

    __hash__ = None

    def _identity(self, value: object) -> int:
        self._objects.append(weakref.ref(value))
        return id(value)

    def _registered(self, item: tuple[str, Tensor | nn.Module | None]) -> tuple[str, int | None]:
        return item[0], None if item[1] is None else self._identity(item[1])

    def _of(self, value: object, depth: int = 0) -> object:
        if value is None or isinstance(value, _PLAIN):
            return type(value), value
        if depth > 8:
            raise _Opaque
        if isinstance(value, Tensor):
            return self._identity(value), None if value.is_inference() else value._version
        if isinstance(value, nn.Module | type | types.BuiltinFunctionType):
            return self._identity(value)
        if isinstance(value, dict):
            return type(value), [(self._of(key, depth + 1), self._of(item, depth + 1)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return type(value), [self._of(item, depth + 1) for item in value]
        if isinstance(value, set | frozenset) and all(isinstance(item, _PLAIN) for item in value):
            return type(value), frozenset(value)
        if isinstance(value, types.MethodType):
            return self._of(value.__self__, depth + 1), self._of(value.__func__, depth + 1)
        if isinstance(value, types.FunctionType):
            held = [cell.cell_contents for cell in value.__closure__ or ()]
            return self._identity(value), self._of([held, value.__defaults__, value.__kwdefaults__], depth + 1)
        raise _Opaque


def _surroundings(layer: BoundLayer, latents: Tensor) -> _Surroundings | None:
    try:
        return _Surroundings(layer, latents)
    except (_Opaque, TypeError, ValueError):  # also what has no weak references, and empty closure cells
        return None


class Trace(TorchDispatchMode):
    """Notes, in one forward pass of a generator, what each of a few layers' keys depends on.

    A context around the pass; ``reached(number)`` is to be called when the key of ``layers[number]`` is at hand. Custom
    kernels take tensors unseen, and modules lend theirs to others: so it notes both the modules that start and the
    tensors that operations take.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import torch._dynamo for it at the first operation, more than a second

    def __init__(self, layers: Sequence[BoundLayer], latents: Tensor):
        super().__init__()
        self._layers = layers
        self._latents = latents[:1]
        self._generator = layers[0].generator
        # scripted modules take no hooks: they count as started
        self._started = {part for part in self._generator.modules() if isinstance(part, torch.jit.ScriptModule)}
        self._read: set[int] = set()
        self._parts: dict[int, _Part] = {}

    def __enter__(self):
        self._handles = [
            module.register_forward_pre_hook(lambda module, args: self._started.add(module))
            for module in self._generator.modules()
            if module not in self._started
        ]
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor):
                self._read.add(id(value))
            elif isinstance(value, list | tuple | dict):
                self._read.update(id(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        return operation(*args, **(kwargs or {}))

    def reached(self, number: int) -> None:
        layer = self._layers[number]._layer
        started = self._started - {layer.site}  # whose call the key is read from
        self._parts[number] = _Part(self._generator, started, self._read - _computing(layer))

    def fingerprint(self, number: int) -> str:
        """That of ``layers[number]``, after the pass; the layer remembers what it found."""
        layer, part = self._layers[number], self._parts[number]
        text = part.fingerprint(layer)
        layer._traced = Traced(_surroundings(layer, self._latents), part, text)
        return text


def _computing(layer: LayerFamily) -> set[int]:
    """The ids of the tensors that a hook of the layer's own module has computed its weight from: no key depends on them."""
    if layer.computed is None:
        return set()
    return {id(tensor) for name, tensor in _own(layer.module) if name.startswith(f"{layer.weight_name}_")}


_PLACE = re.compile(r"[/\\]|^(cpu|cuda|mps|xpu)\b")  # strings that say where something is, not what it does
_NO_SETTINGS = {"training", "inplace"}  # passes run in eval mode; where a result is written does not change it
_NAMES: weakref.WeakKeyDictionary[type, tuple[set[str], set[str]]] = weakref.WeakKeyDictionary()


def _names(kind: type) -> tuple[set[str], set[str]]:
    """What the constructors of a class are given, by name: attributes of those names are settings, where others may be
    counters and caches, which differ from pass to pass though the keys do not. And the names of attributes that other
    methods write, which may be such whatever they are called."""
    if kind not in _NAMES:
        arguments, written = set(), set(_NO_SETTINGS)
        for base in kind.__mro__:
            for name, function in vars(base).items():
                function = inspect.unwrap(function) if isinstance(function, types.FunctionType) else None
                code = getattr(function, "__code__", None)
                if code is None:
                    continue
                if name == "__init__":
                    arguments.update(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
                elif base is not nn.Module and not name.startswith("__"):  # __setstate__ reads old pickles
                    stores = (each for each in dis.get_instructions(code) if each.opname == "STORE_ATTR")
                    written.update(each.argval for each in stores)
        _NAMES[kind] = arguments, written
    return _NAMES[kind]


def _is_setting(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    where = isinstance(value, torch.device) or (isinstance(value, str) and _PLACE.search(value))
    return value is None or (isinstance(value, _PLAIN) and not where)


def _settings(module: nn.Module) -> Iterable[tuple[str, object]]:
    """The module's settings: its floats, and other plain values that are named as its constructor's arguments are, as
    long as only constructors write them."""
    arguments, written = _names(type(module))
    for key, value in sorted(vars(module).items()):
        if key in written:
            continue
        if isinstance(value, float):
            yield key, float(value)
        elif value is not None and key in arguments and _is_setting(value):
            yield key, value


def _held(forward: object, depth: int = 0) -> list[object]:
    """The tensors and settings (a label, a truncation) that a `forward` of the user's own holds: its constants, defaults,
    and what it takes from around it."""
    if isinstance(forward, functools.partial):
        values = [*forward.args, *(forward.keywords[name] for name in sorted(forward.keywords))]
        values += _held(forward.func, depth + 1)
    elif isinstance(forward, types.FunctionType):
        code, around = forward.__code__, forward.__globals__
        values = [value for value in code.co_consts if isinstance(value, bool | int | float | str | tuple)]
        values += [around[name] for name in sorted(set(code.co_names)) if name in around]
        values += [*(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values()]
        for cell in forward.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                values.append(cell.cell_contents)
        if depth < 3:
            values += [each for value in values for each in _held(value, depth + 1)]
    else:
        values = []
    return [value for value in values if value is not None and (isinstance(value, Tensor) or _is_setting(value))]


class _Part:
    """The part of a generator that a key depends on, by name, so that no weight is kept alive."""

    def __init__(self, generator: nn.Module, started: set[nn.Module], read: set[int]):
        self._started: set[str] = set()
        self._tensors: dict[str, list[str]] = {}
        for name, module in sorted(generator.named_modules()):
            if module in started and "_orig_mod" not in module._modules:  # a compiled part is what is in it
                self._started.add(name)
            keys = [key for key, tensor in _own(module) if module in started or id(tensor) in read]
            if keys or module in started:
                self._tensors[name] = keys

    def fingerprint(self, layer: BoundLayer) -> str:
        modules = dict(layer.generator.named_modules())
        digest = xxhash.xxh3_128()
        for number, value in enumerate(_held(layer.own_forward)):
            if isinstance(value, Tensor):
                _hash_tensor(digest, f"forward {number}", value)
            else:
                digest.update(f"forward {number}|{value!r}|".encode())
        for name, keys in self._tensors.items():
            tensors, plain = dict(_own(modules[name])), name.replace("_orig_mod.", "").removesuffix("._orig_mod")
            for key in keys:
                _hash_tensor(digest, f"{plain}.{key}", tensors[key])
            if name in self._started:
                digest.update(f"{plain}|{[*_settings(modules[name])]}|".encode())
        return KIND + digest.hexdigest()


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The module's own parameters and buffers, sorted by name."""
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return sorted(tensors.items())


class Traced:
    """What a layer remembers of its last trace, to be spared the next."""

    def __init__(self, surroundings: _Surroundings | None, part: _Part, fingerprint: str):
        self._surroundings = surroundings
        self._part = part
        self._fingerprint = fingerprint

    def still(self, layer: BoundLayer, latents: Tensor) -> str | None:
        """The fingerprint, where nothing has changed: neither what a forward pass can branch on, nor a bit of the
        weights that it was made of (which it can branch on, too). Otherwise None: trace again."""
        if self._surroundings is None or self._surroundings != _surroundings(layer, latents[:1]):
            return None
        return self._fingerprint if self._part.fingerprint(layer) == self._fingerprint else None
