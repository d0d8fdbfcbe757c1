"""Which implementation of an op runs, and why not the others.

Each op's ``rewrite_core/ops/<op>_op/register.py`` declares two things this file reads:

``BACKENDS``         a tuple of :class:`Backend` records (any order; ``ORDER`` decides)
``example(device)``  a tuple of small valid arguments on that device, for :func:`explain`

and calls what ``select(op, backend, *args).load()`` returns. Nothing is imported, compiled or probed
until an op is first called.
"""

from __future__ import annotations

import functools
import html
import importlib
import importlib.metadata
import importlib.util
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from .errors import ArgumentError, BackendUnavailable, RewriteCoreError, quoted
from .version import no_kernels

OPS = ("second_moment", "spd_solve", "fit_low_rank", "fit_projected")
ORDER = ("cuda", "triton", "cpp", "reference")  # what "auto" tries, best first
ENVIRONMENT_VARIABLE = "REWRITE_CORE_BACKEND"


Reason = Callable[..., "str | None"]


def _never(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    ``target``    "module:attribute", imported when first used
    ``supports``  called with the op's arguments: None, or the reason why this backend cannot run them
    ``declines``  called likewise: None, or why "auto" passes it over although it could run
                  (``backend=`` by name still runs it)
    """

    op: str
    name: str
    target: str
    supports: Reason = _never
    declines: Reason = _never

    def load(self) -> Any:
        """The implementation itself; its module is imported here and not before."""
        return _load(self.target)


@functools.cache
def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _registration(op: str) -> ModuleType:
    return importlib.import_module(f"rewrite_core.ops.{op}_op.register")


@functools.cache
def backends_of(op: str) -> tuple[Backend, ...]:
    """The op's backends in the order "auto" tries them."""
    if op not in OPS:
        raise RewriteCoreError(f"there is no op {op!r}: the ops are {', '.join(OPS)}.")
    records = _registration(op).BACKENDS
    return tuple(sorted(records, key=lambda record: ORDER.index(record.name)))


def select(op: str, backend: str, *args: Any, **kwargs: Any) -> Backend:
    """The backend that will run ``op(*args, **kwargs)``.

    ``backend`` is "auto" (the first of ``ORDER`` that supports the arguments; the environment variable
    REWRITE_CORE_BACKEND replaces "auto") or a name, which is used or refused, never replaced.
    """
    asked, source = backend, "backend="
    if backend == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        asked, source = os.environ[ENVIRONMENT_VARIABLE], f"the environment variable {ENVIRONMENT_VARIABLE}="
    if not isinstance(asked, str) or asked not in ("auto", *ORDER):
        have = ", ".join(record.name for record in backends_of(op))
        raise (RewriteCoreError if isinstance(asked, str) else ArgumentError)(
            f"{source}{quoted(asked)} is no backend: use auto, {have}."
        )
    reasons = []
    for record in backends_of(op):
        if asked not in ("auto", record.name):
            continue
        reason = record.supports(*args, **kwargs)
        if reason is None and asked == "auto":
            reason = record.declines(*args, **kwargs)
        if reason is None:
            return record
        reasons.append(f"{record.name}: {reason}")
    if asked == "auto":
        raise BackendUnavailable(f"no backend of {op} can run this call ({'; '.join(reasons)}).")
    if not reasons:
        have = ", ".join(record.name for record in backends_of(op))
        raise BackendUnavailable(f"{source}{asked!r}: {op} has no such backend; it has {have}.")
    raise BackendUnavailable(
        f'{source}{asked!r} cannot run this call of {op} ({"; ".join(reasons)}); backend="auto" picks one that can.'
    )


def dispatched(*tensors: Tensor) -> bool:
    """Whether torch is to see a call with these tensors as an operator of its own.

    So while it compiles, traces or transforms (``torch.func``), and for tensors of other kinds or without numbers.
    Elsewhere its dispatcher would only cost a small call a few percent.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.is_meta:
            return True
    return watched()


def watched() -> bool:
    """Whether torch compiles, traces, transforms or watches what is called now."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
    )


def transformed() -> bool:
    """Whether ``torch.func`` (vmap, grad, jvp) transforms the caller, whose tensors' numbers cannot be looked at."""
    return not is_compiling() and peek_interpreter_stack() is not None


_PROXY, _FAKE, _FUNCTIONAL = (getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FAKE", "FUNCTIONAL"))


def recorded() -> bool:
    """Whether a call is recorded (``torch.jit.trace``, ``make_fx``, fake tensors) or transformed (``torch.func``). What
    reads and writes memory itself, and is no operator of torch, would then give numbers that nobody computed."""
    if is_compiling():
        return False  # such a call is not recorded, but made when the graph runs
    if _get_tracing_state() is not None or peek_interpreter_stack() is not None:
        return True
    if not torch._C._len_torch_dispatch_stack():  # counts these three, too
        return False
    mode = torch._C._get_dispatch_mode
    return mode(_PROXY) is not None or mode(_FAKE) is not None or mode(_FUNCTIONAL) is not None


def _passed_over(chosen: str) -> str:
    if chosen == "none":
        return f"{ENVIRONMENT_VARIABLE}={os.environ[ENVIRONMENT_VARIABLE]} asks for another"
    return f"{chosen} comes first"


@functools.cache
def _probe_extension() -> tuple[ModuleType | None, str | None]:
    # torch is imported above: it comes first, so that the extension finds torch's C++ runtime loaded.
    try:
        module = importlib.import_module("rewrite_core._C")
        module.know_tensors(Tensor, torch.empty_like)
        return module, None
    except ModuleNotFoundError as error:
        if error.name != "rewrite_core._C":
            raise
        missing = no_kernels()
        if missing:
            return None, f"there are no C++ kernels here: {missing}"
        return (
            None,
            "the C++ extension rewrite_core._C is not built: run `pip install .` (in a checkout, `pip install -e .`)",
        )
    except ImportError as error:  # built, but broken: its own words say why
        return None, f"the C++ extension rewrite_core._C is there but does not load: {error}"


def extension() -> ModuleType:
    """The compiled extension ``rewrite_core._C``; raises with the reason where there is none."""
    module, reason = _probe_extension()
    if module is None:
        raise BackendUnavailable(f"{reason}.")
    return module


def extension_if_any() -> ModuleType | None:
    """The same, or None."""
    return _probe_extension()[0]


def extension_at_once(own: Backend, kernels: object, backend: str) -> ModuleType | None:
    """The extension, where it may make a call that asks for `backend` at once if it finds nothing unusual in it.

    A small call takes less time than its checks in Python do. So the extension looks at its tensors (they must be plain
    ones on the CPU) and this at the rest, as little as it can: that the "cpp" backend, `own`, would run it, with the
    `kernels` it came with, and that torch does not watch. None where not: the checks in full then say why, or do it.
    """
    if watched() or (backend != "cpp" and (backend != "auto" or os.environ.get(ENVIRONMENT_VARIABLE))):
        return None
    return extension_if_any() if own.load() is kernels else None


def extension_reason() -> str | None:
    """None where the compiled extension loads, else why it does not."""
    return _probe_extension()[1]


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """(3, 9) for 3.9.0; None where Triton is missing, or came with no name that says it."""
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if found is None else (int(found[1]), int(found[2]))


def triton_reason(least: tuple[int, int] = (0, 0)) -> str | None:
    """None where Triton, in version `least` or newer, and this package's kernels can be imported, else why not."""
    version = triton_version()
    if version is not None and version < least:
        return (
            f"it needs Triton {'.'.join(map(str, least))} or newer, and {'.'.join(map(str, version))} is installed: "
            "Triton comes with torch, so use a newer torch"
        )
    return _triton_missing()


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: run `pip install triton`"
    if importlib.util.find_spec("rewrite_core.kernels") is None:
        return "rewrite_core.kernels is not installed (kernels/ is linked to from rewrite_core/): run `pip install .`"
    return None


TRITON_CAPABILITY = (8, 0)  # of the oldest GPUs that Triton supports


def triton_declines(device: torch.device) -> str | None:
    """None where Triton's kernels are fast on this device, else why "auto" passes them over."""
    if device.type != "cuda":
        return "Triton's interpreter is for finding mistakes, not for speed"
    capability = _capability(device)
    if capability < TRITON_CAPABILITY:
        have, least = (".".join(map(str, part)) for part in (capability, TRITON_CAPABILITY))
        return (
            f"this GPU has compute capability {have}, and Triton is made for {least} and newer: below, kernels spill "
            "up to kilobytes of registers"
        )
    return None


# GPUs with few units for float64 (consumer cards, laptops, B300): a 32nd of the rate of float32 or less.
SLOW_FLOAT64 = ((7, 5), (8, 6), (8, 7), (8, 9), (10, 3), (12, 0), (12, 1))
FLOAT64_OPS = ("spd_solve", "fit_low_rank")  # that compute in float64, by whatever backend


def float64_note(op: str, device: torch.device) -> str | None:
    """What to know of an op that computes in float64 on a GPU that is slow in it; None elsewhere.

    "auto" passes no kernel over for that: every other backend there computes in float64, too, and takes some thirty
    launches a step, or copies, besides.
    """
    if device.type != "cuda" or op not in FLOAT64_OPS or _capability(device) not in SLOW_FLOAT64:
        return None
    return (
        f"this GPU (compute capability {'.'.join(map(str, _capability(device)))}) has few float64 units, and every "
        f"backend of {op} computes in float64: large fits may be done sooner with the generator on the CPU"
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def triton_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one program after the other (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@dataclass(frozen=True)
class Choice:
    """What "auto" picks for one op on one device, and why not each of the others."""

    op: str
    device: str
    backend: str
    reasons: tuple[tuple[str, str], ...]  # (backend, why not), best backend first
    note: str | None = None  # what to know of the op there


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``str()`` of it is a table, and a notebook shows one."""

    choices: tuple[Choice, ...]
    extension: str
    override: str | None

    def __str__(self) -> str:
        rows = [("op", "device", "backend", "why not the others")]
        for choice in self.choices:
            lines = []
            for name, reason in choice.reasons:
                lines += textwrap.wrap(f"{name}: {reason}", 72, subsequent_indent="  ")
            if choice.note:
                lines += textwrap.wrap(f"note: {choice.note}", 72, subsequent_indent="  ")
            first, *rest = lines or ["-"]
            rows.append((choice.op, choice.device, choice.backend, first))
            rows += [("", "", "", line) for line in rest]
        op, device, backend = (max(len(row[i]) for row in rows) for i in range(3))
        table = [f"{row[0]:{op}}  {row[1]:{device}}  {row[2]:{backend}}  {row[3]}" for row in rows]
        table.insert(1, "-" * max(map(len, table)))
        table.append(f"extension: {self.extension}")
        if self.override:
            table.append(f'{ENVIRONMENT_VARIABLE}={self.override} replaces "auto"')
        return "\n".join(table)

    def _repr_html_(self) -> str:
        """What a notebook shows: the same table."""
        rows = []
        for choice in self.choices:
            told = [*choice.reasons, *([("note", choice.note)] if choice.note else [])]
            reasons = "<br>".join(f"<b>{html.escape(name)}</b>: {html.escape(why)}" for name, why in told)
            cells = [*map(html.escape, (choice.op, choice.device, choice.backend)), reasons or "-"]
            rows.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
        head = "".join(
            f'<th style="text-align:left">{name}</th>' for name in ("op", "device", "backend", "why not the others")
        )
        notes = [f"extension: {self.extension}"]
        notes += [f'{ENVIRONMENT_VARIABLE}={self.override} replaces "auto"'] if self.override else []
        below = "<br>".join(map(html.escape, notes))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table><p>{below}</p>"


def explain() -> Explanation:
    """Which backend each op would use here for a small example on each device, and why not the others.

    ``print(rc.explain())`` shows a table. The reasons come from the same ``supports`` functions that
    choose in earnest, so the table cannot disagree with what runs.
    """
    choices = []
    for op in OPS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            args = _registration(op).example(device)
            try:
                chosen = select(op, "auto", *args).name
            except BackendUnavailable:  # REWRITE_CORE_BACKEND names one that cannot: the reasons follow
                chosen = "none"
            reasons = []
            for record in backends_of(op):
                if record.name != chosen:
                    reason = record.supports(*args) or record.declines(*args)
                    reasons.append((record.name, reason or _passed_over(chosen)))
            note = float64_note(op, torch.device(device))
            choices.append(Choice(op, device, chosen, tuple(reasons), note))
    module, reason = _probe_extension()
    built = f"{module.__file__} ({module.isa()})" if module is not None else str(reason)
    return Explanation(tuple(choices), built, os.environ.get(ENVIRONMENT_VARIABLE))
