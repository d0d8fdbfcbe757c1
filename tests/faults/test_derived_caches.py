"""Derived caches: after every write, what torch keeps of the weight as it was is gone."""

import contextlib

import pytest
import torch
from helpers.small import Z, bits, fit, generator, same
from torch.nn.utils import parametrizations, parametrize, spectral_norm

KINDS = {"stored": lambda module: module, "parametrized": parametrizations.spectral_norm, "hooked": spectral_norm}


@contextlib.contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.fixture(params=[autocast, parametrize.cached], ids=["autocast", "cached"])
def cache(request):
    return request.param


@pytest.fixture(params=KINDS)
def G(request):
    return generator(KINDS[request.param])


def pictures(G):
    """With gradients recorded, as autocast keeps casts of those weights alone."""
    return G(Z[:4]).detach()


def test_apply_and_revert(G, cache):
    _, change = fit(G)
    with change, cache():
        edited = pictures(G)
    with cache():
        plain = pictures(G)
        change.apply()
        assert torch.equal(pictures(G), edited) and not torch.equal(edited, plain)
        change.revert()
        assert torch.equal(pictures(G), plain)
        with change:
            assert torch.equal(pictures(G), edited)
        assert torch.equal(pictures(G), plain)


def test_strengths_and_stacks(G, cache):
    _, change = fit(G)
    with cache():
        plain = pictures(G)
        change.apply(strength=0.5)
        half = pictures(G)
        change.revert()
        change.apply(strength=-0.5)
        assert not torch.equal(pictures(G), half) and not torch.equal(pictures(G), plain)
        change.revert()
        assert torch.equal(pictures(G), plain)


def test_a_state_dict_leaves_the_caches_and_reads_no_stale_weight(G, cache):
    _, change = fit(G)
    wanted = change.state_dict()
    with cache():
        before = pictures(G)
        found = change.state_dict()
        assert torch.equal(pictures(G), before)
    assert list(found) == list(wanted) and all(torch.equal(found[key], wanted[key]) for key in found)


@pytest.mark.parametrize("kind", ["stored", "parametrized"])
def test_a_parametrization_is_switched_and_removed(kind, cache):
    G = generator(KINDS[kind])
    before = bits(G)
    _, change = fit(G)
    with cache():
        plain = pictures(G)
        switch = change.parametrize()
        edited = pictures(G)
        assert not torch.equal(edited, plain)
        switch.enabled = False
        assert torch.equal(pictures(G), plain)
        switch.enabled = True
        assert torch.equal(pictures(G), edited)
        switch.remove()
        assert torch.equal(pictures(G), plain)
    assert same(before, G)


def test_a_compiled_generator_sees_the_change():
    G = generator()
    _, change = fit(G)
    with torch.no_grad():
        compiled = torch.compile(G, backend="eager")
        plain = compiled(Z[:4])
        with change:
            edited = compiled(Z[:4])
            assert torch.equal(edited, G(Z[:4]))
        assert torch.equal(compiled(Z[:4]), plain) and not torch.equal(edited, plain)
    torch.compiler.reset()
