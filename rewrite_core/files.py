"""Reading and writing files."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import FileFormatError


def read_state_dict(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads a checkpoint into one flat dict of CPU tensors, dtypes as stored; runs no code from the file.

    `source` is a .safetensors file, an .npz file of plain arrays, any file `torch.load` reads with
    ``weights_only=True`` (.pt, .pth, ...), or an already loaded dict of tensors or arrays. Two
    wrappers are opened: ``{"state_dict": ...}``, and ``{"g_ema": ..., "latent_avg": ...}``, whose
    ``latent_avg``, if any, becomes one more entry. Tensors of a dict are not copied.

    Raises FileNotFoundError, or FileFormatError for a truncated file or one that holds anything else.
    """
    if isinstance(source, Mapping):
        name, content = "the dict", source
    else:
        path = Path(source)
        name, content = str(path), _read(path)
    for wrapper in ("state_dict", "g_ema"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            latent_avg = content.get("latent_avg")
            content = dict(content[wrapper])
            if latent_avg is not None:
                content["latent_avg"] = latent_avg
    if not isinstance(content, Mapping) or not content:
        raise FileFormatError(f"{name} holds no state dict but {_describe(content)}; save a state dict.")
    state = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, (Tensor, np.ndarray)):
            raise FileFormatError(
                f"{name} holds no plain state dict: entry {key!r} is {_describe(value)}, "
                "so save model.state_dict() alone."
            )
        state[key] = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    return state


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        # Training checkpoints often carry their command line, a harmless bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise FileFormatError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is truncated, of another "
            "format than its ending says, or holds more than tensors; download it again or save "
            "model.state_dict() alone."
        ) from error


def _describe(value: Any) -> str:
    return "nothing" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


def writable_path(path: str | os.PathLike) -> Path:
    """The file that writing to `path` would make or replace, symbolic links followed.

    Raises OSError where that cannot be: no such folder, a folder that may not be written to, or something there
    that is no regular file. Nothing is touched, so it can be asked before long work.
    """
    given = os.fspath(path)
    if not given:
        raise FileNotFoundError("The name of the file to write is empty; give one.")
    path = Path(os.path.realpath(given))
    if path.is_dir() or given.endswith(os.sep):
        raise IsADirectoryError(f"{given} is a folder; name a file in it.")
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(f"{given} is a device, a pipe or a broken link, not a file to replace; name another.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into; make it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {path.parent} may not be written to; choose another for {path.name}.")
    return path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed and renamed to `path`.

    A crash or an exception never leaves half a file, nor harms the one that was there. A symbolic link stays, and
    the file it points to is replaced. Raises what :func:`writable_path` does, and OSError where the disk is full.
    """
    path = writable_path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes files private; a result is as readable as any other file the user writes
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:  # a full disk
        raise OSError(f"{path} cannot be written ({error}); what was there is as it was.") from error
    finally:
        partial.unlink(missing_ok=True)


def is_npz(path: str | os.PathLike) -> bool:
    """Whether the file at `path` begins as an .npz (a zip) does, whatever it is called."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def save_record(path: str | os.PathLike, kind: str, version: int, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write one of the library's own safetensors files (a second moment, a rewrite), all or nothing.

    `metadata` is any JSON; it is stored with the file's kind and format version.
    """
    header = {"format": f"rewrite_core.{kind}", "version": str(version), "metadata": json.dumps(metadata)}
    with atomic_write(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=header)


def load_record(path: str | os.PathLike, kind: str, version: int) -> tuple[dict[str, Tensor], dict]:
    """Read what :func:`save_record` wrote. Raises FileFormatError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path} is truncated or not a safetensors file ({error}).") from error
    found = header.get("format")
    if found != f"rewrite_core.{kind}":
        raise FileFormatError(f"{path} is not a rewrite_core {kind.replace('_', ' ')} but {found or 'a foreign file'}.")
    if header.get("version") != str(version):
        raise FileFormatError(
            f"{path} has format version {header.get('version')} and this library reads {version}; "
            "upgrade rewrite_core or make the file again."
        )
    try:
        metadata = json.loads(header["metadata"])
    except (KeyError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} has unreadable metadata ({error}).") from error
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path} has metadata that is no JSON object but {_describe(metadata)}.")
    return tensors, metadata
