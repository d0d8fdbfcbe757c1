"""What the host waits for on a GPU: numbers that go there without a wait, and looks that wait once for many.

A look at a GPU's number waits for all that was launched before, and leaves the GPU idle until the host goes on. An edit
has some thirty, nearly all with the answer that is to be expected: nothing is NaN, the weights are what they were. So
:func:`supposing` runs a piece of work as if each of them (:func:`unlikely`, :func:`suppose`) had that answer, looks at
all together where a number is needed (:func:`on_host`) and at the end, and where one had another answer, runs the work
again with every look where it stands. Then all happens as on a CPU: the same errors, in the same order.

Of tensors on a CPU everything here is a plain look.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class _Otherwise(BaseException):
    """A look had another answer than was supposed. No Exception, so that nothing on the way takes it for its own."""


class _Looks:
    """The looks that were put off, in their order."""

    def __init__(self) -> None:
        self._off: list[tuple[Tensor, Callable[[Tensor], bool]]] = []

    def put_off(self, tensor: Tensor, expected: Callable[[Tensor], bool]) -> None:
        self._off.append((tensor, expected))

    def read(self, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        """These tensors on the host, and with the same wait all that was put off. Raises _Otherwise."""
        waiting, self._off = self._off, []
        found = _read([*(tensor for tensor, _ in waiting), *tensors])
        if not all(expected(answer) for answer, (_, expected) in zip(found, waiting)):
            raise _Otherwise
        return found[len(waiting) :]

    def as_supposed(self) -> bool:
        try:
            self.read()
        except _Otherwise:
            return False
        return True


_running: contextvars.ContextVar[_Looks | None] = contextvars.ContextVar("looks", default=None)


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def supposing(work: Callable[[], Result]) -> Result:
    """What `work()` returns or raises. Looks in it that are likely to have one answer wait once, together; `work` may
    run twice for that, so it must leave nothing behind where it fails."""
    looks = _Looks()
    token = _running.set(looks)
    try:
        result = work()
        looks.read()
        return result
    except _Otherwise:
        pass
    except Exception:
        if looks.as_supposed():
            raise
    finally:
        _running.reset(token)
    return work()


def suppose(tensor: Tensor, expected: Callable[[Tensor], bool]) -> bool:
    """Whether `expected(tensor on the host)`; inside :func:`supposing` True, of a GPU's tensor, which is looked at
    later."""
    looks = _running.get()
    if looks is None or not on_gpu(tensor):
        return expected(on_host(tensor))
    looks.put_off(tensor, expected)
    return True


def unlikely(answer: Tensor) -> bool:
    """Whether a tensor of one boolean is true, which is seldom: False inside :func:`supposing`, of a GPU's tensor."""
    return not suppose(answer, lambda found: not found)


def likely(answer: Tensor) -> bool:
    """Whether a tensor of one boolean is true, as it is nearly always: True inside :func:`supposing`, of a GPU's
    tensor."""
    return suppose(answer, bool)


def on_host(tensor: Tensor) -> Tensor:
    """A tensor on the host: itself where it is there. Of a GPU's the host waits, and looks at all that was put off."""
    return all_on_host([tensor])[0]


def later(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that returns a tensor on the host; inside :func:`supposing` it comes with the next wait."""
    looks = _running.get()
    if looks is None or not on_gpu(tensor):
        return lambda: on_host(tensor)
    found: list[Tensor] = []

    def keep(answer: Tensor) -> bool:
        found.append(answer)
        return True

    def answer() -> Tensor:
        if not found:
            looks.read()
        return found[0]

    looks.put_off(tensor, keep)
    return answer


def all_on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the host, with one wait for each GPU that some of them are on."""
    if not any(map(on_gpu, tensors)):
        return list(tensors)
    looks = _running.get()
    return _read(tensors) if looks is None else looks.read(tensors)


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, and in a dtype: itself where it is so already. From the host to a GPU by pinned memory, so
    that the host does not wait for what the GPU is at."""
    dtype = tensor.dtype if dtype is None else dtype
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.to(dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def bits_of(tensor: Tensor) -> Tensor:
    """A tensor's numbers in their order, as uint8 [bytes] where the tensor is."""
    data = tensor.detach()
    if data.layout != torch.strided:  # a sparse buffer
        data = data.to_dense()
    return data.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the host; all of a GPU in one copy, of their bits one after the other."""
    found = list(tensors)
    places: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if on_gpu(tensor):
            places.setdefault(tensor.device, []).append(number)
    for numbers in places.values():
        parts = [bits_of(tensors[number]) for number in numbers]
        whole = (torch.cat(parts) if len(parts) > 1 else parts[0]).cpu()
        for number, part in zip(numbers, whole.split([len(part) for part in parts]), strict=True):
            # a copy lies where its dtype may
            found[number] = part.clone().view(tensors[number].dtype).reshape(tensors[number].shape)
    return found
