"""The file that a second moment is kept in, and the reference implementation's: what is in them is checked here."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, FileFormatError
from ..files import is_zip, open_file, plain, read_arrays, record_of, save_record, shown
from ..layers.latents import LatentRecipe
from . import blocks
from .shards import are_shard_facts

WHOLE, BLOCKS = 1, 2  # versions of the format: of one sum [C, C], and of blocks [G, C/G, C/G]


@dataclass
class Stored:
    """What a file holds; ``progress`` and ``state`` (of the errors of its keys) are empty but in a checkpoint."""

    sum: Tensor
    count: int
    skipped: int = 0
    layer: str | None = None
    fingerprint: str | None = None
    latents: dict[str, Any] = field(default_factory=dict)
    updates: int = 0
    spread: float = math.nan
    wide: bool = False
    key_errors: list[float] | None = None
    progress: dict[str, int] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def write(path: str | os.PathLike, total: Tensor, facts: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write a sum, float64 [C, C] or [G, C/G, C/G], with the other fields of :class:`Stored`.

    Raises ArgumentError for a record of latents that :func:`read` would refuse.
    """
    if not _are_latents(plain(facts["latents"], "latents")):
        raise ArgumentError(
            "A second moment's `latents` holds something of another type than collect_second_moment puts there: give "
            "`count` and `used` as whole numbers, `fingerprint` and `mask` as text."
        )
    version = WHOLE if total.ndim == 2 else BLOCKS
    save_record(path, "second_moment", version, {"sum": total.cpu(), **state}, facts)


def read(path: str | os.PathLike) -> Stored:
    """Read what :func:`write` wrote, the reference implementation's r2m.npz, or ROME's statistics, told apart by their
    content.

    Raises FileFormatError for anything else.
    """
    with open_file(path) as file:
        if is_zip(file):
            return _stored_by_others(read_arrays(file, path), shown(path))
        tensors, metadata = record_of(file, path, "second_moment", WHOLE, BLOCKS)
    return _stored(tensors, metadata, shown(path))


def _stored(tensors: dict[str, Tensor], metadata: dict[str, Any], name: str) -> Stored:
    """What a file holds, checked. Fields that earlier versions did not write have their defaults."""
    total = tensors.pop("sum", None)
    if total is None or total.dtype != torch.float64 or not _are_blocks(total.shape):
        raise FileFormatError(f"{name} holds no float64 [C, C] tensor 'sum', nor blocks of one, [G, C/G, C/G].")
    counts = [metadata.get("count"), metadata.get("skipped", 0), metadata.get("groups", 0)]  # of updates
    if not all(map(_is_count, counts)) or not torch.isfinite(total).all() or bool((blocks.diagonal(total) < 0).any()):
        raise FileFormatError(f"{name} holds no finite sum with its counts.")
    texts = [metadata.get("layer"), metadata.get("fingerprint")]
    latents, progress = metadata.get("latents") or {}, metadata.get("progress") or {}
    spread, errors, wide = metadata.get("spread"), metadata.get("key_errors"), metadata.get("wide", False)
    if not (
        all(isinstance(text, str | None) for text in texts)
        and (spread is None or _is_size(spread))
        and isinstance(wide, bool)
        and (errors is None or (isinstance(errors, list) and all(map(_is_size, errors))))
        and _are_latents(latents)
        and _is_progress(progress)
    ):
        raise FileFormatError(f"{name} has metadata of the wrong types.")
    spread = math.nan if spread is None else float(spread)
    count, skipped, updates = counts
    layer, fingerprint = texts
    return Stored(total, count, skipped, layer, fingerprint, latents, updates, spread, wide, errors, progress, tensors)


def _are_blocks(shape: torch.Size) -> bool:
    several = len(shape) == 2 or (len(shape) == 3 and shape[0] > 1)
    return several and 0 < shape[-1] == shape[-2]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _are_latents(record: object, merged: bool = False) -> bool:
    """Whether a record of latents has what the library reads of it in the right types; users may add to it."""
    if not isinstance(record, dict):
        return False
    if "merged" in record:
        sets = record["merged"]
        return not merged and isinstance(sets, list) and all(_are_latents(each, merged=True) for each in sets)
    shard = record.get("shard")
    if shard is not None and not (are_shard_facts(shard) and _are_latents(shard["latents"], merged=True)):
        return False
    if record.get("recipe") is not None:
        LatentRecipe.from_dict(record["recipe"])  # raises FileFormatError
    return all(record.get(key) is None or _is_count(record[key]) for key in ("count", "used")) and all(
        isinstance(record.get(key), str | None) for key in ("fingerprint", "mask")
    )


def _is_progress(record: object) -> bool:
    if not isinstance(record, dict) or not record:
        return record == {}
    return record.keys() == {"done", "batch_size"} and all(map(_is_count, record.values())) and record["batch_size"] > 0


def _stored_by_others(arrays: dict[str, np.ndarray], name: str) -> Stored:
    """What the reference's r2m.npz holds ("mom2" and "count"), or the statistics that ROME, MEMIT and EasyEdit keep in
    one file beside others ("mom2.mom2" and "mom2.count"). Neither says of what layer."""
    prefixes = [key.removesuffix("mom2") for key in arrays if key == "mom2" or key.endswith(".mom2")]
    if len(prefixes) > 1:
        raise FileFormatError(f"{name} holds several second moments ({', '.join(prefixes)}); save the one alone.")
    prefix = prefixes[0] if prefixes else ""
    total, count = arrays.get(f"{prefix}mom2"), arrays.get(f"{prefix}count")
    if total is None or count is None or total.dtype.kind not in "fiu" or count.dtype.kind not in "fiu":
        raise FileFormatError(
            f"{name} is neither the reference's r2m.npz nor statistics of ROME's: it lacks the numbers 'mom2' and "
            "'count', or 'mom2.mom2' and 'mom2.count'."
        )
    if total.ndim != 2 or not 0 < len(total) == total.shape[1] or not np.isfinite(total).all():
        raise FileFormatError(f"{name} does not hold a finite [C, C] 'mom2' as the reference's r2m.npz does.")
    if count.size != 1 or not np.isfinite(count).all() or not 1 <= count.item() < 2**63 or count.item() % 1:
        raise FileFormatError(f"{name} does not hold the 'count' of its keys as the reference's r2m.npz does.")
    if (total.diagonal() < 0).any():
        raise FileFormatError(f"{name} holds a 'mom2' with negative squares; it is damaged, or a covariance.")
    symmetric = torch.from_numpy(total.astype(np.float64))
    symmetric += symmetric.T.clone()  # a float32 sum's triangles differ
    return Stored(symmetric.mul_(0.5), int(count.item()))
