"""How far a second moment, and what is solved with it, may be from what more images would give."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..errors import (
    ArgumentError,
    DiagonalShiftWarning,
    FileFormatError,
    MismatchError,
    NonFiniteError,
    RewriteCoreError,
    silent,
)
from ..files import shown
from ..ops.finite import all_finite
from . import blocks

LEAST = 8  # batches before their spread is believed


def relative_error(updates: int, spread: float, count: int, square: float) -> float:
    """sqrt(E|C - C_true|^2) / |C| of C = S / count, where |S|^2 is `square`, by a one-way analysis of variance.

    S is the sum of `updates` independent ones, S_g of n_g keys each; `spread` is their sum of |S_g|^2 / n_g. NaN where
    it is not known.
    """
    if updates < 2 or count == 0:
        return math.nan
    # of one key's worth; a difference that rounding can make negative
    variance = max(spread - square / count, 0.0) / (updates - 1)
    return math.sqrt(variance * count / square) if square else 0.0


class KeyErrors:
    """The relative standard errors of d = C^-1 k for a few keys k, in n x C numbers for each of ``GROUPS`` groups.

    Where C changes by E, d changes by -C^-1 E d. So whenever the number of batches has doubled, d is solved for, and
    from then on S d is summed over the batches (S: a batch's sum of k k^T), in groups. At the next doubling the
    spread of the groups, sent through C^-1, is the variance that one key's worth of data leaves in d; the error is that
    over the number of keys, and its root taken. First order in E: too low while d itself is off by tens of percent.
    """

    GROUPS = 32

    def __init__(self, keys: Tensor, channels: int):
        if not isinstance(keys, Tensor) or keys.is_nested or keys.is_complex():
            what = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
            raise ArgumentError(f"Keys must be a plain tensor of real numbers, not {what}; use torch.as_tensor.")
        keys = torch.atleast_2d(keys).detach().to(device="cpu", dtype=torch.float64)
        if keys.ndim != 2 or keys.shape[1] != channels or len(keys) == 0:
            raise RewriteCoreError(f"Keys are rows [n, {channels}], not {list(keys.shape)}.")
        if not all_finite(keys) or not keys.any(1).all():
            raise NonFiniteError("The keys hold NaN or infinity, or only zeros, whose error is relative to nothing.")
        self._keys = keys
        self._device = keys.device  # where the batches are, and so these two
        self._directions = torch.zeros_like(keys)
        self._products = torch.zeros(self.GROUPS, *keys.shape, dtype=torch.float64, device="cpu")
        self._counts = [0] * self.GROUPS
        self._batches = 0
        self._variances = torch.full((len(keys),), torch.nan, dtype=torch.float64, device="cpu")
        self._solved = False
        self._evaluated = 0  # after so many batches, last

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, on the CPU."""
        return {
            "keys": self._keys,
            "directions": self._directions.cpu(),
            "products": self._products.cpu(),
            "counts": torch.tensor(self._counts, device="cpu"),
            "batches": torch.tensor(self._batches, device="cpu"),
            "variances": self._variances,
        }

    def resume(self, state: dict[str, Tensor], path: str | os.PathLike) -> None:
        """Go on from a checkpoint's state."""
        keys = state.get("keys")
        if (
            keys is None
            or (keys.shape, keys.dtype) != (self._keys.shape, self._keys.dtype)
            or not keys.equal(self._keys)
        ):
            raise MismatchError(f"The checkpoint {shown(path)} was made with other keys; resume with the same ones.")
        for name, tensor in self.state.items():
            saved = state.get(name)
            if saved is None or (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                raise FileFormatError(f"{shown(path)} holds no whole state of its keys' errors.")
        self._directions, self._products = state["directions"].clone(), state["products"].clone()
        self._variances = state["variances"].clone()
        self._counts, self._batches = state["counts"].tolist(), int(state["batches"])
        self._solved = bool(self._directions.any())

    @property
    def due(self) -> bool:
        """Whether :meth:`errors` has to be called before the next batch."""
        batches = self._batches
        return batches >= LEAST and batches & (batches - 1) == 0 and batches != self._evaluated

    def add(self, part: Tensor) -> int:
        """Take in a batch: its sum, as blocks. Returns its group, to :meth:`count` its keys in. Waits for a GPU the
        first time at most."""
        group = self._batches % self.GROUPS
        self._batches += 1
        if self._device != part.device:
            self._device = part.device
            self._directions, self._products = self._directions.to(part.device), self._products.to(part.device)
        if self._solved:
            self._products[group] += blocks.times(self._directions, part)
        return group

    def count(self, group: int, count: int) -> None:
        """Count the keys of a batch that was added."""
        if self._solved:
            self._counts[group] += count

    def errors(self, total: Tensor, count: int, noise: float) -> Tensor | None:
        """The errors, float64 [n], where they are known, after all batches that were taken in, whose sum is `total`.

        `noise` is how exact an entry of it is, relative to the roots of its diagonal's.
        """
        if self.due and count >= total.shape[-1]:
            self._evaluate(total, count, noise)
        return None if self._variances.isnan().any() else (self._variances / count).sqrt()

    def _evaluate(self, total: Tensor, count: int, noise: float) -> None:
        with silent(DiagonalShiftWarning):  # whoever solves with the result is told
            # N C, as a copy to divide by N would be one matrix more
            factor = blocks.factor(total, noise)

        def solve(rows: Tensor) -> Tensor:
            return blocks.solve(factor, rows).mul_(count)

        counts = torch.tensor(self._counts, dtype=torch.float64, device="cpu")
        used = counts > 0
        if used.any():
            counts, products = counts[used], self._products.cpu()[used]
            spread = solve(products.flatten(0, 1)).reshape(products.shape)
            whole = spread.sum(0).square().sum(1) / counts.sum()
            between = (spread.square().sum(2) / counts[:, None]).sum(0) - whole
            variances = between.clamp(min=0) / (len(counts) - 1)
            self._variances = variances / self._directions.cpu().square().sum(1)
        self._directions = solve(self._keys).contiguous().to(self._device)
        self._products.zero_()
        self._counts = [0] * self.GROUPS
        self._solved, self._evaluated = True, self._batches
