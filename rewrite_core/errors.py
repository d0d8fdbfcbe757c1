"""The exceptions and warnings that the library raises on its input, but for ``ops.DiagonalShiftWarning`` and
``BackendUnavailable``. Each message is one sentence that says what to do.

And two helpers: :func:`warn`, which names the user's line, and :func:`whole_number`, which checks one."""

from __future__ import annotations

import operator
import sys
import warnings


class RewriteCoreError(ValueError):
    """Base class: bad input to rewrite_core."""


class UnknownLayerError(RewriteCoreError, LookupError):
    """The generator has no layer of that name, or none of a kind that can be bound."""


class MaskError(RewriteCoreError):
    """A mask is empty or of the wrong type or shape."""


class SelectionError(RewriteCoreError, IndexError):
    """A selection points at a latent that does not exist, or an edit lacks a selection."""


class MismatchError(RewriteCoreError):
    """A second moment or rewrite belongs to another layer, model or set of latents."""


class NonFiniteError(RewriteCoreError):
    """NaN or infinity in activations, keys or weights."""


class RankError(RewriteCoreError):
    """The rank is below one or above what the layer or the context allows."""


class FileFormatError(RewriteCoreError):
    """A file is truncated, foreign, or of a version this library does not read."""


class SolverError(RewriteCoreError):
    """The solver asked for cannot solve this layer's problem."""


class UnderdeterminedWarning(UserWarning):
    """The fit has at least as many unknowns as pixels, so it meets the goal and may ruin everything else."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that names the line outside this package, and outside torch where that came between, that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("rewrite_core", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def whole_number(name: str, value: object, least: int = 1, most: int = 2**31 - 1) -> int:
    """`value` as an int, numpy's whole numbers too; raises RewriteCoreError for anything else or out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise RewriteCoreError(f"{name} must be an integer of at least {least}, and at most {most}, not {value!r}.")
    return number
