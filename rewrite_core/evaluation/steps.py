"""What long work does between its steps: it takes turns at the generator, tells how far it is, can be ended, and is
shared by several processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from typing import TypeVar

from ..progress import progress_bar
from ..statistics.distributed import everybodys, own_part
from ..statistics.shards import Shard

Item = TypeVar("Item")


class Cancelled(Exception):
    """The work was ended between two steps; whoever asked for it answers."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """progress: show bars. told: called as ``told(stage, done, total)``. cancelled: asked before each step. turn: a
    context in which the generator may be run; other threads have theirs between two steps. shard: this process's part
    of the work, where those of torchrun share it."""

    progress: bool = False
    told: Callable[[str, int, int], object] | None = None
    cancelled: Callable[[], bool] | None = None
    turn: Callable[[], AbstractContextManager] = contextlib.nullcontext
    shard: Shard | None = None

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

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of the items that this process works on: a stretch of them, or all where it is alone."""
        return items if self.shard is None else items[own_part(len(items), self.shard)]

    def all(self, own: Sequence[Item], stage: str, first_only: bool = False) -> list[Item]:
        """What all processes made of their :meth:`own` items, in the order of the items; on the CPU what is of others.

        first_only: the first process gets all of it, the others what they made: for what is large. Raises MismatchError
        where the processes are not at the same stage.
        """
        if self.shard is None:
            return list(own)
        return [each for part in everybodys(list(own), self.shard, stage, first_only) for each in part]


PLAIN = Steps()
"""No bars, nobody told, never ended."""
