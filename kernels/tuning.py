"""Configurations of kernels: measured once per kind of GPU and class of problems, and kept on the disk."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from ..errors import RewriteCoreError

Config = TypeVar("Config")  # a frozen dataclass of numbers

INTERPRETED_MULTIPROCESSORS = 7  # what the interpreter stands for: few, and no power of two


def multiprocessors_of(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cache_folder(op: str, device_name: str) -> Path:
    """Where measured configurations of an op for GPUs of this name are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return base / "rewrite_core" / op / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "gpu")


def stored(path: Path, choices: Sequence[Config]) -> Config | None:
    """The configuration in a file, if it holds one of `choices`; anything else there counts as nothing."""
    try:
        config = type(choices[0])(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return config if config in choices else None


def measured(path: Path, choices: Sequence[Config], time: Callable[[Config], float]) -> Config:
    """The configuration in a file, or the fastest of `choices`, which is then put there.

    Of processes that measure at the same time the first to write wins, for all of them, and where nothing can be
    written nothing is measured: results have the same bits from run to run only under the same configuration.
    """
    config = stored(path, choices)
    if config is not None or len(choices) == 1:
        return config or choices[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return choices[0]
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(min(choices, key=time)), file)
        try:
            os.link(partial, path)
        except FileExistsError:
            if stored(path, choices) is None:  # what lies there is of no use
                os.replace(partial, path)
        except OSError:  # no hard links here
            os.replace(partial, path)
    except OSError:
        return choices[0]
    finally:
        Path(partial).unlink(missing_ok=True)
    return stored(path, choices) or choices[0]


_chosen: dict[tuple[int | None, str, str], Any] = {}  # what is on the disk, so that it is read once


def choose(
    device: torch.device, op: str, name: str, choices: Sequence[Config], run: Callable[[Config], object]
) -> Config:
    """Of `choices` the one that is, or was once, fastest on a GPU like this for problems of this name; the first in
    the interpreter, where nothing is measured.

    run  does a typical piece of the work with a configuration; its results are dropped

    Raises RewriteCoreError for a first call while a CUDA graph is captured.
    """
    if device.type != "cuda":
        return choices[0]
    key = (device.index, op, name)
    if key in _chosen:
        return _chosen[key]
    path = cache_folder(op, torch.cuda.get_device_name(device)) / f"{name}.json"
    if torch.cuda.is_current_stream_capturing():
        raise RewriteCoreError(
            f"{op} has not yet run on data of such a type, size and layout in this process, and what its first call "
            "compiles and measures cannot go into a CUDA graph: call it once before the capture."
        )

    def time(config: Config) -> float:
        try:
            return triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    _chosen[key] = measured(path, choices, time)
    return _chosen[key]
