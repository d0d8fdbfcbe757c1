"""The ``rewrite`` command line: runs one command, and ends in one sentence where it cannot."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType

from ..version import __version__
from . import (
    batch,
    bench,
    collect,
    compare,
    demo,
    edit,
    export,
    info,
    init,
    layers,
    make_edit,
    measure,
    merge,
    render,
    scan,
    search,
    studio,
)
from .command import Command, Parser, UsageError, build_parser
from .messages import of_several, problem, say, say_once, show_warning
from .options import check_files
from .settings import fill, read_settings

COMMANDS: tuple[Command, ...] = (
    init.COMMAND,
    demo.COMMAND,
    layers.COMMAND,
    collect.COMMAND,
    merge.COMMAND,
    scan.COMMAND,
    make_edit.COMMAND,
    search.COMMAND,
    edit.COMMAND,
    batch.COMMAND,
    render.COMMAND,
    measure.COMMAND,
    compare.COMMAND,
    export.COMMAND,
    studio.COMMAND,
    bench.COMMAND,
    info.COMMAND,
)


def parser() -> Parser:
    """The parser of ``rewrite``."""
    return build_parser(COMMANDS, __version__)


@contextlib.contextmanager
def _interrupts(ending: bool) -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt; while that is dealt with a second is only answered, and a third ends the
    process at once. So no number of them ends in a traceback, nor does one after the work where the process is
    `ending`."""
    main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += 1
        if pressed == 1:
            raise KeyboardInterrupt
        if pressed == 2:
            os.write(2, b"rewrite: stopping; press Ctrl-C once more to stop at once.\n")
            return
        os._exit(130)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if ending else signal.default_int_handler)


def _flush_output() -> None:
    """Raises OSError where what was printed cannot be written; then nothing is tried again at the interpreter's end."""
    try:
        if sys.stdout is not None:  # it is None where it was closed
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: `arguments`, or those of the process, which ends with it.

    Returns the exit status: 2 after bad input, which is told in one sentence on stderr, and 130 after an interrupt.
    Raises SystemExit where argparse does.
    """
    with _interrupts(ending=arguments is None):
        try:
            options = parser().parse_args(arguments)
        except KeyboardInterrupt:  # the types of some options import torch
            say("rewrite: interrupted.", to=sys.stderr)
            return 130
        return _run(options.command, options)


def _check_processes(command: Command) -> None:
    """Raises UsageError where torchrun has started a command in several processes that would all do the same."""
    if of_several() and not command.processes:
        shared = ", ".join(each.name for each in COMMANDS if each.processes)
        raise UsageError(
            f"rewrite {command.name} does not share its work between torchrun's processes, as {shared} do; run it in "
            "one process."
        )


def _run(command: Command, options: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            _check_processes(command)
            fill(options, read_settings() if command.settings else {})
            check_files(options)
            status = command.run(options) or 0
            _flush_output()
            return status
        except BrokenPipeError:  # the reader (head, less) has seen enough
            with contextlib.suppress(OSError):
                _flush_output()
            return 141
        except KeyboardInterrupt:
            say_once(f"rewrite {command.name}: interrupted{command.interrupted(options)}.")
            return 130
        except Exception as error:
            sentence = problem(error)
            if sentence is None:
                raise
            say_once(f"rewrite {command.name}: {sentence}")
            return 2
