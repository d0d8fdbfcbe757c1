"""Search: which images hold what a selection shows (paper, section 4: how the interface finds context)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, RewriteCoreError, flag, whole_number
from ..layers.bound import BoundLayer
from ..layers.latents import check_latents
from ..statistics.key_stream import stream_keys
from ..statistics.second_moment import SecondMoment, check_inputs
from .directions import query_key
from .selection import Selection

_SHOWN = 20  # matches in a notebook
_LEVEL_POSITIONS = 4_000_000  # that the level is estimated from; all of them where there are no more


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The best matches, best first.

    indices: int64 [k], rows of the latents. scores: float [k], the highest match in each image.
    heatmaps: float [k, *map], the match C^-1 k* . k at every position of the key map.
    level: the 99.9 % quantile of the match over all images, or over a random sample of 4 million positions where
        there are more: where the reference's interface draws its outline.
    """

    indices: Tensor
    scores: Tensor
    heatmaps: Tensor
    level: float

    def _repr_html_(self) -> str:
        """For notebooks: the best matches and how strong they are."""
        rows = "".join(
            f"<tr><td>{index}</td><td>{score:.4g}</td></tr>"
            for index, score in zip(self.indices.tolist()[:_SHOWN], self.scores.tolist())
        )
        more = f" of {len(self.indices)}" if len(self.indices) > _SHOWN else ""
        head = "<tr><th>picture</th><th>match</th></tr>"
        return f"<table>{head}{rows}</table><small>the best{more}; outlines are drawn at {self.level:.4g}</small>"


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
        NonFiniteError: NaN or infinity in the key or in an image's; names the batch.
        SelectionError, MaskError, MismatchError: as their names say.
    """
    check_inputs(layer, moment, latents)
    check_latents(latents)
    top, batch_size = whole_number("top", top), whole_number("batch_size", batch_size)
    flag("progress", progress)
    if len(latents) == 0:
        raise RewriteCoreError("A search needs latents to look through, and there are none.")
    moment.check(layer, latents)
    key = selection if isinstance(selection, Tensor) else query_key(layer, moment, selection, latents)
    if key.shape != (layer.in_channels,) or key.is_complex():
        raise RewriteCoreError(
            f"A key to search for is real, of shape [{layer.in_channels}], not {key.dtype} of {list(key.shape)}."
        )
    if not torch.isfinite(key).all():
        raise NonFiniteError("The key to search for holds NaN or infinity.")
    top = min(top, len(latents))
    scores = torch.empty(0, dtype=torch.float32, device="cpu")
    indices = torch.empty(0, dtype=torch.long, device="cpu")
    heatmaps: Tensor | None = None
    sample = []
    random = torch.Generator(device="cpu").manual_seed(0)

    def consume(keys: Tensor, done: int) -> None:
        nonlocal scores, indices, heatmaps
        heat = torch.einsum("ni...,i->n...", keys.float(), key.to(keys.device).float()).cpu()
        if not torch.isfinite(heat).all():
            raise NonFiniteError("The match is NaN or infinite; leave those images out.")
        values, share = heat.flatten(), len(heat) * _LEVEL_POSITIONS // len(latents)
        if share < len(values):  # at random: a stride would meet the same columns of every map
            values = values[torch.randint(len(values), (max(1, share),), generator=random, device="cpu")]
        sample.append(values)
        rows = torch.arange(done - len(heat), done, device="cpu")
        heatmaps = heat if heatmaps is None else torch.cat([heatmaps, heat])
        scores, indices = torch.cat([scores, heat.flatten(1).amax(1)]), torch.cat([indices, rows])
        keep = scores.argsort(descending=True, stable=True)[:top]
        scores, indices, heatmaps = scores[keep], indices[keep], heatmaps[keep]

    stream_keys(layer, latents, batch_size, progress, f"search {layer.name}", consume)
    assert heatmaps is not None, "there is a latent"
    return SearchResult(indices, scores, heatmaps, float(np.quantile(torch.cat(sample).numpy(), 0.999)))
