"""Updates of a collection on a GPU, beside the generator's next forward pass."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .cuda_streams import SideStream, held_elsewhere
from .key_stream import batch_named
from .part import Part
from .sums import Keys, Note


@dataclass(frozen=True)
class _Launched:
    """An update that runs on a GPU: the numbers of its note are there once `mark` has happened."""

    part: Part
    numbers: Tensor
    keys: Keys
    group: int
    first: int
    count: int
    mark: torch.cuda.Event


@dataclass(frozen=True)
class _Kept:
    """What an update reads, and when it has done so: `tensors`, the key map first, of the stream `origin`."""

    tensors: tuple[Tensor, ...]
    side: SideStream
    origin: torch.cuda.Stream
    mark: torch.cuda.Event


class Launches:
    """The updates of a collection on a GPU, which run on a stream of their own beside the next forward pass, and of
    which the host learns afterwards whether they were finite. It does not wait for them, unless it has to save.

    *Memory.* The maps of a pass's last layer are kept until the next pass has come as far, and its stream then waits
    for their update: so there is one of them beside the pass's own, however far the host is ahead. (``record_stream``
    would let it run ahead of what can be used again, and allocate more and more.) Into the maps of earlier layers, and
    into any that it holds on to, the generator may write: its stream waits for these before it goes on.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._launched: deque[_Launched] = deque()
        self._kept: _Kept | None = None

    def __enter__(self) -> Launches:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.release()
        if isinstance(error, Exception):  # which an earlier batch may have to do with
            self.wait()

    def launch(
        self,
        side: SideStream,
        part: Part,
        features: tuple[Tensor, Tensor | None],
        latents: tuple[int, int],
        skip_nonfinite: bool,
        last: bool,
    ) -> None:
        """Update `part` with the key maps, and the positions that count, of so many latents from one on.

        `last`: the pass ends with them.
        """
        self.release()
        first, count = latents
        origin = side.current()
        with side.after(origin):
            numbers, keys, group = part.launch(*features, count, skip_nonfinite)
            numbers = side.fetch(numbers)
        mark = side.mark()
        self._launched.append(_Launched(part, numbers, keys, group, first, count, mark))
        read = tuple(each.detach() for each in features if each is not None)  # without what they are views of
        self._kept = _Kept(read, side, origin, mark)
        if not last:
            self.release()

    def passed(self) -> None:
        """To be called after each pass."""
        if self._kept is not None and held_elsewhere(self._kept.tensors[0]):
            self.release()
        while self._launched and self._launched[0].mark.query():
            self._settle()

    def release(self) -> None:
        """Let go of the maps that are kept, whose memory is written to after their update only."""
        if self._kept is not None:
            kept = self._kept
            kept.side.hold(kept.origin, kept.mark)
            kept.side.hold(kept.side.current(), kept.mark)
            self._kept = None

    def wait(self) -> None:
        """Wait for all updates. Raises NonFiniteError for the first that was not finite."""
        while self._launched:
            self._launched[0].mark.synchronize()
            self._settle()

    def _settle(self) -> None:
        one = self._launched.popleft()
        try:
            with batch_named(one.part.layer, one.first, one.count, self._batch_size):
                one.part.settle(Note.read(one.numbers), one.keys, one.group)
        except NonFiniteError:
            self._launched.clear()  # nobody asks for them any more
            raise
