"""Launches of Triton kernels, and what of them a CUDA graph cannot take in: a compilation.

Triton compiles a kernel again for pointers that are not aligned, for sizes that are 1 or no multiple of 16, and for
numbers that int32 does not hold. A call with 100 channels may so need what a call with 96 has not compiled. Inside a
capture that is refused here in a sentence; without, it would end in an error of CUDA's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import triton_interpreted
from ..errors import RewriteCoreError

_compiled: dict[tuple, Any] = {}  # by all that Triton compiles for: what is loaded in this process
_plans: dict[tuple, Any] = {}  # see keep_plan
MOST_PLANS = 4096


def refuse_in_graph(op: str) -> None:
    """Raise RewriteCoreError where a CUDA graph is being captured: what `op` is about to do cannot go into it."""
    if torch.cuda.is_current_stream_capturing():
        raise RewriteCoreError(
            f"{op} has not yet run on data of such a type, size and layout in this process, and what its first call "
            "compiles and measures cannot go into a CUDA graph: call it once before the capture."
        )


def _launch(
    op: str, kernel: Any, programs: tuple[int, ...], arguments: tuple[Tensor | float | None, ...], constants: dict
) -> Callable[..., None] | None:
    """Launch, and return what Triton has compiled: a function of all arguments and constants, in their order, that
    launches again without a look at them. None in the interpreter."""
    if triton_interpreted():
        kernel[programs](*arguments, **constants)
        return None
    programs = (*programs, 1, 1)[:3]  # what is compiled takes no fewer, where a kernel to be looked up would
    kinds = tuple(map(kind, arguments, _specialised(kernel)))
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    key = (kernel, device.index, kinds, *constants.values())
    found = _compiled.get(key)
    if found is None:
        refuse_in_graph(op)
        found = _compiled[key] = kernel[programs](*arguments, **constants)
        run: Callable[..., None] = found[programs]
    else:
        run = found[programs]
        run(*arguments, *_behind(kernel, constants))
    return run


def _behind(kernel: Any, constants: dict) -> list[Any]:
    """A kernel's constants as they follow its arguments; what is left are options of the compiler."""
    return [constants[name] for name in kernel.arg_names if name in constants]


def launch_kernel(
    op: str, kernel: Any, programs: tuple[int, ...], *arguments: Tensor | float | None, **constants: Any
) -> Callable[..., None]:
    """kernel[programs](*arguments, **constants), on the current stream. One argument at least is a tensor.

    Returns a function that does the same again for other tensors of the same kinds (types, devices and alignment), in
    place of those that the arguments begin with. It spares what Triton does at every launch to find the machine code.

    Raises RewriteCoreError where a CUDA graph is being captured and nothing compiled serves this launch.
    """
    tensors = (each is None or isinstance(each, Tensor) for each in arguments)
    own = next((place for place, each in enumerate(tensors) if not each), len(arguments))
    run = _launch(op, kernel, programs, arguments, constants)
    numbers = arguments[own:]  # all that is kept: no tensor
    if run is None:
        return lambda *tensors: kernel[programs](*tensors, *numbers, **constants)
    again, numbers = run, (*numbers, *_behind(kernel, constants))
    return lambda *tensors: again(*tensors, *numbers)


def repeated(
    op: str, kernel: Any, programs: tuple[int, int, int], *arguments: Tensor | float | None, **constants: Any
) -> Callable[..., None]:
    """A function of numbers: launch_kernel with these behind `arguments`, at a few microseconds but for its first call.

    Triton looks at every argument of a launch to find what it compiled for it. Here it does so once: the numbers must
    be integers of 32 bits that it does not specialise.
    """
    direct: list[Callable[..., None]] = []
    behind = _behind(kernel, constants)

    def launch(*numbers: int) -> None:
        if direct:
            direct[0](*arguments, *numbers, *behind)
            return
        run = _launch(op, kernel, programs, (*arguments, *numbers), constants)
        if run is not None:
            direct.append(run)

    return launch


def plan_of(key: tuple) -> Any:
    """What :func:`keep_plan` was given under the key; None where nothing was."""
    return _plans.get(key)


def keep_plan(key: tuple, plan: object) -> None:
    """Keep what a call worked out for the next one of its kind. `key` names the op and everything that its launches
    follow from."""
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan


def forget() -> None:
    """Forget what was compiled and planned in this process, as tests do that stand for another."""
    _compiled.clear()
    _plans.clear()


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Inside, the tensor's GPU is the current one, on which Triton launches."""
    index = tensor.device.index
    if index is None or index == torch.cuda.current_device():
        yield
    else:
        with torch.cuda.device(index):
            yield


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


@functools.cache
def power_of_2(number: int) -> int:
    """The least power of 2 that is no less; Triton's own function takes 10 us."""
    return 1 << (number - 1).bit_length()
