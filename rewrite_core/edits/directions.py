"""Directions: which input features of a layer an edit may respond to (paper, section 3.2 and appendix D)."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, NonFiniteError, RankError, RewriteCoreError, SelectionError, choice, quoted
from ..layers.bound import BoundLayer
from ..layers.latents import check_latents
from ..ops.finite import all_finite
from ..statistics import blocks
from ..statistics.checks import check_keys, check_layer
from ..statistics.quantiles import UnitQuantiles
from ..statistics.second_moment import SecondMoment, check_inputs, check_moment
from ..waits import likely, on_gpu, on_host, sent, unlikely
from .selection import Selection

DIRECTIONS = ("whitened", "svd", "mean", "units")
_ON_HOST = 256  # a product of a GPU's keys of that size or less is decomposed on the host: sooner, and for one wait
_SQUARED = 1e-6  # squared singular values above this share of the first are known from the product to ten digits


def _check_rows(moment: SecondMoment, keys: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows, and weights where they were given, float64: on the host they can be looked at without a wait."""
    check_moment(moment)
    check_keys(keys)
    if keys.ndim != 2 or keys.shape[1] != moment.channels:
        raise RewriteCoreError(f"Context keys are rows [n, {moment.channels}], not {list(keys.shape)}.")
    rows = keys.detach().to(torch.float64)
    if weights is None:
        weights = torch.ones(len(rows), dtype=torch.float64, device="cpu")
    try:
        weights = (weights if isinstance(weights, Tensor) else torch.as_tensor(weights, device="cpu")).detach()
        right = not weights.is_complex()
    except (TypeError, ValueError, RuntimeError):
        right = False
    if not right:
        raise ArgumentError(f"weights are real numbers, one for each context key, not {quoted(weights)}.")
    weights = weights.to(torch.float64).reshape(-1)
    if len(weights) != len(rows):
        raise RewriteCoreError(f"There are {len(rows)} context keys and {len(weights)} weights; give one each.")
    if not (all_finite(rows) and all_finite(weights)):
        raise NonFiniteError("The context keys or their weights hold NaN or infinity.")
    if not likely((weights > 0).any()):
        raise SelectionError("No context key has a positive weight; mark at least one place.")
    return rows, weights


def _positive(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose weight is positive, and their weights, both where the rows are."""
    marked = weights > 0
    if on_gpu(rows) and likely(marked.all()):
        return rows, sent(weights, rows.device)
    places = sent(on_host(marked).nonzero()[:, 0], rows.device)
    return rows[places], sent(weights, rows.device)[places]


def _orthonormal_rows(rows: Tensor, towards: Tensor) -> Tensor:
    """Orthonormal rows spanning `rows` [R, I], in order, each with a non-negative product with `towards`."""
    q, r = torch.linalg.qr(rows.T)
    diagonal = r.diagonal().abs()
    if unlikely((diagonal <= 1e-10 * diagonal.max()).any()):
        raise RankError("The context keys do not span that many directions; lower the rank or mark more places.")
    signs = torch.where(q.T @ towards < 0, -1.0, 1.0).to(q.dtype)
    return q.T * signs[:, None]


def rank_units(
    moment: SecondMoment, keys: Tensor, weights: Tensor | None = None, quantiles: UnitQuantiles | None = None
) -> Tensor:
    """Units (key channels) from most to least typical of the context: int64 [I].

    With `quantiles`, GAN Dissection's score, the weighted mean of ``-log(1 - quantile)``; a unit that reaches
    its population maximum at any of the rows, weighted or not, has an infinite score, as in the reference
    implementation. Without, the score that a second moment allows, the weighted mean of ``k^2 / E[k^2]``
    (the reference's choice of what to erase).
    """
    rows, weights = _check_rows(moment, keys, weights)
    weights = sent(weights, rows.device)
    if not isinstance(quantiles, UnitQuantiles | None):
        raise ArgumentError(f"quantiles is what rc.collect_unit_quantiles returns, not {quoted(quantiles)}.")
    if quantiles is None:
        scale = blocks.diagonal(moment.on(rows.device).blocks())
        scores = rows.square() / torch.where(scale > 0, scale, torch.inf)
    else:
        scores = -torch.log1p(-quantiles.quantile(rows)).to(rows.device)
    mean = (scores * weights[:, None]).sum(0) / weights.sum()  # 0 * inf is NaN and stands for inf
    return mean.nan_to_num(nan=torch.inf, posinf=torch.inf).sort(descending=True, stable=True).indices


def context_directions(
    moment: SecondMoment,
    keys: Tensor,
    weights: Tensor | None = None,
    rank: int = 1,
    directions: str = "whitened",
    quantiles: UnitQuantiles | None = None,
) -> Tensor:
    """The directions D [R, I] (float64, orthonormal rows) that context keys reduce to.

    Args:
        moment: second moment of the layer's keys, C = L L^T.
        keys: context keys, rows [n, I].
        weights: mask weight of each key [n]; default 1.
        rank: R, the number of directions.
        directions: "whitened" (appendix D): top R right singular vectors V of ``diag(w) M L^-T``, then orthonormal
            rows of ``(L^-T V)^T``, each agreeing with the weighted mean key. Same span as whitening by C^(-1/2), by
            Cholesky alone. "svd": top R right singular vectors of the rows ``w C^-1 k``. "mean": their mean
            (rank 1 only). "units": one-hot rows, of the units that are most typical of the context: with `quantiles`
            by GAN Dissection's score, the mean of ``-log(1 - quantile)``; without, by the mean of ``k^2 / E[k^2]``,
            which ranks them otherwise.
        quantiles: for "units", from :func:`collect_unit_quantiles`; :func:`rewrite` collects them itself.

    Raises:
        RankError: rank below 1, above I, or above the number of independent context keys.
        NonFiniteError, SelectionError: NaN keys; no key with positive weight.
    """
    choice("directions", directions, DIRECTIONS)
    check_moment(moment)
    try:
        whole = 0 if isinstance(rank, bool) else operator.index(rank)  # numpy's whole numbers too
    except TypeError:
        whole = 0
    if not 1 <= whole <= moment.channels:
        raise RankError(f"The rank must be a whole number from 1 to the {moment.channels} channels, not {rank!r}.")
    rank = whole
    if directions == "mean" and rank != 1:
        raise RankError(
            f"directions='mean' is one direction; use rank=1, not {rank}.", advice={"directions": "mean", "rank": 1}
        )
    if directions == "units":
        units = rank_units(moment, keys, weights, quantiles)[:rank]
        return torch.nn.functional.one_hot(units, moment.channels).to(torch.float64)

    rows, weights = _positive(*_check_rows(moment, keys, weights))
    if rank > len(rows):
        raise RankError(f"{len(rows)} context keys cannot give {rank} directions; lower the rank or mark more.")
    if not likely(rows.any()):
        raise SelectionError("Every context key is zero; mark a place where the layer has features.")
    own, weighted = moment.on(rows.device), rows * weights[:, None]
    mean = weighted.sum(0)
    if directions == "whitened":
        top = _top_right_vectors(blocks.whiten(own.factor, weighted), rank)  # of diag(w) M L^-T
        return _orthonormal_rows(blocks.directions_of(own.factor, top), mean)
    adjusted = own.solve(weighted)
    if directions == "mean":
        direction = adjusted.mean(0)
        if unlikely(direction.norm() <= 1e-10 * adjusted.norm()):
            raise RankError(
                "The context keys cancel out and have no mean direction; use directions='whitened'.",
                advice={"directions": "whitened"},
            )
        return (direction / direction.norm())[None]
    return _orthonormal_rows(_top_right_vectors(adjusted, rank), adjusted.mean(0))


def _top_right_vectors(rows: Tensor, rank: int) -> Tensor:
    """The top `rank` right singular vectors of rows [n, I], as rows.

    From the n x n or the I x I product, whichever is smaller: several times faster than the rows' own decomposition,
    and squaring costs nothing that is needed unless the last value is small beside the first.
    """
    if min(rows.shape) > 1:
        wide = rows.shape[0] <= rows.shape[1]
        product = rows @ rows.T if wide else rows.T @ rows
        if len(product) <= _ON_HOST:
            product = on_host(product)
        squares, vectors = torch.linalg.eigh(product)
        if likely(squares[-rank] > _SQUARED * squares[-1]):
            top = sent(vectors[:, -rank:], rows.device).flip(1).T
            return torch.nn.functional.normalize(top @ rows, dim=1) if wide else top
    elif len(rows) == 1 and on_gpu(rows):  # where a decomposition would be waited for
        return torch.nn.functional.normalize(rows, dim=1)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    if values[rank - 1] <= 1e-10 * values[0]:
        raise RankError(
            f"The context keys span only {int((values > 1e-10 * values[0]).sum())} directions, not {rank}; "
            "lower the rank or mark more places."
        )
    return vectors[:rank]


def context_keys(
    layer: BoundLayer, selections: Sequence[Selection], latents: Tensor, inside_only: bool = True
) -> tuple[Tensor, Tensor]:
    """The keys at the marked places and their mask weights: rows [n, I] and [n].

    With ``inside_only=False`` every position of the marked images is a row, weight 0 outside the masks.
    """
    rows, weights = marked_keys(layer, selections, latents, inside_only)
    return rows, sent(weights, rows.device)


def marked_keys(
    layer: BoundLayer, selections: Sequence[Selection], latents: Tensor, inside_only: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`context_keys` with the weights on the host, where a look at them waits for nothing."""
    check_layer(layer)
    check_latents(latents)
    several = isinstance(selections, Sequence)
    for given in selections if several else [selections]:
        if not several or not isinstance(given, Selection):
            raise ArgumentError(
                f"selections is a list of rc.Selection (edit.where has an edit's), not one of {type(given).__name__}."
            )
    if not selections:
        raise SelectionError("There is no selection to read keys at; mark at least one place.")
    rows, weights = [], []
    for selection in selections:
        keys = layer.keys(selection.latent(latents))
        area = selection.area(tuple(keys.shape[2:])).reshape(-1)
        flat = keys[0].reshape(len(keys[0]), -1).T
        inside = area > 0 if inside_only else torch.ones_like(area, dtype=torch.bool)
        rows.append(flat[sent(inside.nonzero()[:, 0], keys.device)])
        weights.append(area[inside])
    return torch.cat(rows), torch.cat(weights)


def query_key(layer: BoundLayer, moment: SecondMoment, selection: Selection, latents: Tensor) -> Tensor:
    """The key to search for: C^-1 of the mask-weighted mean key, normalised; float64 [I] (paper, section 4)."""
    check_inputs(layer, moment)
    check_latents(latents)
    if not isinstance(selection, Selection):
        raise ArgumentError(f"What to search for is an rc.Selection or a key, not {type(selection).__name__}.")
    rows, weights = context_keys(layer, [selection], latents)
    mean = (rows.double() * weights.double()[:, None]).sum(0) / weights.double().sum()
    if not all_finite(mean):
        raise NonFiniteError("The keys at the selection hold NaN or infinity.")
    key = moment.solve(mean)
    return key / key.norm().clamp_min(1e-10)
