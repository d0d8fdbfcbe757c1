"""Key -> value pairs given directly (paper, eq. 6 to 9)."""

import pytest
import torch
from test_families_conv import make, relative, tokens
from torch import nn

import rewrite_core as rc


@pytest.fixture
def model():
    return make("language").eval()


@pytest.fixture
def layer(model):
    return rc.bind(model, "fc2")


@pytest.fixture
def moment(layer):
    return rc.collect_second_moment(layer, tokens(64), progress=False)


def pairs(layer, count=3):
    keys = layer.keys(tokens(64))[:, :, 3][10 : 10 + count]
    return keys, torch.randn(count, layer.out_channels, generator=torch.Generator().manual_seed(0))


def test_one_pair_is_met_along_the_closed_form_s_direction(layer, moment):
    """W1 = W0 + Lambda (C^-1 k*)^T, with Lambda such that W1 k* = v* (eq. 9 and 10)."""
    keys, values = pairs(layer, 1)
    change = rc.insert(layer, moment, keys, values)
    assert change.solver == "closed_form" and change.edit is None and change.final_loss < 1e-9
    direction = moment.solve(keys[0])
    left = values[0].double() - layer.module(keys[0]).double()
    wanted = torch.outer(left, direction) / (direction @ keys[0].double())
    assert relative(change.weight_delta().double(), wanted) < 1e-4
    with change, torch.no_grad():
        assert torch.allclose(layer.module(keys), values, atol=1e-4)


def test_several_pairs(layer, moment):
    keys, values = pairs(layer, 3)
    change = rc.insert(layer, moment, keys, values, rank=3)
    with change, torch.no_grad():
        assert torch.allclose(layer.module(keys), values, atol=1e-3)
    below = rc.insert(layer, moment, keys, values, rank=1)
    assert change.final_loss < below.final_loss < below.losses[0]
    slow = rc.insert(layer, moment, keys, values, rank=2, solver=rc.Adam(steps=2000))
    best = rc.insert(layer, moment, keys, values, rank=2)
    assert slow.solver == "adam" and best.final_loss <= slow.final_loss * (1 + 1e-4)
    kept = rc.insert(layer, moment, keys, values, rank=3, preserve=10.0)
    assert kept.weight_delta().norm() < change.weight_delta().norm()


@pytest.mark.parametrize("solver", [rc.Projected(400, 0.01), rc.Unconstrained(400, 0.01)])
def test_the_solvers_of_pictures_insert_too(layer, moment, solver):
    keys, values = pairs(layer, 2)
    change = rc.insert(layer, moment, keys, values, rank=2, solver=solver)
    assert change.solver == solver.name and change.final_loss < change.losses[0]
    with change, torch.no_grad():
        assert (layer.module(keys) - values).square().mean().item() == pytest.approx(change.final_loss, rel=1e-3)


def test_the_context_says_where(layer, moment):
    keys, values = pairs(layer, 1)
    context = layer.keys(tokens(64))[:, :, 5][:8]
    change = rc.insert(layer, moment, keys, values, context=context, weights=torch.ones(8))
    wanted = rc.context_directions(moment, context)
    assert torch.allclose(change.directions.double(), wanted, atol=1e-5)


def test_a_1x1_convolution_takes_pairs_too(moment, layer):
    keys, values = pairs(layer, 2)
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(24, 12, 1))
    conv[0].load_state_dict({"weight": layer.module.weight[:, :, None, None], "bias": layer.module.bias})
    other = rc.SecondMoment(24)
    other._sum.copy_(moment._sum)
    other.count = moment.count
    change = rc.insert(rc.bind(conv, "0"), other, keys, values, rank=2)
    same = rc.insert(layer, moment, keys, values, rank=2)
    assert relative(change.weight_delta()[:, :, 0, 0], same.weight_delta()) < 1e-4


def test_a_saved_insertion(layer, moment, model, tmp_path):
    change = rc.insert(layer, moment, *pairs(layer, 2), rank=2)
    change.save(tmp_path / "c.safetensors")
    loaded = rc.Rewrite.load(tmp_path / "c.safetensors")
    with loaded.apply(model), torch.no_grad():
        once = layer.parameter.clone()
    with change:
        assert torch.equal(layer.parameter, once)


def test_what_cannot_be_inserted(layer, moment):
    keys, values = pairs(layer, 2)
    with pytest.raises(rc.RewriteCoreError, match=r"keys must be rows \[2, 24\]"):
        rc.insert(layer, moment, keys[:, :5], values)
    with pytest.raises(rc.RewriteCoreError, match=r"values must be rows \[2, 12\]"):
        rc.insert(layer, moment, keys, values[:1])
    with pytest.raises(rc.NonFiniteError, match="values hold NaN"):
        rc.insert(layer, moment, keys, values * torch.nan)
    with pytest.raises(rc.SolverError, match="no preserve term"):
        rc.insert(layer, moment, keys, values, solver="projected", preserve=0.1)
    with pytest.raises(rc.RankError):
        rc.insert(layer, moment, keys, values, rank=3)
    conv = rc.bind(make("sequence"), "conv")
    with pytest.raises(rc.SolverError, match="does not compute its value from one key"):
        rc.insert(conv, rc.SecondMoment(8), torch.ones(1, 8), torch.ones(1, 9))
    strided = rc.bind(nn.Sequential(nn.Conv2d(8, 9, 1, stride=2)), "0")
    with pytest.raises(rc.SolverError, match="stride"):
        rc.insert(strided, rc.SecondMoment(8), torch.ones(1, 8), torch.ones(1, 9))
