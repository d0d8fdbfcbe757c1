"""Launches of Triton kernels, and what of them a CUDA graph cannot take in: a compilation.

Triton compiles a kernel again for pointers that are not aligned, for sizes that are 1 or no multiple of 16, and for
numbers that int32 does not hold. A call with 100 channels may so need what a call with 96 has not compiled. Inside a
capture that is refused here in a sentence; without, it would end in an error of CUDA's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..backends import triton_interpreted
from ..errors import RewriteCoreError

_launched: set[tuple] = set()  # what has been compiled and loaded in this process


def refuse_in_graph(op: str) -> None:
    """Raise RewriteCoreError where a CUDA graph is being captured: what `op` is about to do cannot go into it."""
    if torch.cuda.is_current_stream_capturing():
        raise RewriteCoreError(
            f"{op} has not yet run on data of such a type, size and layout in this process, and what its first call "
            "compiles and measures cannot go into a CUDA graph: call it once before the capture."
        )


def launch_kernel(
    op: str, kernel: Any, programs: tuple[int, ...], *arguments: Tensor | float | None, **constants: Any
) -> None:
    """kernel[programs](*arguments, **constants), on the current stream. The first argument is a tensor.

    Raises RewriteCoreError where a CUDA graph is being captured and nothing compiled serves this launch.
    """
    if triton_interpreted():
        kernel[programs](*arguments, **constants)
        return
    kinds = tuple(map(kind, arguments, _specialised(kernel)))
    first: Any = arguments[0]
    key = (kernel, first.device.index, kinds, *constants.values())
    if key in _launched:
        kernel[programs](*arguments, **constants)
        return
    refuse_in_graph(op)
    kernel[programs](*arguments, **constants)
    _launched.add(key)


@functools.cache
def _specialised(kernel: Any) -> tuple[bool, ...]:
    """Of each argument whether Triton looks at its value."""
    return tuple(name not in kernel.do_not_specialize for name in kernel.arg_names)


def kind(argument: Tensor | float | None, specialised: bool) -> object:
    """What of an argument Triton compiles for: two of one kind are served by the same machine code."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if not isinstance(argument, int):
        return type(argument)
    wide = not -(2**31) <= argument < 2**31
    return (wide, argument == 1, argument % 16 == 0) if specialised else wide
