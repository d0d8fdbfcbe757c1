"""Commands whose work the processes of torchrun share; the first of them says and writes what came."""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .messages import in_options, show_warning


def shared(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A command's `run` that also runs in each process of torchrun, a part of the work in each: where pictures are
    painted by :meth:`.generator.Subject.paint`, and in the steps of :class:`..evaluation.steps.Steps`."""

    def in_each(options: argparse.Namespace) -> None:
        from ..statistics.distributed import everybodys, launched, own_device, together

        if not launched():
            run(options)
            return
        options.device = own_device(options.device)
        with together() as shard:
            options.process = shard
            first = is_first(options)
            options.quiet = options.quiet or not first
            unheard = contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO())
            with unheard, _noted(first) as said:
                run(options)
            every = everybodys(said, shard, "warnings", first_only=True)
            for text in dict.fromkeys(text for words in every for text in words):
                if text not in said:
                    show_warning(text)

    return in_each


@contextlib.contextmanager
def _noted(shown: bool) -> Iterator[list[str]]:
    """The warnings inside, in words; shown too, if asked for."""
    said: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, *rest: Any, **more: Any) -> None:
        said.append(in_options(message, getattr(message, "advice", {})))
        if shown:
            show(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = note
        yield said


def is_first(options: argparse.Namespace) -> bool:
    """Whether this process is the one that says and writes what came: the first of torchrun's, or the only one."""
    shard = getattr(options, "process", None)
    return shard is None or shard.number == 1
