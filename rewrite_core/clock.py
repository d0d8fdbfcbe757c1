"""Where the time goes: stages of one piece of work, noted in the clock that runs in this thread."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator


class Clock:
    """Wall time by stage; a stage within a stage counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # what the open stage spent in others

    @contextlib.contextmanager
    def running(self) -> Iterator[Clock]:
        """Inside, and in this thread, :func:`stage` notes time here."""
        token = _running.set(self)
        try:
            yield self
        finally:
            _running.reset(token)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner
            self._inner = outer + took


_running: contextvars.ContextVar[Clock | None] = contextvars.ContextVar("running", default=None)


def stage(name: str) -> contextlib.AbstractContextManager[None]:
    """A context whose time is that stage's, in the clock that runs; nothing where none does."""
    clock = _running.get()
    return contextlib.nullcontext() if clock is None else clock._stage(name)
