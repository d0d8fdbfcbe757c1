"""Fingerprints: how files and checks know tensors, and the weights that a layer's keys come from."""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import inspect
import math
import re
import struct
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..adapters.base import LayerAdapter, absent, unusual
from ..adapters.offloading import kept
from ..errors import RewriteCoreError
from ..waits import all_on_host, bits_of, on_gpu, suppose
from .bits import TOGETHER, bits_on_host, fetched, summed
from .memory import blocks, overlap, storage_of
from .passes import Hooks, numbers_of_own

Forward = Callable[[nn.Module, Tensor], Any]


def plain_call(generator: nn.Module, latents: Tensor) -> Any:
    """The `forward` of a generator that nobody gave one."""
    return generator(latents)


# Names the algorithm. XXH3 runs at the speed of memory, so that every bit is looked at in every check: a tensor's
# version counter would not tell of writes through .data or NumPy. It guards against accidents, not against forgery.
KIND = "xxh3-3:"


def _head(name: str, tensor: Tensor) -> bytes:
    return f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(_head(name, tensor))
    digest.update(fetched(bits_of(tensor)))


def tensor_fingerprint(tensor: Tensor) -> str:
    """A 32-digit fingerprint of a tensor's dtype, shape and bits."""
    digest = hashlib.blake2b(digest_size=16)  # small tensors; files that people share hold it
    _hash_tensor(digest, "", tensor)
    return digest.hexdigest()


# --- a weight that is computed has other bits on another CPU

_SIGNS = (2654435761, 2246822519, 3266489917, 668265263)  # each makes as many signs as a tensor has numbers


def _sketch(tensor: Tensor) -> list[float]:
    """The norm of a tensor, and a few sums of its numbers with signs that look random: what is near in all of them is
    the same but for rounding."""
    numbers = tensor.detach().cpu().reshape(-1)
    square, sums = 0.0, [0.0] * len(_SIGNS)
    for block in blocks(numbers, 2**18):
        part = numbers[block].double()
        places = torch.arange(block.start, block.start + len(part), device="cpu")
        square += part.square().sum().item()
        for number, odd in enumerate(_SIGNS):
            sums[number] += (part * (1 - 2 * ((places * odd >> 20) & 1))).sum().item()
    return [math.sqrt(square), *sums]


def rounded_fingerprint(tensor: Tensor) -> str:
    """:func:`tensor_fingerprint` with a sketch of the numbers, by which :func:`is_of` knows them but for rounding."""
    sketch = struct.pack(f"<{1 + len(_SIGNS)}d", *_sketch(tensor)).hex()
    return f"{tensor_fingerprint(tensor)}~{tensor.dtype}~{sketch}"


def is_of(tensor: Tensor, fingerprint: str, bits: str | None = None) -> bool:
    """Whether a fingerprint is that of a tensor: to the bit, or, where it has a sketch, but for rounding.

    `bits` is the tensor's own :func:`tensor_fingerprint`, where that is at hand."""
    known, _, more = fingerprint.partition("~")
    if known == (tensor_fingerprint(tensor) if bits is None else bits):
        return True
    dtype, _, sketch = more.partition("~")
    try:
        norm, *sums = struct.unpack(f"<{1 + len(_SIGNS)}d", bytes.fromhex(sketch))
    except (ValueError, struct.error):
        return False
    if dtype != str(tensor.dtype) or not tensor.is_floating_point():
        return False
    near = max(1e-5, torch.finfo(tensor.dtype).eps / 4) * norm
    return all(abs(one - other) <= near for one, other in zip([norm, *sums], _sketch(tensor), strict=True))


# --- what a forward pass can branch on


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


class Surroundings:
    """Everything in a generator that its forward pass can branch on, but for its weights' content: modules, their
    attributes, which tensors they hold. Equal ones take the same way to a layer, unless that depends on what no
    module holds (a global variable). Raises _Opaque where an attribute is of a kind that cannot be compared."""

    def __init__(self, generator: nn.Module, forward: Forward, latents: Tensor):
        self._objects: list[weakref.ref] = []  # an id says nothing of an object that is gone
        self._latents = tuple(latents.shape[1:]), latents.dtype, latents.device
        self._facts: list[object] = [self._of(forward)]
        for name, module in generator.named_modules():
            self._facts += [name, type(module), self._identity(module)]
            passing = numbers_of_own(module)  # of a pass in another thread
            for key, value in list(vars(module).items()):
                if key.startswith("_forward_"):
                    value = {number: hook for number, hook in list(value.items()) if number not in passing}
                if key == "training" or (isinstance(value, dict | set) and not value):  # passes run in eval mode
                    continue
                registered = key in ("_parameters", "_buffers", "_modules")
                self._facts.append((key, [*map(self._registered, value.items())] if registered else self._of(value)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surroundings) and self._latents == other._latents and not self.changed(other)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, generator: nn.Module, forward: Forward, latents: Tensor) -> Surroundings | None:
        """None where they cannot be compared."""
        try:
            return cls(generator, forward, latents)
        except (_Opaque, TypeError, ValueError, RuntimeError):  # no weak references, empty cells, other threads' writes
            return None

    def changed(self, other: Surroundings) -> set[int]:
        """The places of the facts that differ, whatever the latents; -1 where there are others, or an object is
        gone."""
        gone = any(reference() is None for each in (self, other) for reference in each._objects)
        if gone or len(self._facts) != len(other._facts):
            return {-1}
        return {place for place, facts in enumerate(zip(self._facts, other._facts)) if facts[0] != facts[1]}

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


# --- what the keys of a layer depend on


class _Owned:
    """A parameter or buffer of a module as it was before a pass."""

    def __init__(self, tensor: Tensor, parameter: bool):
        self._tensor, self._parameter = tensor, parameter
        self._device, self._place = tensor.device, _place_of(tensor)
        self._before: bytes | None = None  # a parameter's digest before its first write

    def written_by(self, tensor: Tensor) -> bool:
        return overlap(self._tensor, tensor)

    def note_write(self) -> None:
        self._before = self._before or (_digest(self._tensor) if self._parameter else b"a buffer")

    def changes(self, now: Tensor) -> bool:
        """Whether the pass has written to it, so that it says nothing of the weights: a counter, an observer's range, a
        vector of spectral norm. A parameter that was written to with the numbers that it had says something."""
        if now is not self._tensor:
            return not self._tensor.is_meta  # else it was brought by a hook
        if now.device != self._device:  # moved, not written to
            return False
        if _place_of(now) != self._place:
            return True
        return self._before is not None and not (self._parameter and _digest(now) == self._before)


def _place_of(tensor: Tensor) -> int | None:
    return None if storage_of(tensor) is None else tensor.data_ptr()


def _digest(tensor: Tensor) -> bytes:
    digest = xxhash.xxh3_128()
    _hash_tensor(digest, "", tensor)
    return digest.digest()


class Trace(TorchDispatchMode):
    """Notes, in one forward pass of a generator, what the keys of layers in it depend on.

    A context around the pass; :meth:`part` is to be called as the key of a layer is at hand. Custom kernels take
    tensors unseen, and modules lend theirs to others: so it notes both the modules that start and the tensors that
    operations take.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import torch._dynamo for it at the first operation, more than a second

    def __init__(self, generator: nn.Module, hooks: Hooks):
        super().__init__()
        self._generator = generator
        # scripted modules take no hooks: they count as started
        self._started: set[nn.Module] = {
            part for part in generator.modules() if isinstance(part, torch.jit.ScriptModule)
        }
        self._read: set[int] = set()
        self._owned: dict[tuple[str, str], _Owned] = {}
        self._places: dict[int, list[_Owned]] = {}  # by storage
        for name, module in generator.named_modules():
            if module not in self._started:
                hooks.before(module, lambda module, args, kwargs: self._started.add(module))
            for key, tensor in _own(module):
                owned = self._owned[name, key] = _Owned(tensor, isinstance(tensor, nn.Parameter))
                storage = storage_of(tensor)
                if storage is not None:
                    self._places.setdefault(storage, []).append(owned)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._read.update(map(id, tensors_among((*args, *kwargs.values()))))
        schema = getattr(operation, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = dict(zip((argument.name for argument in schema.arguments), args)) | kwargs
            given = {argument.name: named.get(argument.name) for argument in schema.arguments if _is_written(argument)}
            for tensor in tensors_among(given.values()):
                for owned in self._places.get(storage_of(tensor) or 0, ()):
                    if owned.written_by(tensor):
                        owned.note_write()
        return operation(*args, **kwargs)

    def part(self, adapter: LayerAdapter) -> Part:
        """The part of the generator that has run when the key of a layer is at hand, and that the key depends on."""
        started = self._started - {adapter.site}  # whose call the key is read from
        read = self._read - _computing(adapter)
        tensors: dict[str, list[str]] = {}
        names = set()
        for name, module in sorted(self._generator.named_modules()):
            if module in started and "_orig_mod" not in module._modules:  # a compiled part is what is in it
                names.add(name)
            keys = [
                key
                for key, tensor in _own(module)
                if (module in started or id(tensor) in read) and not self._is_written(name, key, tensor)
            ]
            if keys or module in started:
                tensors[name] = keys
        return Part(names, tensors)

    def _is_written(self, name: str, key: str, tensor: Tensor) -> bool:
        owned = self._owned.get((name, key))  # None: made as it was first needed
        return owned is not None and owned.changes(tensor)


def tensors_among(values: Iterable[object]) -> list[Tensor]:
    """The tensors among the arguments of an operation."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _computing(adapter: LayerAdapter) -> set[int]:
    """The ids of the tensors that a hook of the layer's own module has computed its weight from: no key depends on
    them."""
    if adapter.computed is None:
        return set()
    return {id(tensor) for name, tensor in _own(adapter.module) if name.startswith(f"{adapter.weight_name}_")}


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
    """The tensors and settings (a label, a truncation) that a `forward` of the user's own holds: its constants,
    defaults, and what it takes from around it."""
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


Fact = str | tuple[str, Tensor]  # a setting, or a tensor by name


def _together(facts: Iterable[Fact]) -> Iterator[list[Fact]]:
    """In pieces whose tensors on GPUs are copied together. At most one tensor of the host is in a piece: it may have
    been read from a disk for this."""
    piece, size = list[Fact](), 0
    for fact in facts:
        piece.append(fact)
        if not isinstance(fact, str):
            size += fact[1].numel() * fact[1].element_size()
            if size > TOGETHER or not on_gpu(fact[1]):
                yield piece
                piece, size = [], 0
    yield piece


Mark = tuple[bytes, list[Tensor]]  # a digest of what is on the host, and sums of what is on GPUs, one for each of them


class Part:
    """The part of a generator that a key depends on, by name, so that no weight is kept alive."""

    def __init__(self, started: set[str], tensors: Mapping[str, list[str]]):
        self._started, self._tensors = started, tensors

    def fingerprint(self, generator: nn.Module, forward: Forward) -> str:
        """Of every bit of it. Raises RewriteCoreError where the weights of it have no values here (offloaded,
        sharded)."""
        digest = xxhash.xxh3_128()
        for facts in _together(self._facts(generator, forward)):
            contents = bits_on_host([fact[1] for fact in facts if not isinstance(fact, str)])
            for fact in facts:
                digest.update(fact.encode() if isinstance(fact, str) else _head(*fact))
                if not isinstance(fact, str):
                    digest.update(next(contents).data)
        return KIND + digest.hexdigest()

    def mark(self, generator: nn.Module, forward: Forward) -> Mark | None:
        """What stays the same as long as the fingerprint does, for the same tensors on the same devices: found sooner,
        as a GPU adds up the bits of its tensors by itself and is not waited for. None where nothing is on a GPU."""
        digest, away = xxhash.xxh3_128(), list[Tensor]()
        for fact in self._facts(generator, forward):
            if isinstance(fact, str):
                digest.update(fact.encode())
            elif on_gpu(fact[1]):
                digest.update(_head(*fact))
                away.append(fact[1])
            else:
                _hash_tensor(digest, *fact)
        sums = summed(away) if away else None
        return None if sums is None else (digest.digest(), sums)

    def _facts(self, generator: nn.Module, forward: Forward) -> Iterator[Fact]:
        """All that it consists of: settings, and tensors by name."""
        modules = dict(generator.named_modules())
        for number, value in enumerate(_held(None if forward is plain_call else forward)):
            yield (f"forward {number}", value) if isinstance(value, Tensor) else f"forward {number}|{value!r}|"
        for name, keys in self._tensors.items():
            tensors, plain = dict(_own(modules[name])), name.replace("_orig_mod.", "").removesuffix("._orig_mod")
            for key in keys:
                tensor = tensors[key]
                if tensor.is_meta:
                    held = kept(modules[name], key)
                    tensor = tensor if held is None else held
                _check_readable(name, modules[name], tensor)
                yield f"{plain}.{key}", tensor
            if name in self._started:
                yield f"{plain}|{[*_settings(modules[name])]}|"


def _check_readable(name: str, module: nn.Module, tensor: Tensor) -> None:
    reason = absent(module) if tensor.is_meta else None
    if is_traceable_wrapper_subclass(tensor):
        reason = unusual(tensor)
    if reason:
        raise RewriteCoreError(f"Module {name!r} runs before the layer, and its weights cannot be read: {reason}.")


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The module's own parameters and buffers, sorted by name."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    return sorted((tensors | dict(module.named_buffers(recurse=False))).items())


class Remembered:
    """What a layer remembers of its last trace, to be spared the next: the surroundings before and after that pass."""

    def __init__(self, part: Part, fingerprint: str, before: Surroundings | None, after: Surroundings | None):
        self._part, self.fingerprint = part, fingerprint
        self._mark: Mark | None = None  # the part's, once it was looked at again, on the host
        self._surroundings = after
        # what passes write says nothing of the way that they go
        self._written = set() if before is None or after is None else after.changed(before)

    def still(self, generator: nn.Module, forward: Forward, latents: Tensor) -> bool:
        """Whether nothing has changed: neither what a forward pass can branch on, nor a bit of the weights that the
        fingerprint was made of (which it can branch on, too). Otherwise: trace again."""
        if self._surroundings is None or self._surroundings != Surroundings.of(generator, forward, latents):
            return False
        mark = self._part.mark(generator, forward)
        if mark is not None and self._mark is not None:
            (digest, sums), (known, known_sums) = mark, self._mark
            return (digest, len(sums)) == (known, len(known_sums)) and all(
                suppose(own, functools.partial(torch.equal, before)) for own, before in zip(sums, known_sums)
            )
        same = self._part.fingerprint(generator, forward) == self.fingerprint
        self._mark = (mark[0], all_on_host(mark[1])) if same and mark is not None else None
        return same

    def same_way(self, last: Remembered) -> bool:
        """Whether passes go the way that they went when `last` was found; where that cannot be compared, whether the
        weights and settings are the same."""
        if self._surroundings is None or last._surroundings is None:
            return self.fingerprint == last.fingerprint
        return self._surroundings.changed(last._surroundings) <= self._written
