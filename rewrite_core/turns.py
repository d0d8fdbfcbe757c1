"""Whose turn it is: one lock around each generator, and calls of which a newer one replaces the one that waits."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from torch import nn


class GeneratorLock:
    """A lock that one thread may take several times, and that goes to whoever has waited longest: long work that gives
    it up between two steps gets it back after everybody else."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()
        self._owner: int | None = None  # a thread
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                ticket = object()
                self._line.append(ticket)
                try:
                    while self._owner is not None or self._line[0] is not ticket:
                        self._changed.wait()
                    self._owner = me
                finally:
                    self._line.remove(ticket)
                    self._changed.notify_all()
            self._depth += 1

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()


_locks: weakref.WeakKeyDictionary[nn.Module, GeneratorLock] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def generator_lock(generator: nn.Module) -> GeneratorLock:
    """The one lock around a generator, which all sessions of it share."""
    with _making:
        return _locks.setdefault(generator, GeneratorLock())


class Latest:
    """One thread that works through calls; a new call replaces the one that waits, so that dragging never queues up."""

    def __init__(self) -> None:
        self._waiting: tuple[Future, Callable[[], Any]] | None = None
        self._wake = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, daemon=True, name="rewrite_core latest").start()

    def submit(self, call: Callable[[], Any]) -> Future:
        """The result of ``call()``; cancelled where a newer call came before it began."""
        future: Future = Future()
        with self._wake:
            if self._waiting is not None:
                self._waiting[0].cancel()
            self._waiting = future, call
            self._wake.notify()
        return future

    def close(self) -> None:
        """End the thread after the call that runs."""
        with self._wake:
            self._closed = True
            if self._waiting is not None:
                self._waiting[0].cancel()
                self._waiting = None
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._waiting is None and not self._closed:
                    self._wake.wait()
                if self._waiting is None:
                    return
                future, call = self._waiting
                self._waiting = None
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # whoever waits for the result is told
                future.set_exception(error)
