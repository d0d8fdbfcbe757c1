"""How large a change is on the keys that a layer really sees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layers.bound import BoundLayer
from ..layers.memory import BLOCK, blocks
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
    matrix = moment.within_groups(layer.groups).matrix()
    whole = _energy(matrix, weight).item()
    return math.sqrt(_energy(matrix, delta).item() / whole) if whole > 0 else math.inf


def _energy(matrix: Tensor, weight: Tensor) -> Tensor:
    """tr W C W^T over all taps; of a large weight a few output channels at a time."""
    total = matrix.new_zeros(())
    for block in blocks(weight, BLOCK if on_gpu(matrix) else BLOCK // 4):
        part = weight[block].detach().to(matrix.device).double()
        rows = part[..., None].flatten(2).transpose(1, 2).flatten(0, 1)  # [O taps, I]
        total = total + (rows @ matrix).mul_(rows).sum()
    return total.clamp_min(0)


def energy_of_weight(layer: BoundLayer, moment: SecondMoment) -> Tensor:
    """tr W C W^T of the layer's weight as it is, float64 on the layer's device. On a CPU it is computed once of a
    moment and a weight; on a GPU that is sooner than to see whether the weight is the same."""
    own = moment.on(layer.parameter.device)

    def energy() -> Tensor:
        return _energy(own.within_groups(layer.groups).matrix(), layer.weight)

    if on_gpu(layer.parameter):
        return energy()
    known = own.remembered(layer.weight_fingerprint(layer.weight), lambda: energy().item())
    return torch.tensor(known, dtype=torch.float64, device="cpu")


def energy_of_factors(layer: BoundLayer, moment: SecondMoment, directions: Tensor, coefficients: Tensor) -> Tensor:
    """tr dW C dW^T of dW = Lambda D, from the R x R product D C D^T; float64 on the layer's device."""
    matrix = moment.on(layer.parameter.device).matrix()
    rows = directions.detach().to(matrix)
    parts = coefficients.detach().to(matrix)[..., None].flatten(2).chunk(layer.groups)  # [O, R, taps]
    size = layer.in_channels // layer.groups
    total = matrix.new_zeros(())
    for group, own in enumerate(parts):
        seen = slice(group * size, (group + 1) * size)
        gram = rows[:, seen] @ matrix[seen, seen] @ rows[:, seen].T
        total = total + torch.einsum("ort,rs,ost->", own, gram, own)
    return total.clamp_min(0)
