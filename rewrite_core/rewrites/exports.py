"""A change in the forms that other tools take: a plain state dict, and LoRA factors."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..layers.bound import BoundLayer


def edited_state_dict(bound: BoundLayer, weight: Tensor) -> dict[str, Any]:
    """A copy of the generator's state dict with `weight`, in native layout, in the layer's place. The generator is only
    read.

    A computed weight is in it under its plain name, and what it is computed from is left out: it is what a generator
    without that norm loads. A module's extra state is anything, and copied.
    """
    state = {
        key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in bound.generator.state_dict().items()
    }
    path = next(path for path, module in bound.generator.named_modules() if module is bound.module)
    prefix, name = f"{path}." if path else "", bound._adapter.weight_name  # in a compiled part not the layer's name
    computed = bound._adapter.computed
    if computed is not None:
        parts = [f"{prefix}{part}" for part in computed.parts()]
        state = {
            key: value
            for key, value in state.items()
            if key not in parts and not any(key.startswith(f"{part}.") for part in parts)
        }
    return state | {f"{prefix}{name}": weight.detach().clone()}


def lora_factors(directions: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) with B A = Lambda D, see :meth:`rewrite_core.Rewrite.lora`."""
    rank, kernel = len(directions), coefficients.shape[2:]
    taps = math.prod(kernel)
    one_hot = torch.eye(taps, dtype=directions.dtype, device=directions.device)
    a = torch.einsum("ri,st->rsit", directions, one_hot).reshape(rank * taps, -1, *kernel)
    return a, coefficients.reshape(len(coefficients), -1, *[1] * len(kernel)).clone()
