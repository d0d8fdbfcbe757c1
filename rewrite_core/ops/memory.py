"""What kernels are handed: addresses of memory that holds what its tensor says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError


def check_dense(name: str, data: Tensor) -> None:
    """Refuse a tensor whose numbers are not found in memory by strides."""
    if data.is_nested:
        raise ArgumentError(f"{name} is a nested tensor, and must be a plain one: pass its parts one by one.")
    if data.layout != torch.strided:
        raise ArgumentError(f"{name} is {data.layout}, and must be dense: call .to_dense() first.")


def plain(data: Tensor) -> Tensor:
    """The same numbers, in memory as they are; a lazily negated view (``x.conj().imag``) has them with another sign."""
    return data.resolve_neg()


def without_gradient(data: Tensor) -> Tensor:
    """The same numbers outside of autograd; a tensor that is there already costs nothing."""
    return data.detach() if data.requires_grad else data


def plain_fields(problem: Any) -> Any:
    """A problem (a NamedTuple) whose tensors are all :func:`plain`."""
    return problem._replace(**{k: plain(v) for k, v in problem._asdict().items() if isinstance(v, Tensor)})


def address(data: Tensor | None) -> int | None:
    """Of a tensor's first number; None of None. A view whose memory holds other numbers is a mistake here."""
    if data is None:
        return None
    if data.is_neg():
        raise RuntimeError("a kernel was handed a lazily negated view: pass it through plain() first.")
    return data.data_ptr()
