"""What arithmetic an edit is solved in, whatever modes the caller is in."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..layers.bound import BoundLayer

_Place = tuple[Any, str]  # an object and an attribute of it
_quiet = threading.Lock()  # filters of warnings are the process's: two threads would leave one's behind


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """Float32 products on a GPU are of whole numbers, not of their first ten bits: coefficients would move by 3e-3.

    By the older names, which every torch has and generators' own code reads: these, but not the newer ones, can be read
    whichever were set. Only where the caller's own newer settings have no older name are the newer used."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    old: list[_Place] = [(matmul, "allow_tf32"), (cudnn, "allow_tf32")]
    new: list[_Place] = []
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        new = [(matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")]  # type: ignore[attr-defined]

    def read(places: list[_Place]) -> list[Any]:
        return [getattr(owner, name) for owner, name in places]

    def write(places: list[_Place], values: list[Any]) -> None:
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.9 finds the older names old
            for (owner, name), value in zip(places, values, strict=True):
                setattr(owner, name, value)

    precise = read(new)
    try:
        allowed = read(old)
    except RuntimeError:
        old, allowed = [], []
    try:
        write(old or new, [False, False] if old else ["ieee", "ieee"])
        yield
    finally:
        write(old, allowed)
        write(new, precise)  # the older names cannot say "none", what was never set


@contextlib.contextmanager
def plain_arithmetic(layer: BoundLayer) -> Iterator[None]:
    """Whatever modes the caller is in: no autocast and no TF32, which would round what is solved for, and no inference
    mode, whose tensors autograd refuses. The generator's own forward function may still set its own."""
    with contextlib.ExitStack() as modes:
        if layer.parameter.device.type == "cuda":
            modes.enter_context(_no_tf32())
        for kind in {"cpu", layer.parameter.device.type}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        yield
