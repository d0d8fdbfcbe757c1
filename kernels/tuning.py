"""Configurations of kernels: measured once per kind of GPU and class of problems, and kept on the disk.

For checks and benchmarks:

``REWRITE_CORE_TUNING=0``  an environment variable: default configurations, nothing is measured or read from the disk
``measured(op)``           every candidate's time, not only the winner's
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from ..errors import RewriteCoreError
from .launching import refuse_in_graph

Config = TypeVar("Config")  # a frozen dataclass of numbers

TUNING_VARIABLE = "REWRITE_CORE_TUNING"
INTERPRETED_MULTIPROCESSORS = 7  # what the interpreter stands for: few, and no power of two


class Trial(NamedTuple):
    """How one candidate did: its seconds, or None and the reason why it did not run."""

    config: Any
    seconds: float | None
    reason: str | None = None


def multiprocessors_of(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def enabled() -> bool:
    """Whether configurations are measured. Raises RewriteCoreError where the variable is neither 0 nor 1."""
    value = os.environ.get(TUNING_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise RewriteCoreError(f"{TUNING_VARIABLE}={value!r} must be 0 (default configurations) or 1 (measure them).")
    return value == "1"


def cache_folder(op: str, device_name: str) -> Path:
    """Where measured configurations of an op for GPUs of this name are kept."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "rewrite_core" / op / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "gpu")


def stored(path: Path, choices: Sequence[Config]) -> tuple[Trial, ...] | None:
    """The trials in a file, if they are of just these `choices`; anything else there counts as nothing."""
    try:
        trials = tuple(
            Trial(type(choices[0])(**trial["config"]), trial["seconds"], trial["reason"])
            for trial in json.loads(path.read_text(encoding="utf-8"))
        )
        fastest(trials)  # which raises where none ran
        return trials if {trial.config for trial in trials} == set(choices) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def ran(trials: Sequence[Trial]) -> bool:
    """Whether any of them did."""
    return any(trial.seconds is not None for trial in trials)


def fastest(trials: Sequence[Trial]) -> Trial:
    """The first of the fastest. Raises ValueError where none ran."""
    seconds = [(trial.seconds, number) for number, trial in enumerate(trials) if trial.seconds is not None]
    return trials[min(seconds)[1]]


def trials_of(path: Path, choices: Sequence[Config], time: Callable[[Config], Trial]) -> tuple[Trial, ...]:
    """The trials in a file, or of all `choices`, which are then put there if any of them ran; () for a single choice.

    Of processes that measure at the same time the first to write wins, for all of them, and where nothing can be
    written nothing is measured: results have the same bits from run to run only under the same configuration.
    """
    if len(choices) == 1:
        return ()
    trials = stored(path, choices)
    if trials is not None:
        return trials
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return ()
    try:
        os.close(handle)
        trials = tuple(time(config) for config in choices)
        return _keep(path, Path(partial), trials, choices) if ran(trials) else trials
    finally:
        Path(partial).unlink(missing_ok=True)


def _keep(path: Path, partial: Path, trials: tuple[Trial, ...], choices: Sequence[Config]) -> tuple[Trial, ...]:
    """Put trials into a file, by way of a `partial` one, if no other process was first: what it holds then."""
    try:
        partial.write_text(
            json.dumps([trial._asdict() | {"config": asdict(trial.config)} for trial in trials]), "utf-8"
        )
        try:
            os.link(partial, path)
        except FileExistsError:
            if stored(path, choices) is None:  # what lies there is of no use
                os.replace(partial, path)
        except OSError:  # no hard links here
            os.replace(partial, path)
    except OSError:
        return ()
    return stored(path, choices) or ()


def timed(config: Config, run: Callable[[Config], object]) -> Trial:
    """Run a piece of work with a configuration again and again on the GPU."""
    try:
        milliseconds = triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources as error:
        return Trial(config, None, f"it does not fit the GPU: {error}")
    except torch.cuda.OutOfMemoryError as error:
        return Trial(config, None, f"the GPU's memory is full: {str(error).splitlines()[0]}")
    finally:
        torch.cuda.empty_cache()  # do_bench's buffer of 256 MB, and the candidate's own, are of no more use
    return Trial(config, milliseconds / 1e3)


_chosen: dict[tuple[int | None, str, str], tuple[Any, tuple[Trial, ...]]] = {}  # so that the disk is read once


def choose(
    device: torch.device, op: str, name: str, choices: Sequence[Config], run: Callable[[Config], object]
) -> Config:
    """Of `choices` the one that is, or was once, fastest on a GPU like this for problems of this name; the first where
    nothing is measured (in the interpreter, and with REWRITE_CORE_TUNING=0).

    run  does a typical piece of the work with a configuration; its results are dropped

    Raises RewriteCoreError for a first call while a CUDA graph is captured.
    """
    if device.type != "cuda":
        return choices[0]
    key = (device.index, op, name)
    if key in _chosen:
        return _chosen[key][0]
    refuse_in_graph(op)
    trials: tuple[Trial, ...] = ()
    if enabled():
        path = cache_folder(op, torch.cuda.get_device_name(device)) / f"{name}.json"
        trials = trials_of(path, choices, lambda config: timed(config, run))
    _chosen[key] = fastest(trials).config if ran(trials) else choices[0], trials
    return _chosen[key][0]


def measured(op: str) -> dict[str, tuple[Trial, ...]]:
    """By class of problems that this process has met: every candidate's trial, measured here or read from the disk.

    () where there was nothing to choose or nothing was measured. Classes of several GPUs count as one.
    """
    return {name: trials for (_, of, name), (_, trials) in _chosen.items() if of == op}
