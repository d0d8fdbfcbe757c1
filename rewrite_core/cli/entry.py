"""The ``rewrite`` command line: runs one command, and ends in one sentence where it cannot."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..version import __version__
from . import bench, collect, demo, edit, export, info, init, layers, measure, render, search, studio
from .command import Command, Parser, build_parser
from .messages import problem, say, show_warning
from .options import check_files
from .settings import fill, read_settings

COMMANDS: tuple[Command, ...] = (
    init.COMMAND,
    demo.COMMAND,
    layers.COMMAND,
    collect.COMMAND,
    search.COMMAND,
    edit.COMMAND,
    render.COMMAND,
    measure.COMMAND,
    export.COMMAND,
    studio.COMMAND,
    bench.COMMAND,
    info.COMMAND,
)


def parser() -> Parser:
    """The parser of ``rewrite``."""
    return build_parser(COMMANDS, __version__)


@contextmanager
def _interrupts() -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt; while that is dealt with a second is only answered, and a third ends the
    process at once. So no number of them ends in a traceback."""
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
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _close_output() -> None:
    """Nothing more can be written to stdout, at the interpreter's end either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Bad input ends with one sentence on stderr and exit status 2; an interrupt with 130."""
    options = parser().parse_args(arguments)
    command: Command = options.command
    with _interrupts(), warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            fill(options, read_settings() if command.settings else {})
            check_files(options)
            status = command.run(options) or 0
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # the reader (head, less) has seen enough
            _close_output()
            return 141
        except KeyboardInterrupt:
            say(f"rewrite {command.name}: interrupted{command.interrupted(options)}.", to=sys.stderr)
            return 130
        except Exception as error:
            sentence = problem(error)
            if sentence is None:
                raise
            say(f"rewrite {command.name}: {sentence}", to=sys.stderr)
            return 2
