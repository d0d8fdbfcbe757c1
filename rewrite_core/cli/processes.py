"""Commands whose pictures the processes of torchrun paint together; the first of them says and writes what came."""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable

from .command import UsageError


def painting_together(run: Callable[[argparse.Namespace], None], but_for: str = "") -> Callable[..., None]:
    """A command's `run` that also runs in each process of torchrun, where :meth:`.generator.Subject.paint` shares the
    work. `but_for` names an option with which it cannot."""

    def shared(options: argparse.Namespace) -> None:
        from ..statistics.distributed import launched, own_device, together

        if not launched():
            run(options)
            return
        if but_for and getattr(options, but_for) is not None:
            raise UsageError(f"With --{but_for} the work is not shared between torchrun's processes; run one process.")
        options.device = own_device(options.device)
        with together() as shard:
            options.process = shard
            if shard.number == 1:
                run(options)
                return
            options.quiet = True
            with contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # the first says it
                run(options)

    return shared


def is_first(options: argparse.Namespace) -> bool:
    """Whether this process is the one that writes files."""
    shard = getattr(options, "process", None)
    return shard is None or shard.number == 1
