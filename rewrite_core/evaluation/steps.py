"""What long work does between its steps: it takes turns at the generator, tells how far it is, and can be ended."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from typing import TypeVar

from ..progress import progress_bar

Item = TypeVar("Item")


class Cancelled(Exception):
    """The work was ended between two steps; whoever asked for it answers."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """progress: show bars. told: called as ``told(stage, done, total)``. cancelled: asked before each step. turn: a
    context in which the generator may be run; other threads have theirs between two steps."""

    progress: bool = False
    told: Callable[[str, int, int], object] | None = None
    cancelled: Callable[[], bool] | None = None
    turn: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def check(self) -> None:
        """Raises Cancelled where the work is to end."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled

    def over(self, items: Iterable[Item], stage: str, total: int | None = None) -> Iterator[Item]:
        """The items, one after the other. `total`: how many there are, where they have no length."""
        whole = total if total is not None else len(items) if isinstance(items, Sized) else 0
        with progress_bar(total=whole, label=stage, unit="step", show=self.progress) as bar:
            for done, item in enumerate(items):
                self.check()
                if self.told is not None:
                    self.told(stage, done, whole)
                yield item
                bar.update(1)
        if self.told is not None:
            self.told(stage, whole, whole)


PLAIN = Steps()
"""No bars, nobody told, never ended."""
