"""A second stream of a GPU, for work that the next forward pass need not wait for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, cuda


class SideStream:
    """Takes work off the stream that the generator runs on, whatever that is at the time.

    The host waits for nothing here. What the work reads must stay as it is until
    :meth:`hold` has made the stream it came from wait for a mark that was set after the work; what the work allocates
    belongs to this stream, and is to be used and dropped inside :meth:`after` alone.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = cuda.Stream(device)

    def current(self) -> cuda.Stream:
        """The stream that the caller's own kernels go to."""
        return cuda.current_stream(self.device)

    @contextlib.contextmanager
    def after(self, origin: cuda.Stream) -> Iterator[None]:
        """Inside, kernels go to this stream, and run once `origin` is through with all that it has been given."""
        self._stream.wait_event(origin.record_event())
        with cuda.stream(self._stream):
            yield

    def mark(self) -> cuda.Event:
        """An event that happens when all that this stream has been given is done."""
        return self._stream.record_event()

    def hold(self, origin: cuda.Stream, mark: cuda.Event) -> None:
        """What `origin` is given from here on runs after `mark`."""
        origin.wait_event(mark)

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy on the host, which is there when the next mark has happened."""
        copy = pinned(tensor)
        copy.copy_(tensor, non_blocking=True)
        return copy


def pinned(tensor: Tensor) -> Tensor:
    """Memory on the host that the GPU can write to by itself, as large as `tensor`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)


@functools.lru_cache(maxsize=64)
def side_stream(device: torch.device) -> SideStream | None:
    """The side stream of a GPU, the same one every time; None for what has no streams."""
    return SideStream(device) if device.type == "cuda" else None


def held_elsewhere(tensor: Tensor) -> bool:
    """Whether others than `tensor`, which must not be a view, have its memory, and may write to it."""
    count = getattr(torch._C, "_storage_Use_Count", None)  # what PyTorch's own CUDA graphs go by; not public
    if count is None:
        return True
    alone = torch.empty(1, device="cpu")
    return count(tensor.untyped_storage()._cdata) > count(alone.untyped_storage()._cdata)
