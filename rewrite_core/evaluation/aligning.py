"""Finding the shift of a few pixels by which a place of one picture looks most like a place of another."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 8  # shifts that are tried to each side


def best_shift(picture: Tensor, top: int, left: int, like: Tensor, area: Tensor, most: int) -> tuple[int, int]:
    """(top, left) of the window of a picture that looks most like another one, around a place.

    What is compared is the correlation of the pixels in `area`, each colour about its own mean.

    Args:
        picture: [C, H, W]. top, left: where to look first.
        like: [C, h, w], the window that it should look like. area: [h, w], what of it counts.
        most: shifts of up to so many pixels to each side are tried, at most 8 of them, evenly spread.
    """
    height, width = like.shape[1:]
    step = max(1, -(-most // _STEPS))
    shifts = [step * i for i in range(-(most // step), most // step + 1)]
    tops = sorted({max(0, min(picture.shape[1] - height, top + shift)) for shift in shifts})
    lefts = sorted({max(0, min(picture.shape[2] - width, left + shift)) for shift in shifts})
    weights = area / area.sum()
    centred = like - (like * weights).sum((1, 2), keepdim=True)
    kernel = (centred * weights).flatten()
    rows = picture.unfold(1, height, 1).unfold(2, width, 1)  # [C, H', W', h, w], a view
    windows = rows[:, tops][:, :, lefts].permute(1, 2, 0, 3, 4).flatten(2)  # [tops, lefts, C h w]
    colours = windows.unflatten(2, (len(picture), -1))
    means = torch.einsum("tlcp,p->tlc", colours, weights.flatten())
    squares = torch.einsum("tlcp,p->tlc", colours.square(), weights.flatten()) - means.square()
    score = (windows @ kernel) / squares.sum(-1).clamp_min(1e-12).sqrt()
    best = int(score.argmax())
    return tops[best // len(lefts)], lefts[best % len(lefts)]
