"""What must not change: the key space that protected pictures, keys or statistics span, and what is left beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, NonFiniteError, RankError, RewriteCoreError, number, quoted
from ..layers.bound import BoundLayer
from ..layers.latents import check_latents
from ..ops.finite import all_finite
from ..statistics import blocks
from ..statistics.checks import check_keys
from ..statistics.second_moment import SecondMoment, check_moment

_ROUNDED = 1e-13  # of all energy: less along a direction is the rounding of float64 sums
_SINGLE = 2**-24  # the same where keys were added up in float32
_BATCH = 16  # pictures at once
_LESS = 0.99  # the energy to advise where nothing is left
_INSIDE = 1e-6  # of the context's keys: less outside what is protected is nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Protect:
    """What a change must leave exactly as it is, for ``preserve=`` of :func:`rewrite_core.rewrite` and its like.

    The change's directions are then orthogonal to the keys that are protected, so that the layer's output there stays
    (the null space of a second moment, as editors of language models project on). Exactly one of three says what is
    protected:

    Args:
        keys: rows [n, I] of the layer's keys.
        latents: [n, ...], pictures: all keys that the layer sees in them.
        moment: the second moment of keys of that layer. What a float32 collection rounds off is not protected, so keys
            change by about 3e-4 of what they could.
        energy: share of the protected keys' energy, sum |k|^2, that is protected, its strongest directions first. 1,
            the default: all of it, and what is protected does not change but for rounding. Many pictures span all
            channels of a layer; then 0.99 protects most of what they hold and leaves room for the rule.

    Raises:
        ArgumentError: none or several of the three, or no tensor. NonFiniteError: NaN keys. RewriteCoreError: an energy
            out of 0..1.
    """

    keys: Tensor | None = None
    latents: Tensor | None = None
    moment: SecondMoment | None = None
    energy: float = 1.0

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.keys, self.latents, self.moment)) != 1:
            raise ArgumentError("rc.Protect takes one of keys=, latents= and moment=, which says what must not change.")
        if self.keys is not None:
            check_keys(self.keys)
            if self.keys.ndim != 2 or not len(self.keys):
                raise RewriteCoreError(f"Protected keys are rows [n, I], not {list(self.keys.shape)}.")
            if not all_finite(self.keys):
                raise NonFiniteError("The protected keys hold NaN or infinity.")
        if self.latents is not None:
            check_latents(self.latents)
        if self.moment is not None:
            check_moment(self.moment)
        object.__setattr__(self, "energy", number("energy", self.energy, above=0.0, most=1.0))

    def subspace(self, layer: BoundLayer, energy: float | None = None) -> Tensor:
        """Orthonormal rows [k, I], float64: the least that hold the energy of the protected keys of the layer, or
        another `energy`.

        Raises MismatchError where the moment is of another layer, RewriteCoreError for keys of other channels.
        """
        gram, rounded = self._gram(layer)
        squares, rows = _decomposed(gram)
        squares, order = squares.clamp_min(0).sort(descending=True)
        whole = int((squares > rounded * squares.sum()).sum())  # below is rounding
        energy = self.energy if energy is None else energy
        if energy < 1:
            whole = min(whole, int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1)
        return rows[order[:whole]]

    def _gram(self, layer: BoundLayer) -> tuple[Tensor, float]:
        """The second moment of what is protected, as blocks, and the share of it that is rounding."""
        if self.moment is not None:
            self.moment.check(layer)
            own = self.moment.within_groups(layer.groups)
            return own.blocks().to(layer.parameter.device), _ROUNDED if own.wide else _SINGLE
        sums = SecondMoment(layer.in_channels)
        if self.keys is not None:
            if self.keys.shape[1] != layer.in_channels:
                raise RewriteCoreError(
                    f"Protected keys of {layer.name!r} are rows [n, {layer.in_channels}], not {list(self.keys.shape)}."
                )
            sums.update(self.keys.detach().double())
        else:
            assert self.latents is not None
            for batch in self.latents.split(_BATCH):
                sums.update(layer.keys(batch).double())
        return sums.within_groups(layer.groups).blocks().to(layer.parameter.device), _ROUNDED


def _decomposed(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues [I] of a symmetric matrix that is given as blocks, and the eigenvectors as rows [I, I]; of
    several groups each lies within one."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flatten(), blocks.whole(vectors.mT)


@dataclasses.dataclass(frozen=True)
class Room:
    """What protected sets leave: `kept` [k, I] spans what must not change, `free` [I - k, I] the rest; rows of both are
    orthonormal together, float64."""

    kept: Tensor
    free: Tensor

    def inside(self, moment: SecondMoment, keys: Tensor, rank: int | None) -> tuple[SecondMoment, Tensor]:
        """The moment and the keys [n, I] in the coordinates of `free`.

        Raises RankError where fewer directions than `rank` are free, or the keys lie within what is kept.
        """
        if rank is not None and rank > len(self.free):
            raise RankError(
                f"{len(self.free)} directions remain beside what is protected, not {rank}; lower the rank or protect "
                "less."
            )
        rows = keys.double() @ self.free.T.to(keys.device)
        if rows.norm() <= _INSIDE * keys.double().norm():
            raise RankError("The context lies within what is protected, so no change can act there; protect less.")
        return moment.along(self.free), rows


def room_beside(layer: BoundLayer, protected: Sequence[Protect], earlier: Sequence[Tensor] = ()) -> Room | None:
    """What is left beside all that is protected: by `protected`, and by rewrites that are on the layer (their
    subspaces, rows [k, I]). None where nothing is protected.

    Raises RankError where nothing is left.
    """
    device = layer.parameter.device
    bases = [basis.to(device).double() for basis in earlier] + [each.subspace(layer) for each in protected]
    if not bases:
        return None
    rows = torch.cat(bases)
    gram = rows.T @ rows  # of a union of subspaces: 0 in what none of them holds
    squares, own = _decomposed(gram if layer.groups == 1 else blocks.within(gram, layer.groups))
    free = squares < _ROUNDED * len(rows)
    if not free.any():
        left = layer.in_channels - sum(len(each.subspace(layer, _LESS)) for each in protected)  # at least
        raise RankError(
            f"What is protected spans all {layer.in_channels} directions of {layer.name!r}, so none remains to change: "
            f"protect fewer keys or pictures, or less of them (energy=0.99 leaves {max(0, left)}).",
            advice={"energy": 0.99},
        )
    return Room(own[~free], own[free])


def weight_and_protected(preserve: object) -> tuple[float | None, tuple[Protect, ...]]:
    """What ``preserve=`` was given: a weight, or None where it names none, and what is protected.

    Raises ArgumentError for anything but a number, an rc.Protect, or a list of these with one number at most.
    """
    parts = preserve if isinstance(preserve, list | tuple) else [preserve]
    protected = tuple(part for part in parts if isinstance(part, Protect))
    weights = [part for part in parts if part is not None and not isinstance(part, Protect)]
    if len(weights) > 1:
        raise ArgumentError(f"preserve has one weight at most beside what is protected, not {len(weights)}.")
    if weights and isinstance(preserve, list | tuple) and not isinstance(weights[0], int | float):
        raise ArgumentError(f"preserve is a weight, an rc.Protect, or a list of these, not {quoted(preserve)}.")
    return (number("preserve", weights[0], least=0) if weights else None), protected
