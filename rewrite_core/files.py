"""Reading and writing files: all or nothing, from one descriptor, and nothing from a file is believed unchecked."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .errors import ArgumentError, FileFormatError, RewriteCoreError, printable, quoted

try:
    import fcntl
except ImportError:  # where there are no such locks, what killed writers leave is not found
    fcntl = None  # type: ignore[assignment]

_DEEPEST = 32  # lists and objects in one another that JSON may have
_HEADER = 100_000_000  # bytes of a safetensors header, a limit of the format
_UNPACKED = 64 * 2**20, 100  # a compressed or expanded file may give so many bytes, or so many times its own
_FORGOTTEN = 24 * 3600.0  # seconds after which a partial file of another machine counts as left behind


def as_path(path: str | os.PathLike) -> str:
    """The name of a file. Raises ArgumentError for what is none."""
    given = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(given, str):
        raise ArgumentError(f"A file is named by a str or a Path, not by {quoted(path)}.")
    return given


def shown(path: str | os.PathLike) -> str:
    """A file's name for a message."""
    return printable(as_path(path))


# --- writing ----------------------------------------------------------------------------------------------------


def writable_path(path: str | os.PathLike) -> Path:
    """The file that writing to `path` would make or replace, symbolic links followed.

    Raises OSError where that cannot be: no such folder, a folder that may not be written to, a name that is too long,
    or something there that is no regular file. Nothing is touched, so it can be asked before long work.
    """
    given, name = as_path(path), shown(path)
    if not given or "\0" in given:
        raise FileNotFoundError("The name of the file to write is empty or holds a null character; give another.")
    found = Path(os.path.realpath(given))
    folder, last = shown(found.parent), shown(found.name)
    try:
        there = found.parent.is_dir()
        longest = os.pathconf(found.parent, "PC_NAME_MAX") if there and hasattr(os, "pathconf") else 255
        size = len(os.fsencode(found.name))
        if size > longest:
            raise OSError(
                f"The file name {quoted(last)} has {size} bytes and {folder} takes {longest}; give a shorter one."
            )
        if found.is_dir() or given.endswith(os.sep):
            raise IsADirectoryError(f"{name} is a folder; name a file in it.")
        if os.path.lexists(found) and not found.is_file():
            raise FileExistsError(f"{name} is a device, a pipe or a broken link, not a file to replace; name another.")
        if not there:
            raise FileNotFoundError(f"There is no folder {folder} to write {last} into; make it first.")
    except OSError as error:
        if error.errno is None:  # one of these
            raise
        raise OSError(f"{quoted(given)} cannot be written ({error.strerror}); name another.") from None
    if not os.access(found.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {folder} may not be written to; choose another for {last}.")
    return found


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path of the same name; on success the file there is flushed and renamed to `path`.

    A crash or an exception never leaves half a file, nor harms the one that was there. A symbolic link stays, and
    the file it points to is replaced. Until it is renamed the file lies in a folder of its own beside `path`, which
    nobody else may enter; one that a killed writer left there is removed by the next. The file gets the permissions
    that any other file the user makes would get. Raises what :func:`writable_path` does, and OSError where the disk is
    full.
    """
    path = writable_path(path)
    with _private_folder(path) as folder:
        partial = folder / path.name
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # the umask is the system's to apply
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield partial
        except SafetensorError as error:  # a full disk
            raise OSError(f"{shown(path)} cannot be written ({error}); what was there is as it was.") from error
        partial.chmod(mode)  # a library may have put another file in its place
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextlib.contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that only this process writes to: the first of those that may be called so that
    is free, or that a killed writer left. Others that were left are removed."""
    number = 0
    while (descriptor := _claimed(_partial(path, number))) is None:
        number += 1
    folder = _partial(path, number)
    try:
        others = (_partial(path, each) for each in itertools.count(number + 1))
        for left in itertools.takewhile(os.path.lexists, others):
            _removed(left)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _claimed(folder: Path) -> int | None:
    """A descriptor that keeps others out of a folder that was just made; None where that one is in use."""
    while True:
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            if not _removed(folder):
                return None
            continue
        try:
            descriptor, _ = _lock(folder)
        except (BlockingIOError, FileNotFoundError):  # taken for one that was left, in the moment before it was locked
            continue
        (folder / _owner()).touch()
        return descriptor


def _partial(path: Path, number: int) -> Path:
    """The folder that `path` is written in where so many others are in use; its own name is never too long."""
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}.{number}.partial")


def _owner() -> str:
    """A file in a folder that says which machine made it: locks are not always seen by others."""
    return f"machine-{zlib.crc32(platform.node().encode()):08x}"


def _lock(folder: Path) -> tuple[int, bool]:
    """A descriptor that keeps others out of the folder while it is open, and whether the file system has such locks.

    Raises BlockingIOError where another process has it, another OSError where it is gone or may not be read.
    """
    descriptor, locked = os.open(folder, os.O_RDONLY), False
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks
                pass
        if not os.path.samestat(os.stat(folder), os.fstat(descriptor)):
            raise FileNotFoundError(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, locked


def _removed(folder: Path) -> bool:
    """Whether there is no such folder any more: one that a killed writer left is removed. Nobody has its lock and this
    machine made it, or it is a day old."""
    try:
        descriptor, locked = _lock(folder)
    except FileNotFoundError:
        return True
    except OSError:  # in use, or another user's
        return False
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISDIR(facts.st_mode):
            return False
        machines = [name for name in os.listdir(folder) if name.startswith("machine-")]
        if (locked and machines in ([], [_owner()])) or time.time() - facts.st_mtime > _FORGOTTEN:
            shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    finally:
        os.close(descriptor)


# --- JSON -------------------------------------------------------------------------------------------------------


def plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy of `value` that JSON has room for: NumPy's numbers become Python's, arrays and tuples lists, NaN and
    infinity None. Raises ArgumentError, with the place in `name`, for anything else."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value) and depth < _DEEPEST:
        return {str(key): plain(item, f"{name}[{quoted(key)}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return [plain(item, f"{name}[{number}]", depth + 1) for number, item in enumerate(value)]
    raise ArgumentError(
        f"{name} is {quoted(value)}, a {type(value).__name__}, which a file has no room for; use numbers, "
        "text, and lists and dicts of them."
    )


def to_json(value: Any, name: str = "the record", indent: int | None = None) -> str:
    """`value` as JSON that every reader takes: see :func:`plain`."""
    return json.dumps(plain(value, name), indent=indent, allow_nan=False)


def from_json(text: str | bytes, what: str) -> Any:
    """What JSON says. Raises FileFormatError, which names `what`, where it cannot be read or goes too deep."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise FileFormatError(f"{what} cannot be read as JSON ({_why(error)}).") from None
    level = [value]
    for _ in range(_DEEPEST):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
    if any(isinstance(each, dict | list) for each in level):
        raise FileFormatError(f"{what} goes more than {_DEEPEST} lists or objects deep.")
    return value


def _why(error: BaseException) -> str:
    """An exception's message, on one short line."""
    text = " ".join(printable(str(error)).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."


# --- reading ----------------------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike, what: str = "file") -> BinaryIO:
    """A regular file, opened once: what is read through it is of one file, whatever takes its name meanwhile."""
    if Path(as_path(path)).is_dir():
        raise IsADirectoryError(f"{shown(path)} is a folder; name a file in it.")
    if not Path(as_path(path)).is_file():
        raise FileNotFoundError(f"There is no {what} {shown(path)}.")
    return open(path, "rb")


def is_zip(file: BinaryIO) -> bool:
    """Whether an open file begins as an .npz (a zip) does, whatever it is called."""
    start = file.read(4)
    file.seek(0)
    return start == b"PK\x03\x04"


class _Oversized(FileFormatError):
    """A file that says that it holds more than it can."""


def _check_unpacked(size: int, file: BinaryIO, path: str | os.PathLike) -> None:
    """Raises FileFormatError where `size` bytes are far more than the file can mean."""
    least, times = _UNPACKED
    stored = os.fstat(file.fileno()).st_size
    if size > max(least, times * stored):
        raise _Oversized(
            f"{shown(path)} has {stored} bytes and would take {size} in memory: it is damaged, or made to exhaust it."
        )


def read_arrays(file: BinaryIO, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an open .npz file, whose sizes are looked at first. Raises FileFormatError for anything else."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_unpacked(sum(member.file_size for member in members), file, path)
            for member in members:
                with archive.open(member) as data:
                    _check_array(data, member.file_size, path)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (FileFormatError, MemoryError):
        raise
    except Exception as error:  # numpy raises anything from BadZipFile to KeyError here
        raise FileFormatError(f"{shown(path)} is no .npz of plain arrays ({_why(error)}).") from error


def _check_array(data: IO[bytes], size: int, path: str | os.PathLike) -> None:
    """Raises FileFormatError where the header of an array says that it is larger than its `size` bytes."""
    version = np.lib.format.read_magic(data)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(data)
    if math.prod(shape) * dtype.itemsize > size:
        raise _Oversized(f"{shown(path)} is truncated: an array of {list(shape)} in it has {size} bytes.")


def read_tensors(file: BinaryIO, path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of an open safetensors file, in memory of their own: what becomes of the file later
    does not matter. Raises FileFormatError for anything else."""
    data = file.read()
    try:
        tensors = load(data)  # which checks every size against what is there
    except MemoryError:
        raise
    except Exception as error:
        raise FileFormatError(f"{shown(path)} is truncated or not a safetensors file ({_why(error)}).") from error
    header = from_json(data[8 : 8 + int.from_bytes(data[:8], "little")], shown(path))
    return tensors, header.get("__metadata__") or {}


def save_record(path: str | os.PathLike, kind: str, version: int, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write one of the library's own safetensors files (a second moment, a rewrite), all or nothing.

    `metadata` is anything that :func:`plain` takes; it is stored with the file's kind and format version.
    """
    text = to_json(metadata, "metadata")
    if len(text) > _HEADER // 2:  # quotes in it are escaped once more
        raise RewriteCoreError(
            f"The metadata of {shown(path)} has {len(text)} characters, more than a safetensors file takes; "
            "keep less in it."
        )
    header = {"format": f"rewrite_core.{kind}", "version": str(version), "metadata": text}
    save_tensors(path, tensors, header)


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, all or nothing, from any device and with any strides; those that share memory
    (tied weights) are written once for each name.

    Raises RewriteCoreError for a tensor of a kind that such a file has no room for.
    """
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise RewriteCoreError(
                f"{shown(path)} cannot hold {quoted(name)}, which is no dense tensor with numbers; leave it out, or "
                "make it one."
            )
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if place in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(place)
        owned[name] = tensor
    with atomic_write(path) as partial:
        try:
            save_file(owned, partial, metadata=None if metadata is None else dict(metadata))
        except SafetensorError:  # a full disk
            raise
        except (KeyError, ValueError, RuntimeError) as error:
            raise RewriteCoreError(f"{shown(path)} cannot hold these tensors ({_why(error)}).") from error


def load_record(path: str | os.PathLike, kind: str, *versions: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_record` wrote, of any of `versions`. Raises FileFormatError for anything else."""
    with open_file(path) as file:
        return record_of(file, path, kind, *versions)


def record_of(
    file: BinaryIO, path: str | os.PathLike, kind: str, *versions: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """:func:`load_record` from an open file."""
    name = shown(path)
    tensors, header = read_tensors(file, path)
    found = header.get("format")
    if found != f"rewrite_core.{kind}":
        what = "a foreign file" if found is None else quoted(found)
        raise FileFormatError(f"{name} is not a rewrite_core {kind.replace('_', ' ')} but {what}.")
    if header.get("version") not in [str(version) for version in versions]:
        raise FileFormatError(
            f"{name} has format version {quoted(header.get('version'))} and this library reads {max(versions)}; "
            "upgrade rewrite_core or make the file again."
        )
    metadata = from_json(header.get("metadata", ""), f"The metadata of {name}")
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{name} has metadata that is no JSON object but {_describe(metadata)}.")
    return tensors, metadata


def _describe(value: Any) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


# --- state dicts ------------------------------------------------------------------------------------------------


def read_state_dict(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads a checkpoint into one flat dict of CPU tensors, dtypes as stored; runs no code from the file.

    `source` is a .safetensors file, an .npz file of plain arrays, any file `torch.load` reads with
    ``weights_only=True`` (.pt, .pth, ...), or an already loaded dict of tensors or arrays. Two
    wrappers are opened: ``{"state_dict": ...}``, and ``{"g_ema": ..., "latent_avg": ...}``, whose
    ``latent_avg``, if any, becomes one more entry. Tensors of a dict are not copied.

    Raises FileNotFoundError, or FileFormatError for a truncated file or one that holds anything else.
    """
    state, extra = read_whole_state(source)
    if extra:
        name = "The dict" if isinstance(source, Mapping) else shown(source)
        raise FileFormatError(
            f"{name} holds the extra state of modules ({quoted(next(iter(extra)))}), which this generator has none of; "
            "give its own state dict."
        )
    return state


def read_whole_state(source: str | os.PathLike | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """:func:`read_state_dict`, and the extra state of modules in it, which may be anything that is read without running
    code: what ``get_extra_state`` returned, under "..._extra_state"."""
    if isinstance(source, Mapping):
        return _state_of(source, "the dict")
    with open_file(source, "checkpoint file at") as file:
        state, extra = _state_of(_read_checkpoint(file, source), shown(source))
        # a tensor may repeat its numbers by its strides
        _check_unpacked(sum(value.numel() * value.element_size() for value in state.values()), file, source)
    return state, extra


def _numpy_scalar(dtype: object, data: object) -> Any:
    """A number of NumPy's in a pickle: a step or a loss that was saved beside the weights."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc":
        raise ValueError("no number")
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise ValueError("no number")
    return np.frombuffer(data, dtype)[0]


# Training checkpoints often carry their command line, a harmless bag of plain values, and numbers of NumPy's.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # NumPy 1
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdFD"},
]


def _read_checkpoint(file: BinaryIO, path: str | os.PathLike) -> Any:
    suffix = Path(path).suffix
    try:
        if suffix == ".safetensors":
            return read_tensors(file, path)[0]
        if suffix == ".npz":
            return read_arrays(file, path)
        if is_zip(file):
            with zipfile.ZipFile(file) as archive:
                _check_unpacked(sum(member.file_size for member in archive.infolist()), file, path)
            file.seek(0)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError, _Oversized):
        raise
    except Exception as error:
        raise FileFormatError(
            f"{shown(path)} cannot be read as a checkpoint ({type(error).__name__}): it is truncated, of another "
            "format than its ending says, or holds more than tensors; download it again or save "
            "model.state_dict() alone."
        ) from error


def _state_of(content: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The flat state dict in what was read, and the extra state in it."""
    for wrapper in ("state_dict", "g_ema"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            latent_avg = content.get("latent_avg")
            content = dict(content[wrapper])
            if latent_avg is not None:
                content["latent_avg"] = latent_avg
    if not isinstance(content, Mapping) or not content:
        raise FileFormatError(f"{name} holds no state dict but {_describe(content)}; save a state dict.")
    state, extra = {}, {}
    for key, value in content.items():
        if isinstance(key, str) and key.rpartition(".")[2] == "_extra_state":
            extra[key] = value
            continue
        if not isinstance(key, str) or not isinstance(value, Tensor | np.ndarray):
            raise FileFormatError(
                f"{name} holds no plain state dict: entry {quoted(key)} is {_describe(value)}, "
                "so save model.state_dict() alone."
            )
        state[key] = value if isinstance(value, Tensor) else _tensor_of(value, key, name)
        if state[key].is_meta:
            raise FileFormatError(
                f"{name}: entry {quoted(key)} is on the meta device and has no numbers; save real weights."
            )
    return state, extra


def _tensor_of(array: np.ndarray, key: str, name: str) -> Tensor:
    try:
        return torch.as_tensor(array.astype(array.dtype.newbyteorder("="), copy=False), device="cpu")
    except TypeError:
        raise FileFormatError(
            f"{name} holds no plain state dict: entry {quoted(key)} has type {quoted(str(array.dtype))}, which no "
            "tensor has; save numbers."
        ) from None
