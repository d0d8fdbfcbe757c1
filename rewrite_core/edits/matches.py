"""Search: which images hold what a selection shows (paper, section 4: how the interface finds context)."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, RewriteCoreError, flag, whole_number
from ..layers.bound import BoundLayer
from ..layers.latents import check_latents
from ..ops.finite import all_finite
from ..statistics.key_stream import stream_keys
from ..statistics.second_moment import SecondMoment, check_inputs
from .directions import query_key
from .masks import png_of
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
        """For notebooks: the best matches, how strong they are, and where, the brighter the stronger."""
        high = max(float(self.heatmaps.clamp_min(0).nan_to_num(0, 0, 0).max()), 1e-12) if len(self.heatmaps) else 1.0
        cells = "".join(
            _match(index, score, heat / high)
            for index, score, heat in zip(self.indices.tolist()[:_SHOWN], self.scores.tolist(), self.heatmaps)
        )
        more = f" of {len(self.indices)}" if len(self.indices) > _SHOWN else ""
        return f"<div>{cells}</div><small>the best{more}; outlines are drawn at {self.level:.4g}</small>"


def _match(index: int, score: float, heat: Tensor) -> str:
    """One match for a notebook; `heat` [*map] in 0..1, a volume's slices one above the other."""
    picture = ""
    if heat.ndim > 1:
        plane = heat.reshape(-1, heat.shape[-1])
        side = max(plane.shape)
        height, width = (max(1, round(80 * length / side)) for length in plane.shape)
        if side > 160:  # more than can be seen
            plane = torch.nn.functional.adaptive_max_pool2d(plane[None].float(), (2 * height, 2 * width))[0]
        bright = (plane.clamp(0, 1).nan_to_num(0) * 255).round().to(torch.uint8).cpu().numpy()
        source = base64.b64encode(png_of(bright)).decode("ascii")
        look = "border: 1px solid gray; image-rendering: pixelated"
        picture = (
            f'<img src="data:image/png;base64,{source}" width="{width}" height="{height}" '
            f'alt="where picture {index} matches" style="{look}"><br>'
        )
    below = f"<small><b>picture {index}</b><br>match {score:.4g}</small>"
    shape = "display: inline-block; margin: 2px; width: 88px; text-align: left; line-height: 1.25; vertical-align: top"
    return f'<div style="{shape}">{picture}{below}</div>'


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
    if not all_finite(key):
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
        if not all_finite(heat):
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
