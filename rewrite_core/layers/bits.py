"""The bits of tensors, as fingerprints take them: a GPU's are copied many at a time, or summed up where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import triton_reason
from ..waits import bits_of, on_gpu

TOGETHER = 1 << 26  # bytes of a GPU's tensors that are copied at a time


def fetched(tensor: Tensor) -> np.ndarray:
    """On the host. Of a GPU's tensor the host waits for it."""
    found: np.ndarray = tensor.cpu().numpy()
    return found


def bits_on_host(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """The bits of each tensor, in their order; of a GPU with as few copies as there are times TOGETHER in them."""
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        apart = waiting and (size + own > TOGETHER or tensor.device != waiting[0].device)
        if waiting and (apart or not on_gpu(tensor)):
            yield from _together(waiting)
            waiting, size = [], 0
        if on_gpu(tensor):
            waiting.append(tensor)
            size += own
        else:
            yield fetched(bits_of(tensor))
    if waiting:
        yield from _together(waiting)


def _together(tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    parts = [bits_of(tensor) for tensor in tensors]
    whole = fetched(torch.cat(parts) if len(parts) > 1 else parts[0])
    ends = np.cumsum([len(part) for part in parts])
    yield from np.split(whole, ends[:-1])


def summed(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """What all the bits of a GPU's tensors come to, found there and left there, a tensor for each GPU: nothing is
    waited for. None without Triton."""
    if triton_reason() is not None:
        return None
    from ..kernels.checksum import checksums

    devices: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(_words(tensor))
    return [checksums(words) for words in devices.values()]


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor in whole words of 4 bytes, at an address that is a multiple of 4."""
    bits = bits_of(tensor)
    if len(bits) % 4 or bits.data_ptr() % 4:
        bits = torch.nn.functional.pad(bits.clone(), (0, -len(bits) % 4))
    return bits
