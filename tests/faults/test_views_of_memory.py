"""Kernels read what a tensor says, not what lies in its memory: negated views, axes of one entry, odd strides."""

from __future__ import annotations

import pytest
import torch

import rewrite_core as rc
from rewrite_core.ops import fit_low_rank, fit_projected, second_moment, spd_solve


def negated(*shape):
    """A lazily negated view: its memory has the numbers with the other sign."""
    view = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    return view


LOW_RANK = {"basis": (3, 16), "base": (4, 16), "target": (4, 16), "shift": (4, 16)}
PROJECTED = {"operator": (4, 3, 3, 4, 4), "base": (4, 4, 4), "target": (4, 4, 4), "shift": (4, 4, 4)}


@pytest.mark.parametrize("name", LOW_RANK)
def test_fit_low_rank_reads_the_sign(name):
    torch.manual_seed(0)
    given = {key: torch.randn(*shape) for key, shape in LOW_RANK.items()} | {name: negated(*LOW_RANK[name])}
    found, wanted = fit_low_rank(**given), fit_low_rank(**{k: v.resolve_neg().clone() for k, v in given.items()})
    assert torch.equal(found.coefficients, wanted.coefficients) and torch.equal(found.loss, wanted.loss)


@pytest.mark.parametrize("name", PROJECTED)
def test_fit_projected_reads_the_sign(name):
    torch.manual_seed(0)
    given = {key: torch.randn(*shape) for key, shape in PROJECTED.items()} | {name: negated(*PROJECTED[name])}
    found = fit_projected(**given, steps=3)
    wanted = fit_projected(**{k: v.resolve_neg().clone() for k, v in given.items()}, steps=3)
    assert torch.equal(found.coefficients, wanted.coefficients) and torch.equal(found.losses, wanted.losses)


def test_second_moments_and_solves_read_the_sign():
    torch.manual_seed(0)
    features = negated(5, 6, 3, 3)
    assert torch.equal(second_moment(features), second_moment(features.resolve_neg().clone()))
    root = torch.randn(8, 8)
    matrix = root @ root.T + torch.eye(8)
    complex_matrix = torch.complex(torch.zeros(8, 8), -matrix).conj()
    rhs = negated(8, 2)
    assert complex_matrix.imag.is_neg()
    found = spd_solve(complex_matrix.imag, rhs)
    assert torch.equal(found, spd_solve(matrix, rhs.resolve_neg().clone()))
    with pytest.raises(rc.ArgumentError, match="negated"):
        second_moment(torch.randn(5, 6), out=torch._neg_view(torch.zeros(6, 6, dtype=torch.float64)))


def test_a_moment_of_negated_keys():
    keys = negated(100, 6)
    one, other = rc.SecondMoment(6), rc.SecondMoment(6)
    one.update(keys)
    other.update(keys.resolve_neg().clone())
    assert torch.equal(one.matrix(), other.matrix())


@pytest.mark.parametrize(("height", "width"), [(4, 1), (1, 4), (1, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_axes_of_one_entry_have_any_stride(height, width, channels):
    """A shift that is a transposed view: its stride over an axis of one entry says nothing."""
    torch.manual_seed(0)
    operator = torch.randn(2, 3, 3, height, width)
    base, target = torch.randn(channels, height, width), torch.randn(channels, height, width)
    for shift in (
        torch.randn(channels, width, height).mT,
        torch.randn(1, width, height).mT,
        torch.randn(height, width, channels).permute(2, 0, 1),
        torch.randn(channels, 2 * height, 3 * width)[:, ::2, ::3],
        torch.randn(channels, 1, 1),
    ):
        both = [
            fit_projected(operator, base, target, shift=shift, steps=3, backend=backend).losses
            for backend in ("cpp", "reference")
        ]
        assert torch.allclose(*both, rtol=1e-5, atol=1e-6)
        low = [
            fit_low_rank(
                torch.randn(2, height * width, generator=torch.Generator().manual_seed(2)),
                base.flatten(1),
                target.flatten(1),
                shift=shift.expand(base.shape).flatten(1),
                backend=backend,
            ).loss
            for backend in ("cpp", "reference")
        ]
        assert torch.allclose(*low, rtol=1e-4, atol=1e-6)
