"""Where tensors lie: which of them share memory, whatever objects they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**22  # numbers of a tensor that is worked on as a whole, in float64: 32 MiB


def storage_of(tensor: Tensor) -> int | None:
    """A number that tensors have in common where they are views of one storage; None where it is not known (meta,
    sparse, sharded tensors)."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, AttributeError):  # tensors of other libraries
        return None


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same memory, at least in part: the same numbers, views, transposed or
    ``.data``."""
    storage = storage_of(one)
    if storage is None or storage != storage_of(other):
        return False
    (start, end), (begin, stop) = _range(one), _range(other)
    return start < stop and begin < end


def _range(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after the last."""
    steps = sum((size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + steps + 1) * tensor.element_size()


def blocks(tensor: Tensor, most: int = BLOCK) -> Iterator[slice]:
    """Slices of the first axis: what is computed of a large weight in another precision needs no whole copy then. One
    slice where the tensor has `most` numbers or fewer; else of a quarter as many each, or as many as a row has."""
    rows, numbers = len(tensor), max(1, tensor.numel())
    step = rows if numbers <= most else max(1, most // 4 * rows // numbers)
    for start in range(0, rows, max(1, step)):
        yield slice(start, start + step)
