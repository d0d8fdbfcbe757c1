"""Matrices of key channels: whole ones [C, C], and those of layers whose channels fall into groups, of which only the
blocks on the diagonal are kept, [G, C/G, C/G]. Both are called blocks here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DiagonalShiftWarning, warn
from ..ops.spd_solve_op.factor import SPDFactor, spd_factor
from ..ops.spd_solve_op.problem import EPSILON, SMALLEST


def empty(channels: int, groups: int) -> tuple[int, ...]:
    """The shape of the blocks of so many channels in so many groups."""
    return (channels, channels) if groups == 1 else (groups, channels // groups, channels // groups)


def groups_of(blocks: Tensor) -> int:
    return 1 if blocks.ndim == 2 else len(blocks)


def channels_of(blocks: Tensor) -> int:
    return groups_of(blocks) * blocks.shape[-1]


def diagonal(blocks: Tensor) -> Tensor:
    """The diagonal [C]."""
    return blocks.diagonal(dim1=-2, dim2=-1).flatten()


def whole(blocks: Tensor) -> Tensor:
    """[C, C], zero between groups."""
    if blocks.ndim == 2:
        return blocks
    channels, size = channels_of(blocks), blocks.shape[-1]
    matrix = blocks.new_zeros(channels, channels)
    matrix.unflatten(1, (-1, size)).unflatten(0, (-1, size)).diagonal(dim1=0, dim2=2).copy_(blocks.movedim(0, -1))
    return matrix


def within(matrix: Tensor, groups: int) -> Tensor:
    """The blocks of a whole matrix [C, C], a copy."""
    parts = matrix.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    return parts.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def times(rows: Tensor, blocks: Tensor) -> Tensor:
    """rows [n, C] times the matrix, [n, C]."""
    if blocks.ndim == 2:
        return rows @ blocks
    return torch.bmm(rows.unflatten(1, (len(blocks), -1)).transpose(0, 1), blocks).transpose(0, 1).flatten(1)


def gram(rows: Tensor, blocks: Tensor) -> Tensor:
    """rows C rows^T of rows [n, C], [n, n]."""
    return times(rows, blocks) @ rows.T


def grams(rows: Tensor, blocks: Tensor) -> Tensor:
    """The part of :func:`gram` that each of several groups has, [G, n, n]."""
    own = rows.unflatten(1, (len(blocks), -1)).transpose(0, 1)  # [G, n, C/G]
    return own @ blocks @ own.mT


def factor(blocks: Tensor, noise: float, rank: int | None = None) -> SPDFactor:
    """The Cholesky factor, as :func:`spd_factor` makes it; of groups a batch of factors. A group whose keys are all
    zero counts as one of very small ones, with a DiagonalShiftWarning."""
    if blocks.ndim == 3:
        means = blocks.diagonal(dim1=-2, dim2=-1).mean(1)
        mean = means.mean()
        dead = means < SMALLEST
        if mean > 0 and dead.any():
            blocks = blocks.clone()
            blocks[dead] = EPSILON * mean * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
            warn(
                f"The keys of {int(dead.sum())} of {len(blocks)} groups of channels are all zero, so C has no inverse "
                f"there; {EPSILON:.0e} of its mean diagonal stands in their place.",
                DiagonalShiftWarning,
            )
    return spd_factor(blocks, noise=noise, rank=rank)


def solve(found: SPDFactor, rows: Tensor) -> Tensor:
    """C^-1 of each row [n, C]."""
    if found.matrix.ndim == 2:
        return found.solve(rows.T).T
    columns = rows.T.unflatten(0, (len(found.matrix), -1)).contiguous()
    return found.solve(columns).flatten(0, 1).T


def whiten(found: SPDFactor, rows: Tensor) -> Tensor:
    """rows L^-T of rows [n, C], where C = L L^T."""
    return _triangular(found.lower, rows.T, upper=False).T


def directions_of(found: SPDFactor, white: Tensor) -> Tensor:
    """white L^-1 of rows [n, C]: what :func:`whiten` of keys is their product with."""
    return _triangular(found.lower.mT, white.T, upper=True).T


def _triangular(lower: Tensor, columns: Tensor, upper: bool) -> Tensor:
    if lower.ndim == 2:
        return torch.linalg.solve_triangular(lower, columns, upper=upper)
    parts = columns.unflatten(0, (len(lower), -1))
    return torch.linalg.solve_triangular(lower, parts, upper=upper).flatten(0, 1)
