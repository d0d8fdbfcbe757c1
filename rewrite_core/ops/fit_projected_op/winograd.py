"""Winograd's algorithm for the C++ kernel: which tile pays, and the maps transformed for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 2.0, -2.0), 5: (0.0, 1.0, -1.0, 2.0, -2.0, 0.5)}  # and infinity
GROUP = 8  # inputs that the kernel handles together


def winograd_tile(operator: Tensor) -> int:
    """The output tile by which Winograd's algorithm multiplies fastest; 0 where the operator [I, kh, kw, H, W] is not a
    3x3 convolution of stride 1 with one row of zeros around, or a tile would not pay."""
    _, *kernel, height, width = operator.shape
    if kernel != [3, 3]:
        return 0
    middle = F.pad(operator[:, 1, 1], (1, 1, 1, 1))
    for y in range(3):
        for x in range(3):
            if not torch.equal(operator[:, y, x], middle[:, y : y + height, x : x + width]):
                return 0

    def cost(tile: int) -> int:
        """Vector operations for one input and channel: two products, and the transforms of the kernel."""
        tiles = -(-height // tile) * -(-width // tile)
        return 2 * tiles * (tile + 2) ** 2 + {2: 56, 4: 144, 5: 210}[tile]

    best = min(POINTS, key=cost)
    return best if cost(best) < 2 * 9 * height * width else 0


def transformed_maps(operator: Tensor, tile: int) -> Tensor:
    """What the kernel multiplies with: [I / GROUP, products, slots, GROUP], inputs padded with zeros."""
    inputs, *_, height, width = operator.shape
    if tile:
        n = tile + 2
        # the inverse of the polynomials' values at the points: a tile of the map is a linear form of products
        options: dict[str, Any] = {"dtype": torch.float64, "device": operator.device}
        matrix = torch.zeros(n, n, **options)
        matrix[:, :-1] = torch.tensor(POINTS[tile], **options) ** torch.arange(n, **options)[:, None]
        matrix[-1, -1] = 1
        inverse = torch.linalg.inv(matrix)
        down, across = -(-height // tile), -(-width // tile)
        padded = F.pad(operator[:, 1, 1].double(), (1, across * tile + 1 - width, 1, down * tile + 1 - height))
        tiles = padded.unfold(1, n, tile).unfold(2, n, tile)  # [I, down, across, n, n]
        maps = (inverse @ tiles @ inverse.T).flatten(3).flatten(1, 2).mT  # [I, products, slots]
    else:
        maps = operator.flatten(3).flatten(1, 2)
    maps = F.pad(maps.float(), (0, 0, 0, 0, 0, -inputs % GROUP))
    return maps.reshape(-1, GROUP, *maps.shape[1:]).permute(0, 2, 3, 1).contiguous()
