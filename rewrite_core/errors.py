"""The exceptions and warnings that the library raises on its input. Each message is one sentence that says what to do.

And what makes them: :func:`warn` names the user's line, :func:`silent` keeps it quiet, :func:`heard` collects it;
:func:`whole_number`, :func:`number`, :func:`choice` and :func:`flag` check one argument; :func:`quoted` shows a value
that may come from a file.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import operator
import reprlib
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any


def printable(text: str) -> str:
    """`text` with what a terminal might act on (control characters, but for line ends) written as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write thousands of digits
        return repr(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 60


def quoted(value: object) -> str:
    """``repr`` of a value that may come from a file, cut where it is long."""
    return _SHORT.repr(value)


def argument(name: str, value: object = None) -> str:
    """An argument as messages name it: "force=True", or the bare name where `value` is None."""
    return name if value is None else f"{name}={value!r}"


class RewriteCoreError(ValueError):
    """Base class: bad input to rewrite_core. Messages are printable, whatever they quote.

    `advice` holds the arguments that the message names as the way out, {name: value}, each as :func:`argument` writes
    it: {"force": True} where the message says "force=True". The command line names its options in their place.
    """

    def __init__(self, *args: object, advice: Mapping[str, object] | None = None):
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))
        self.advice = dict(advice or {})


class ArgumentError(RewriteCoreError, TypeError):
    """An argument of a wrong type."""


class BackendUnavailable(RewriteCoreError, RuntimeError):
    """No backend, or not the one asked for, can do this call; the message holds every reason."""


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


class TrustWarning(UserWarning):
    """A fit was so large on ordinary keys that it would have ruined other pictures, and was held back."""


class UnderdeterminedWarning(UserWarning):
    """The fit has at least as many unknowns as pixels, so it meets the goal and may ruin everything else."""


class NoImprovementWarning(UserWarning):
    """A fit changed next to nothing, or ended no better than it began."""


class LatentsWarning(UserWarning):
    """It is not known whether latents are those that an edit was made on, or the same ones were used twice."""


class BatchDependenceWarning(UserWarning):
    """The keys of a latent depend on the other latents of its batch."""


class DiagonalShiftWarning(UserWarning):
    """A matrix was rank-deficient, and the system solved has a small number added to its diagonal."""


_silent: contextvars.ContextVar[tuple[type[Warning], ...]] = contextvars.ContextVar("silent", default=())
_heard: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("heard", default=None)


@contextlib.contextmanager
def silent(category: type[Warning]) -> Iterator[None]:
    """Inside, in this thread alone, :func:`warn` says nothing of this category. (``warnings.catch_warnings`` is the
    process's: two threads in it can leave the filters of one behind.)"""
    token = _silent.set((*_silent.get(), category))
    try:
        yield
    finally:
        _silent.reset(token)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Inside, in this thread alone, what :func:`warn` says goes into this list, once each, and is not shown."""
    said: list[str] = []
    token = _heard.set(said)
    try:
        yield said
    finally:
        _heard.reset(token)


def warn(message: str, category: type[Warning] = UserWarning, *, advice: Mapping[str, object] | None = None) -> None:
    """A warning that names the line outside this package, and outside torch where that came between, that led here.

    `advice` is what RewriteCoreError's is, and an attribute of the warning.
    """
    if issubclass(category, _silent.get()):
        return
    said = _heard.get()
    if said is not None:
        said.extend([] if printable(message) in said else [printable(message)])
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("rewrite_core", "torch"):
        level, frame = level + 1, frame.f_back
    warning = category(printable(message))
    warning.advice = dict(advice or {})  # type: ignore[attr-defined]
    warnings.warn(warning, stacklevel=level)


def _plain(value: Any) -> Any:
    """NumPy's scalars, and arrays and tensors without axes, as Python's own numbers."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def whole_number(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """`value` as an int, NumPy's whole numbers too.

    Raises ArgumentError for anything else, RewriteCoreError for one that is out of range.
    """
    value = _plain(value)
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or not least <= whole <= most:
        raise (ArgumentError if whole is None else RewriteCoreError)(
            f"{name} must be an integer of at least {least}, and at most {most}, not {quoted(value)}."
        )
    return whole


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> float:
    """`value` as a float, NumPy's numbers too, in least..most and greater than `above`.

    Raises ArgumentError for anything else, RewriteCoreError for NaN, infinity and what is out of range.
    """
    value = _plain(value)
    right = isinstance(value, float | int) and not isinstance(value, bool)
    try:
        real = float(value) if right else math.nan
    except OverflowError:
        real = math.inf
    if not (math.isfinite(real) and least <= real <= most and real > above):
        limits = [f"above {above:g}"] if above > -math.inf else []
        limits += [f"at least {least:g}"] if least > -math.inf else []
        limits += [f"at most {most:g}"] if most < math.inf else []
        which = f" {' and '.join(limits)}" if limits else ""
        raise (RewriteCoreError if right else ArgumentError)(f"{name} must be a number{which}, not {quoted(value)}.")
    return real


def flag(name: str, value: object) -> bool:
    """`value`, which is True or False. Raises ArgumentError for anything else, such as the text "no"."""
    value = _plain(value)
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, not {quoted(value)}.")
    return value


def choice(name: str, value: object, options: Collection[str]) -> str:
    """`value`, which is one of `options`.

    Raises ArgumentError for what is no string, RewriteCoreError for another one.
    """
    if not isinstance(value, str) or value not in options:
        raise (RewriteCoreError if isinstance(value, str) else ArgumentError)(
            f"{name} must be {' or '.join(map(repr, options))}, not {quoted(value)}."
        )
    return value
