"""The file of a rewrite: its factors, what it was fitted to, and the edit whose masks are tensors of the file."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from ..edits.edit import Edit
from ..edits.masks import png_of, read_png
from ..edits.selection import Selection
from ..errors import FileFormatError, RewriteCoreError
from ..files import load_record, save_record, shown
from .trust import Limited

_VERSION, _OLDER = 2, 1  # in version 1 the edit is JSON text in the metadata


def save_rewrite(
    path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, Any], edit: Edit | None
) -> None:
    """Write it, all or nothing. Numbers that are not finite, which JSON has none for, are left out."""
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    pictures: dict[bytes, int] = {}  # each mask once, as PNG

    def entry(selection: Selection) -> list:
        number = pictures.setdefault(png_of(selection._plane()), len(pictures))
        return [selection.index, f"mask.{number}", *selection._slices]

    record = None if edit is None else edit._to_record(entry)
    tensors |= {f"mask.{n}": torch.frombuffer(bytearray(png), dtype=torch.uint8) for png, n in pictures.items()}
    save_record(path, "rewrite", _VERSION, tensors, metadata | {"edit": record})


def load_rewrite(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any], Edit | None]:
    """What :func:`save_rewrite` wrote, checked: ``directions``, ``coefficients`` and, where something is protected,
    ``protected``; ``layer``, ``fitted_to``,
    ``solver``, ``loss``, ``groups``, ``size`` and ``limited``; and the edit. Files of format version 1 are read, too.

    Raises FileFormatError on a truncated or foreign file, MaskError or SelectionError on a bad edit in it.
    """
    tensors, metadata = load_record(path, "rewrite", _VERSION, _OLDER)
    name = shown(path)
    losses, record = metadata.get("loss", []), metadata.get("edit")
    groups, size = metadata.get("groups", 1), metadata.get("size")  # older files do not say
    limited = metadata.get("limited")
    texts = {field: metadata.get(field) for field in ("layer", "fitted_to", "solver")}
    whole = (
        {"directions", "coefficients"} <= tensors.keys()
        and all(isinstance(text, str) for text in texts.values())
        and isinstance(losses, list)
        and all(_is_number(loss) for loss in losses)
        and (size is None or _is_number(size))
        and (limited is None or _is_limit(limited))
        and type(groups) is int
        and groups >= 1
    )
    if not whole:
        raise FileFormatError(f"{name} is not a whole rewrite; make it again.")
    names = ("directions", "coefficients", "protected")
    factors: dict[str, Tensor] = {str(key): tensors[key] for key in names if key in tensors}
    directions, coefficients, kept = factors["directions"], factors["coefficients"], factors.get("protected")
    if kept is not None and (kept.ndim != 2 or kept.shape[1:] != directions.shape[1:]):
        raise FileFormatError(f"{name} protects keys of another size than it changes; make it again.")
    if directions.ndim != 2 or coefficients.ndim < 2 or coefficients.shape[1] != len(directions):
        raise FileFormatError(f"{name} holds directions and coefficients that do not match; make it again.")
    if not all(part.is_floating_point() and part.isfinite().all() for part in factors.values()):
        raise FileFormatError(f"{name} holds NaN, infinity or no floating-point numbers; make it again.")
    try:
        edit = None if record is None else _read_edit(record, tensors)
    except RewriteCoreError as error:
        raise type(error)(f"{name}: {error}", advice=error.advice) from error
    return (
        factors,
        {**texts, "loss": losses, "groups": groups, "size": size, "limited": limited and Limited(**limited)},
        edit,
    )


def finite(value: float | None) -> float | None:
    """A number for JSON, which has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _is_limit(value: Any) -> bool:
    names = {"size", "preserve", "strength"}
    return (
        isinstance(value, dict)
        and set(value) == names
        and all(_is_number(part) or (name == "preserve" and part is None) for name, part in value.items())
    )


def _read_edit(record: Any, tensors: dict[str, Tensor]) -> Edit:
    if isinstance(record, str):
        return Edit.from_json(record)

    def entry(part: Any, field: str) -> Selection:
        if not (isinstance(part, list) and len(part) in (2, 3) and isinstance(part[1], str) and part[1] in tensors):
            raise FileFormatError(f"{field!r} of the edit should name a mask of this file.")
        index, mask, *slices = part
        if tensors[mask].dtype != torch.uint8:
            raise FileFormatError(f"The mask of {field!r} is no picture.")
        return Selection._of_plane(
            index, read_png(tensors[mask].numpy().tobytes(), f"The mask of {field!r}"), slices, field
        )

    return Edit._from_record(record, entry)
