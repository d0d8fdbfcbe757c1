"""What ``second_moment`` takes, and the checks of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ArgumentError, RewriteCoreError
from ..memory import check_dense

DTYPES = {  # and how csrc/common.h names them
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

PRECISIONS = ("x3", "tf32", "ieee")  # the first is the default


def shape_of_out(channels: int, groups: int) -> tuple[int, ...]:
    size = channels // groups
    return (size, size) if groups == 1 else (groups, size, size)


def check_types(features: Tensor, out: Tensor | None, precision: str) -> None:
    if not isinstance(features, Tensor):
        raise ArgumentError(f"features must be a torch tensor, not {type(features).__name__}: use torch.as_tensor.")
    if features.is_nested:
        raise ArgumentError("features are a nested tensor, and must be a plain one: add up the moments of its parts.")
    if out is not None and not isinstance(out, Tensor):
        raise ArgumentError(
            f"out must be a float64 tensor, not {type(out).__name__}: sums over many keys need the width."
        )
    if out is not None:
        check_dense("out", out)
    if precision not in PRECISIONS:
        raise RewriteCoreError(f"precision={precision!r} is none of {', '.join(PRECISIONS)}: leave it at 'x3'.")


def check(features: Tensor, out: Tensor | None, precision: str, groups: int) -> None:
    check_types(features, out, precision)
    if features.layout != torch.strided:
        raise ArgumentError(f"features are {features.layout}, and must be dense: call .to_dense() first.")
    if features.dtype not in DTYPES:
        raise ArgumentError(
            f"features are {features.dtype}, and must be float32, float64, bfloat16 or float16: "
            "convert them with .float()."
        )
    shape = features.shape
    if len(shape) not in (2, 4) or shape[1] == 0:
        raise RewriteCoreError(f"features must be [N, C, H, W] or [N, C] with at least one channel, not {list(shape)}.")
    channels = shape[1]
    if groups < 1 or channels % groups:
        raise RewriteCoreError(f"{channels} channels do not fall into {groups} groups: give a divisor of their number.")
    if out is None:
        return
    if out.dtype != torch.float64:
        raise ArgumentError(f"out must be a float64 tensor, not {out.dtype}: sums over many keys need the width.")
    wanted = shape_of_out(channels, groups)
    if out.shape != wanted or not out.is_contiguous():
        how = "" if out.is_contiguous() else " that is not contiguous"
        raise RewriteCoreError(
            f"out must be a contiguous {list(wanted)} tensor for these features, not {list(out.shape)}{how}."
        )
    if out.device != features.device:
        raise RewriteCoreError(
            f"out is on {out.device} and the features are on {features.device}: move one to the other."
        )
    if out.is_neg():
        raise ArgumentError("out is a lazily negated view, and its memory is written: pass out.resolve_neg().")
    if out.requires_grad:
        raise RewriteCoreError("out requires gradients and is written in place: pass out.detach().")


def check_apart(features: Tensor, out: Tensor) -> None:
    """Refuse an `out` that lies in the features' memory: what is read would be written."""
    if not features.numel():
        return
    reach = features.nbytes
    if not features.is_contiguous():
        steps = sum((size - 1) * stride for size, stride in zip(features.shape, features.stride()))
        reach = (1 + steps) * features.element_size()
    start, out_start = features.data_ptr(), out.data_ptr()
    if start < out_start + out.nbytes and out_start < start + reach:
        raise RewriteCoreError("out shares memory with the features, which it would overwrite: pass another one.")
