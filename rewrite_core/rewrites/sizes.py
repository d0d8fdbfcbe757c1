"""How large a change is on the keys that a layer really sees."""

from __future__ import annotations

import math

from torch import Tensor

from ..layers.bound import BoundLayer
from ..statistics.second_moment import SecondMoment


def size_on_keys(layer: BoundLayer, moment: SecondMoment, delta: Tensor, weight: Tensor) -> float:
    """sqrt(tr dW C dW^T / tr W C W^T): the change of the layer's linear output on ordinary keys, as a share of it.

    Of a kernel with several taps each tap is counted by itself and they are summed, as if what two taps see were
    independent: C is the second moment of single keys and knows of no neighbours.

    Args:
        moment: of the layer's keys.
        delta, weight: dW and W, [O, I, *kernel].
    """
    matrix = moment.within_groups(layer.groups).matrix()

    def energy(part: Tensor) -> float:
        rows = part.detach().to(matrix.device).double().flatten(2).transpose(1, 2).flatten(0, 1)  # [O taps, I]
        return max(0.0, ((rows @ matrix) * rows).sum().item())

    whole = energy(weight)
    return math.sqrt(energy(delta) / whole) if whole > 0 else math.inf
