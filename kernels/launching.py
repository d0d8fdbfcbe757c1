"""Launches of Triton kernels, and what of them a CUDA graph cannot take in: a compilation.

Triton compiles a kernel again for pointers that are not aligned, for sizes that are 1 or no multiple of 16, and for
numbers that int32 does not hold. A call with 100 channels may so need what a call with 96 has not compiled. Inside a
capture that is refused here in a sentence; without, it would end in an error of CUDA's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
) -> Any:
    """kernel[programs](*arguments, **constants), on the current stream. The first argument is a tensor. Returns what
    Triton compiled; None in the interpreter.

    Raises RewriteCoreError where a CUDA graph is being captured and nothing compiled serves this launch.
    """
    if triton_interpreted():
        return kernel[programs](*arguments, **constants)
    kinds = tuple(map(kind, arguments, _specialised(kernel)))
    first: Any = arguments[0]
    key = (kernel, first.device.index, kinds, *constants.values())
    if key in _launched:
        return kernel[programs](*arguments, **constants)
    refuse_in_graph(op)
    compiled = kernel[programs](*arguments, **constants)
    _launched.add(key)
    return compiled


def repeated(
    op: str, kernel: Any, programs: tuple[int, int, int], *arguments: Tensor | float | None, **constants: Any
) -> Callable[..., None]:
    """A function of numbers: launch_kernel with these behind `arguments`, at a few microseconds but for its first call.

    Triton looks at every argument of a launch to find what it compiled for it. Here it does so once: the numbers must
    be integers of 32 bits that it does not specialise.
    """
    direct: list[Callable[..., None]] = []
    behind = [constants[name] for name in kernel.arg_names if name in constants]

    def launch(*numbers: int) -> None:
        if direct:
            direct[0](*arguments, *numbers, *behind)
            return
        compiled = launch_kernel(op, kernel, programs, *arguments, *numbers, **constants)
        if compiled is not None:
            direct.append(compiled[programs])

    return launch


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
