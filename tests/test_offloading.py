"""Generators that accelerate keeps elsewhere between passes: the edited layer is gathered, the rest left."""

import copy

import pytest
import torch
from torch import nn

import rewrite_core as rc
from rewrite_core.demo import chapels, load_edit

accelerate = pytest.importorskip("accelerate", reason="the extra `export` is not installed")

OF_VALUES = {"objective": "value", "region": "map", "loss": "l2"}


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    ).eval()


def maps(count=6):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def offloaded(kind, generator, folder):
    if kind == "cpu_offload":
        return accelerate.cpu_offload(generator, offload_buffers=True)
    places = {name: "disk" for name, _ in generator.named_children()} | {"0": "cpu"}
    return accelerate.dispatch_model(generator, places, offload_dir=folder, offload_buffers=True)


def away(generator):
    return {name for name, tensor in generator.state_dict().items() if tensor.is_meta}


@pytest.mark.parametrize("kind", ["cpu_offload", "disk"])
def test_the_edited_layer_is_gathered_and_the_rest_left(kind, tmp_path):
    plain = make()
    generator = offloaded(kind, copy.deepcopy(plain), tmp_path)
    before = away(generator)
    assert {"3.weight", "3.bias", "5.weight", "1.running_mean"} <= before
    layer, own = rc.bind(generator, "3"), rc.bind(plain, "3")
    assert away(generator) == before - {"3.weight", "3.bias"}
    z = maps()
    assert torch.equal(layer.keys(z), own.keys(z)) and layer.fingerprint(z) == own.fingerprint(z)
    moment = rc.collect_second_moment(layer, z, progress=False)
    assert torch.equal(moment.matrix(), rc.collect_second_moment(own, z, progress=False).matrix())
    mask = torch.zeros(6, 6)
    mask[1:4, 1:4] = 1
    edit = rc.Edit(copy=rc.Selection(0, mask), paste=rc.Selection(1, mask), context=[rc.Selection(2, mask)])
    with torch.no_grad():
        images = generator(z)
    change = rc.rewrite(layer, moment, edit, z, **OF_VALUES)
    assert torch.equal(change.coefficients, rc.rewrite(own, moment, edit, z, **OF_VALUES).coefficients)
    with change, torch.no_grad():
        edited = generator(z)
        assert torch.equal(edited, generator(z)) and not torch.equal(edited, images)
        with change.__class__.apply(rc.Rewrite.load(saved(change, tmp_path)), plain):
            assert torch.equal(edited, plain(z))
    with torch.no_grad():
        assert torch.equal(generator(z), images)
    assert away(generator) == before - {"3.weight", "3.bias"}
    # the hooks can be taken off as before
    accelerate.hooks.remove_hook_from_submodules(generator)
    assert not away(generator) and torch.equal(generator[3].weight, plain[3].weight)


def saved(change, folder):
    change.save(folder / "rule")
    return folder / "rule"


def test_weights_of_another_generator_are_noticed_where_they_are_offloaded(tmp_path):
    z, other = maps(), make()
    with torch.no_grad():
        other[0].weight.mul_(1.1)
    moment = rc.collect_second_moment(rc.bind(make(), "3"), z, progress=False)
    moment.check(rc.bind(offloaded("cpu_offload", make(), tmp_path), "3"), z)
    with pytest.raises(rc.MismatchError, match="other weights before"):
        moment.check(rc.bind(offloaded("cpu_offload", other, tmp_path), "3"), z)


def test_a_layer_whose_parts_are_modules(tmp_path):
    """Of a StyleGAN2 layer the modulation, the noise and the bias are gathered, too."""
    plain, z = chapels(), rc.sample_latents(16, 300)
    generator = accelerate.cpu_offload(chapels(), offload_buffers=True)
    name = "synthesis.layer4.conv"
    layer, own = rc.bind(generator, name), rc.bind(plain, name)
    moment = rc.collect_second_moment(layer, z[:64], progress=False)
    moment.check(own, z)
    whole = rc.sample_latents(16, 1000, seed=1)
    change = rc.rewrite(layer, moment, load_edit("spire"), whole, rank=2, **OF_VALUES)
    wanted = rc.rewrite(own, moment, load_edit("spire"), whole, rank=2, **OF_VALUES)
    assert torch.equal(change.coefficients, wanted.coefficients)
    with change, wanted, torch.no_grad():
        assert torch.equal(generator(z[:2]), plain(z[:2]))


def test_a_tied_weight_is_left_and_refused():
    """An edit of it would miss the other module, whose weight a hook brings."""
    generator = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    generator[2].weight = generator[0].weight
    accelerate.cpu_offload(generator)
    z = torch.randn(5, 6)
    with torch.no_grad():
        wanted = generator(z)
    with pytest.raises(rc.UnknownLayerError, match="offloaded"):
        rc.bind(generator, "2")
    with torch.no_grad():
        assert torch.equal(generator(z), wanted)
