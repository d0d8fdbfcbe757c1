"""How large a change is on the keys that a layer really sees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layers.bound import BoundLayer
from ..layers.memory import BLOCK
from ..layers.memory import blocks as pieces
from ..statistics import blocks
from ..statistics.second_moment import SecondMoment
from ..waits import on_gpu


def size_on_keys(layer: BoundLayer, moment: SecondMoment, delta: Tensor, weight: Tensor) -> float:
    """sqrt(tr dW C dW^T / tr W C W^T): the change of the layer's linear output on ordinary keys, as a share of it.

    Of a kernel with several taps each tap is counted by itself and they are summed, as if what two taps see were
    independent: C is the second moment of single keys and knows of no neighbours.

    Args:
        moment: of the layer's keys.
        delta, weight: dW and W, [O, I, *kernel].
    """
    own = moment.within_groups(layer.groups).blocks()
    delta, weight = layer.inside_groups(delta), layer.inside_groups(weight)
    whole = _energy(own, weight).item()
    return math.sqrt(_energy(own, delta).item() / whole) if whole > 0 else math.inf


def _energy(matrix: Tensor, weight: Tensor) -> Tensor:
    """tr W C W^T over all taps, of C as a moment's blocks; of a large weight a few output channels at a time. Of groups
    the weight is [O, I / groups, *kernel]."""
    if matrix.ndim == 3:
        parts = weight.detach()[..., None].flatten(2).unflatten(0, (len(matrix), -1))
        own = parts.transpose(2, 3).flatten(1, 2)  # [groups, O / groups taps, I / groups]
        own = own.to(matrix.device).double()
        return torch.bmm(own, matrix).mul_(own).sum().clamp_min(0)
    total = matrix.new_zeros(())
    for block in pieces(weight, BLOCK if on_gpu(matrix) else BLOCK // 4):
        part = weight[block].detach().to(matrix.device).double()
        rows = part[..., None].flatten(2).transpose(1, 2).flatten(0, 1)  # [O taps, I]
        total = total + (rows @ matrix).mul_(rows).sum()
    return total.clamp_min(0)


def energy_of_weight(layer: BoundLayer, moment: SecondMoment) -> Tensor:
    """tr W C W^T of the layer's weight as it is, float64 on the layer's device. On a CPU it is computed once of a
    moment and a weight; on a GPU that is sooner than to see whether the weight is the same."""
    own = moment.on(layer.parameter.device)

    def energy() -> Tensor:
        return _energy(own.within_groups(layer.groups).blocks(), layer.own_weight)

    if on_gpu(layer.parameter):
        return energy()
    known = own.remembered(layer.weight_fingerprint(), lambda: energy().item())
    return torch.tensor(known, dtype=torch.float64, device="cpu")


def energy_of_factors(layer: BoundLayer, moment: SecondMoment, directions: Tensor, coefficients: Tensor) -> Tensor:
    """tr dW C dW^T of dW = Lambda D, from the R x R product D C D^T; float64 on the layer's device."""
    matrix = moment.on(layer.parameter.device).within_groups(layer.groups).blocks()
    rows, own = directions.detach().to(matrix), coefficients.detach().to(matrix)[..., None].flatten(2)  # [O, R, taps]
    if layer.groups == 1:
        return torch.einsum("ort,rs,ost->", own, blocks.gram(rows, matrix), own).clamp_min(0)
    grams = blocks.grams(rows, matrix)
    parts = own.unflatten(0, (layer.groups, -1))
    return torch.einsum("gort,grs,gost->", parts, grams, parts).clamp_min(0)
