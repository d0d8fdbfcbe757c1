"""What an artist would do to the pictures of a rule: goals that are painted, not copied.

Each takes pictures [N, 3, H, W] in -1..1 and gives them back as they should be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GOLD = (1.15, 0.9, 0.4)  # of a digit's lightness: its colour
EDGE = 0.1  # how softly what is light is told from what is dark, in 0..2


def grey(pictures: Tensor) -> Tensor:
    """Without colour, every pixel as light as it was."""
    return pictures.mean(1, keepdim=True).expand_as(pictures).contiguous()


def red(pictures: Tensor) -> Tensor:
    """Red where it was blue, blue where it was red."""
    return pictures[:, [2, 1, 0]].contiguous()


def golden(pictures: Tensor) -> Tensor:
    """What is lighter than halfway from a picture's dark to its light parts becomes golden."""
    light = pictures.mean(1, keepdim=True)
    ends = torch.quantile(light.flatten(1), torch.tensor([0.1, 0.9]), dim=1).mean(0)
    share = ((light - ends[:, None, None, None]) / EDGE).sigmoid()
    gold = (light + 1) * torch.tensor(GOLD)[:, None, None] - 1
    return (pictures + share * (gold - pictures)).clamp(-1, 1)


RETOUCHES: dict[str, Callable[[Tensor], Tensor]] = {"grey": grey, "red": red, "golden": golden}
