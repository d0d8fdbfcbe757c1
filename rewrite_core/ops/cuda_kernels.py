"""What the backends "cuda" share: whether the kernels of csrc/*.cu are there for a tensor's GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backends import extension, extension_reason
from ..errors import RewriteCoreError

OLDEST = (8, 0)  # compute capability: what nvcc compiles for, and its tensor cores


@functools.cache
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def index_of(data: Tensor) -> int:
    return torch.cuda.current_device() if data.device.index is None else data.device.index


def missing(data: Tensor, name: str, function: str) -> str | None:
    """None where the extension has the function and the GPU of `data`, which is called `name`, can run it."""
    kind = data.device.type
    if kind != "cuda":  # mostly a CPU; to write a device takes longer than all else here
        return f"it works on GPU tensors, and the {name} is on {kind if kind == 'cpu' else data.device}"
    if extension_reason() is not None:
        return extension_reason()
    if not hasattr(extension(), function):
        return "the extension was built without CUDA C++: where nvcc is, install with REWRITE_CORE_CUDA=1"
    have = capability(index_of(data))
    if have < OLDEST:
        least = ".".join(map(str, OLDEST))
        return f"it needs compute capability {least} or newer, and this GPU has {'.'.join(map(str, have))}"
    return None


_launched: set[tuple] = set()  # by op and all that names a kernel there: what this process has loaded


def first_launch(op: str, *kernel: object) -> None:
    """Called before each launch. Raises RewriteCoreError where it is the first of its kernel, and a CUDA graph is being
    captured: what loads the kernel cannot go into it."""
    if (op, *kernel) in _launched:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RewriteCoreError(
            f"{op} has not yet launched this kernel in this process, and loading it cannot go into a CUDA graph: "
            "call it once before the capture."
        )
    _launched.add((op, *kernel))


def not_run(error: RuntimeError) -> str:
    """Why not, where CUDA refused: a driver older than nvcc's CUDA, which torch's own may still run on."""
    return f"this GPU and its driver do not run what nvcc has built ({error})"
