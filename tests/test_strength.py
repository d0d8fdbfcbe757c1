"""How much of a change, and how large it is."""

import copy
import json

import pytest
import torch
from conftest import same_bits, state_bits
from helpers import reference
from safetensors import safe_open

import rewrite_core as rc
from rewrite_core.rewrites.change import _norm as weight_norm
from rewrite_core.solvers.problem import combine


@pytest.fixture
def changes(moment, layer, edit, latents):
    other = rc.Edit(copy=edit.paste, paste=edit.context[0])
    return reference.rewrite_many(layer, moment, [edit, other], latents)


@pytest.mark.parametrize("strength", [0.5, -1, 2.25, 1e-3, 0])
def test_the_weight_is_w0_and_so_much_of_the_change(generator, layer, changes, strength):
    before, w0 = state_bits(generator), layer.weight.double()
    changes[0].apply(strength=strength)
    wanted = w0 + strength * changes[0].weight_delta().double()
    assert (layer.weight.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert changes[0].applied
    changes[0].revert()
    assert same_bits(before, state_bits(generator))


def test_one_is_what_it_was_without(generator, layer, changes):
    w0 = layer.weight.clone()
    changes[0].apply(strength=1.0)
    assert torch.equal(layer.weight, w0 + changes[0].weight_delta())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_stacked_rewrites_keep_their_strengths(generator, layer, changes, order):
    before, w0 = state_bits(generator), layer.weight.clone()
    changes[0].apply(strength=0.3)
    changes[1].apply(strength=-0.7)
    first, second = (changes[i] for i in order)
    first.revert()
    left = combine(second.coefficients.double(), second.directions.double())
    left *= -0.7 if first is changes[0] else 0.3
    assert torch.equal(layer.weight, w0 + left.float())
    second.revert()
    assert same_bits(before, state_bits(generator))


def test_a_copy_of_the_generator_keeps_the_record(generator, changes):
    before = state_bits(generator)
    changes[0].apply(strength=0.3)
    twin = copy.deepcopy(generator)
    with pytest.raises(rc.MismatchError, match="already"):
        changes[0].apply(strength=0.5)
    changes[0].revert(twin)
    assert same_bits(before, state_bits(twin))


@pytest.mark.parametrize("strength", ["1", None, True, float("nan"), float("inf")])
def test_bad_strengths(generator, changes, strength):
    before = state_bits(generator)
    with pytest.raises(rc.RewriteCoreError, match="strength must be a number"):
        changes[0].apply(strength=strength)
    assert same_bits(before, state_bits(generator))


# --- the size ------------------------------------------------------------------------------------------


def true_size(layer, change):
    """|dW| / |W0| of the weights that the generator stores."""
    native = layer.to_native(change.weight_delta().double())
    return (native.norm() / layer.parameter.double().norm()).item()


def test_the_size_of_a_change(layer, changes, tmp_path):
    for change in changes:
        assert change.size == pytest.approx(true_size(layer, change), rel=1e-6) and change.size > 0
    changes[0].save(tmp_path / "c.safetensors")
    assert rc.Rewrite.load(tmp_path / "c.safetensors").size == changes[0].size
    assert f"{changes[0].size:.2f}" in changes[0]._repr_html_()


@pytest.mark.parametrize("scale", [1, 1e-5, 1e-23, 1e-30, 1e17, 1e19, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_of_a_weight_of_any_size(scale, dtype):
    for shape in ((16, 8, 3, 3), (1, 500), (500, 1)):
        weight = (torch.randn(shape) * scale).to(dtype)
        assert weight_norm(weight).item() == pytest.approx(weight.double().norm().item(), rel=1e-6)
    weight[3] = torch.nan
    assert weight_norm(weight).isnan()


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_of_a_grouped_layer_only_what_is_used_counts(groups):
    torch.manual_seed(0)
    generator = torch.nn.Sequential(
        torch.nn.Unflatten(1, (8, 4, 4)), torch.nn.Conv2d(8, 16, 3, padding=1, groups=groups)
    )
    layer, z = rc.bind(generator, "1"), rc.sample_latents(128, 60)
    moment = rc.collect_second_moment(layer, z, progress=False)
    edit = rc.Edit(rc.Selection.box(0, (0, 0, 3, 3), 4), rc.Selection.box(1, (1, 1, 4, 4), 4))
    change = reference.rewrite(layer, moment, edit, z, rank=2, loss="l2", region="map")
    assert change.size == pytest.approx(true_size(layer, change), rel=1e-5)


def test_a_file_that_does_not_say_has_no_size_until_it_is_applied(generator, changes, tmp_path):
    change = changes[0]
    loose = rc.Rewrite(change.layer, change.directions, change.coefficients, change.fitted_to, "lm")
    loose.save(tmp_path / "c.safetensors")
    loaded = rc.Rewrite.load(tmp_path / "c.safetensors")
    assert loaded.size is None
    with loaded.apply(generator, strength=0.5):
        assert loaded.size == pytest.approx(change.size, rel=1e-6)


def test_what_is_not_finite_is_not_written(moment, layer, edit, latents, tmp_path):
    """JSON has no NaN and no infinity."""
    with torch.no_grad():
        layer.parameter.zero_()
    change = reference.rewrite(layer, moment, edit, latents)
    assert change.size == float("inf")
    change.losses, change.final_loss = [float("nan"), 1.0], float("inf")
    change.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        text = file.metadata()["metadata"]
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    loaded = rc.Rewrite.load(tmp_path / "c.safetensors")
    assert loaded.size is None and loaded.losses == [] and loaded.final_loss is None
