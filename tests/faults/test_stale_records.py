"""A stale record: a weight that was trained or loaded over while a rewrite was applied is the weight."""

import copy
import warnings

import pytest
import torch
from helpers.small import bits, fit, generator, same
from torch.nn.utils import parametrizations

import rewrite_core as rc


def loaded_over(G):
    """Another checkpoint, while a rewrite is on."""
    torch.manual_seed(5)
    G.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in G.state_dict().items()})


def trained(G):
    G.requires_grad_(True)
    optimiser = torch.optim.SGD(G.parameters(), 0.1)
    G(torch.randn(4, 16)).square().mean().backward()
    optimiser.step()


@pytest.fixture(params=[loaded_over, trained])
def stale(request):
    """A generator that something else has changed while a rewrite was on it, and that rewrite."""
    G = generator()
    _, first = fit(G)
    first.apply()
    request.param(G)
    return G, first


def test_a_change_of_the_present_weight_applies(stale):
    G, first = stale
    present = bits(G)
    _, second = fit(G)
    with pytest.warns(UserWarning, match="changed by something else.*no longer be reverted"):
        second.apply()
    assert second.applied and not first.applied
    second.revert()
    assert same(present, G)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once was enough
        second.apply().revert()
    with pytest.raises(rc.MismatchError, match="not applied"):
        first.revert()
    assert same(present, G)


def test_its_state_dict_and_parametrization_too(stale):
    G, _ = stale
    present = bits(G)
    layer, second = fit(G)
    with pytest.warns(UserWarning, match="changed by something else"):
        state = second.state_dict()
    assert torch.equal(state["4.weight"], layer.weight + second.weight_delta()) and same(present, G)
    second.parametrize().remove()
    assert same(present, G)


def test_a_change_of_another_weight_is_refused_and_nothing_is_lost(stale):
    G, first = stale
    present = bits(G)
    other = copy.deepcopy(first)
    other.coefficients = 0.5 * first.coefficients
    with pytest.raises(rc.MismatchError, match="something else.*fitted to it as it is now can be applied") as caught:
        other.apply(G)
    assert "revert" not in str(caught.value), "that would put the old weight over the new one"
    with pytest.raises(rc.MismatchError, match="leave it, to keep what it is now"):
        first.revert()
    assert same(present, G)
    other.apply(G, force=True).revert(G)
    assert same(present, G)


def test_of_a_computed_weight_that_is_folded():
    G = generator(parametrizations.spectral_norm)
    layer, first = fit(G)
    before = bits(G)
    first.apply()
    with torch.no_grad():
        layer.parameter.add_(0.01)
    layer, second = fit(G)
    with pytest.warns(UserWarning, match="changed by something else"):
        second.apply()
    second.revert()
    assert same(before, G), "the norm is back, whose own weight nothing has changed"
