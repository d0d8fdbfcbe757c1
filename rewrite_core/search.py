"""Search: which images hold what a selection shows (paper, section 4: how the interface finds context)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .binding import BoundLayer
from .directions import query_key
from .editing import Selection
from .errors import RewriteCoreError
from .moments import SecondMoment, _stream


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The best matches, best first.

    indices: int64 [k], rows of the latents. scores: float [k], the highest match in each image.
    heatmaps: float [k, h, w], the match C^-1 k* . k at every position of the key map.
    level: the 99.9 % quantile of the match over all images: where the reference's interface draws its outline.
    """

    indices: Tensor
    scores: Tensor
    heatmaps: Tensor
    level: float


def search(
    layer: BoundLayer,
    moment: SecondMoment,
    selection: Selection | Tensor,
    latents: Tensor,
    top: int = 12,
    batch_size: int = 16,
    progress: bool = False,
) -> SearchResult:
    """Rank all `latents` by how strongly any place in their image matches `selection`.

    Args:
        selection: what to look for, or a key [I] (for instance a row of ``context_directions``).
        top: how many matches to return, at most ``len(latents)``.

    Raises:
        SelectionError, MaskError, MismatchError, NonFiniteError.
    """
    if top < 1:
        raise RewriteCoreError(f"top must be at least 1, not {top}.")
    moment.check(layer, latents)
    key = selection if isinstance(selection, Tensor) else query_key(layer, moment, selection, latents)
    if key.shape != (layer.in_channels,):
        raise RewriteCoreError(f"A key to search for has shape [{layer.in_channels}], not {list(key.shape)}.")
    top = min(top, len(latents))
    scores, indices, heatmaps = torch.empty(0), torch.empty(0, dtype=torch.long), None
    sample = []

    def consume(keys: Tensor, done: int) -> None:
        nonlocal scores, indices, heatmaps
        heat = torch.einsum("nihw,i->nhw", keys.float(), key.to(keys.device).float()).cpu()
        sample.append(heat.flatten()[:: max(1, heat.numel() // 4096)])
        rows = torch.arange(done - len(heat), done)
        heatmaps = heat if heatmaps is None else torch.cat([heatmaps, heat])
        scores, indices = torch.cat([scores, heat.amax((1, 2))]), torch.cat([indices, rows])
        keep = scores.argsort(descending=True, stable=True)[:top]
        scores, indices, heatmaps = scores[keep], indices[keep], heatmaps[keep]

    _stream(layer, latents, batch_size, 0, progress, f"search {layer.name}", consume)
    # torch.quantile takes 16 million values at most
    values = torch.cat(sample)
    values = values[:: 1 + len(values) // 10_000_000]
    return SearchResult(indices, scores, heatmaps, values.quantile(0.999).item())
