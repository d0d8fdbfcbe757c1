import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import rewrite_core as rc
from rewrite_core.families import ProgGAN, StyleGAN2
from rewrite_core.solvers import basis_maps, combine


class DCGAN(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (12, 1, 1)),
            nn.ConvTranspose2d(12, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 10, 5, 2, 2, output_padding=1), nn.BatchNorm2d(10), nn.LeakyReLU(0.2),
            nn.Conv2d(10, 8, 3, 1, 1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, (3, 5), stride=2, padding=(1, 2), dilation=1), nn.ReLU(),
            nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    if kind == "proggan":
        return ProgGAN([12, 16, 16, 12, 8])
    if kind == "stylegan2":
        generator = StyleGAN2(16, style_dim=12, n_mlp=2, channels={4: 16, 8: 12, 16: 8})
        for name, parameter in generator.named_parameters():
            if name.endswith(("noise.weight", "activate.bias")):
                nn.init.normal_(parameter)  # published checkpoints have none of these at zero
        return generator
    generator = DCGAN()
    generator(torch.randn(64, 12))  # running statistics of its own
    return generator


CASES = [(kind, info.name) for kind in ("proggan", "stylegan2", "dcgan") for info in rc.list_layers(make(kind), torch.randn(1, 12))]


def latents(count=24):
    return rc.sample_latents(12, count, seed=5)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_every_convolution_is_listed():
    names = [name for kind, name in CASES if kind == "dcgan"]
    assert names == ["1", "4", "7", "10", "12"]
    assert [name for kind, name in CASES if kind == "proggan"] == [f"layer{i}.conv" for i in range(1, 9)] + ["output_32x32.conv"]
    assert {name for kind, name in CASES if kind == "stylegan2"} == {
        "conv1.conv", "to_rgb1.conv", *(f"convs.{i}.conv" for i in range(4)), *(f"to_rgbs.{i}.conv" for i in range(2)),
    }  # fmt: skip
    solvers = {info.name: info.solver for info in rc.list_layers(make("stylegan2"), latents())}
    assert solvers["convs.0.conv"] == "lm" and solvers["to_rgb1.conv"] == "closed_form"


@pytest.mark.parametrize("kind, name", CASES)
def test_value_is_what_the_generator_computes(kind, name):
    generator = make(kind).eval()
    layer = rc.bind(generator, name)
    seen = []
    handle = layer._layer.site.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        generator(latents(3))
    handle.remove()
    assert relative(layer.values(latents(3)), seen[0]) < 1e-5
    keys = layer.keys(latents(3))
    assert keys.shape[:2] == (3, layer.in_channels) and seen[0].shape[1] == layer.out_channels


@pytest.mark.parametrize("kind, name", CASES)
def test_keys_times_weight_reproduce_the_linear_output(kind, name):
    """The basis of all I one-hot directions times the weight is the linear output: the operator is linear in the key."""
    layer = rc.bind(make(kind), name)
    keys = layer.keys(latents(2))
    basis = basis_maps(layer, keys, torch.eye(layer.in_channels))
    product = torch.einsum("oj,njhw->nohw", layer.weight.flatten(1), basis)
    assert relative(product, layer.linear(keys, layer.weight)) < 1e-5


@pytest.mark.parametrize("kind, name", CASES)
def test_the_applied_change_is_what_the_solver_predicted(kind, name):
    generator = make(kind).eval()
    layer = rc.bind(generator, name)
    z = latents()
    moment = rc.collect_second_moment(layer, z, progress=False)
    size = layer.values(z[:1]).shape[2]
    mask = torch.zeros(size, size)
    mask[: max(1, size // 2), : max(1, size // 2)] = 1
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask), context=[rc.Selection(2, mask), rc.Selection(3, mask)])
    before = copy.deepcopy(generator.state_dict())
    images = generator(z).detach()
    whole = {"tight": False} if (kind, name) == ("dcgan", "7") else {}  # reflection padding has no crops
    for options in ({}, {"loss": "l2"}, {"tight": False}, {"solver": "projected", "steps": 11}):
        change = rc.rewrite(layer, moment, edit, z, **whole | options)
        assert change.solver == options.get("solver", change.solver)
        if "solver" not in options:
            assert change.final_loss <= change.losses[0]
        capture = layer.capture(z[2:3])
        with torch.no_grad():
            predicted = layer.value(capture, layer.weight + combine(change.coefficients, change.directions))
        with change:
            assert relative(layer.values(z[2:3]), predicted) < 1e-4
            moved = change.coefficients.abs().max() > 0  # the l1 optimum over a whole map can be no change at all
            assert torch.equal(generator(z), images) != bool(moved)
        after = generator.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        if options.get("loss") == "l2":
            assert moved and change.solver in ("closed_form", "lm")
    assert torch.equal(generator(z), images)


@pytest.mark.parametrize("kind", ["proggan", "stylegan2", "dcgan"])
@pytest.mark.parametrize("training", [False, True])
def test_binding_leaves_the_generator_as_it_was(kind, training):
    generator = make(kind).train(training)
    z = latents(6)
    before, state = generator(z).detach(), copy.deepcopy(generator.state_dict())
    for info in rc.list_layers(generator, z):
        layer = rc.bind(generator, info.name)
        layer.keys(z), layer.values(z), layer.fingerprint(z), layer.render(z)
    assert generator.training == training
    assert all(module.training == training for module in generator.modules())
    assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in generator.modules())
    if not training:  # in train mode batch normalisation updates itself, with or without us
        assert torch.equal(generator(z), before)


def test_hooks_go_even_when_the_generator_fails():
    generator = make("dcgan")
    layer = rc.bind(generator, "4")
    with pytest.raises(RuntimeError):
        layer.keys(torch.randn(2, 13))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in generator.modules())
    assert generator.training


def test_nothing_keeps_the_generator_alive():
    generator = make("proggan")
    layer = rc.bind(generator, "layer5.conv")
    layer.keys(latents(2))
    alive = weakref.ref(generator)
    del generator, layer
    gc.collect()
    assert alive() is None


def test_render_with_its_own_value_is_the_image():
    for kind, name in (("proggan", "layer5.conv"), ("stylegan2", "convs.1.conv"), ("dcgan", "4")):
        generator = make(kind).eval()
        layer = rc.bind(generator, name)
        z = latents(3)
        assert torch.allclose(layer.render(z, layer.values(z)), generator(z), atol=1e-5)
        assert not torch.allclose(layer.render(z, torch.zeros_like(layer.values(z))), generator(z), atol=1e-4)


def test_short_names_of_stylegan2_and_proggan():
    assert rc.bind(make("stylegan2"), "convs.1").name == "convs.1.conv"
    assert rc.bind(make("proggan"), "layer3").name == "layer3.conv"
    assert rc.bind(make("proggan"), "layer3.conv", family="conv").family == "conv"


def test_forward_callable():
    generator = make("stylegan2")
    layer = rc.bind(generator, "convs.1", forward=lambda g, z: g(z, noise="none"))
    assert "noise" not in layer.capture(latents(1)).extra
    assert "noise" in rc.bind(generator, "convs.1").capture(latents(1)).extra


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind, name", [("proggan", "layer5.conv"), ("stylegan2", "convs.1.conv"), ("stylegan2", "convs.2.conv")])
def test_other_precisions(kind, name, dtype):
    generator = make(kind).to(dtype).eval()
    layer = rc.bind(generator, name)
    z = latents()
    moment = rc.collect_second_moment(layer, z, progress=False)
    mask = torch.ones(8, 8)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    before = layer.weight.clone()
    for solver in ("lm", "projected"):
        change = rc.rewrite(layer, moment, edit, z, solver=solver, steps=11)
        with change:
            assert layer.parameter.dtype == dtype and not torch.equal(layer.weight, before)
        assert torch.equal(layer.weight, before)


def test_channels_last_generators():
    generator = make("dcgan").eval().to(memory_format=torch.channels_last)
    layer = rc.bind(generator, "7")
    plain = rc.bind(make("dcgan").eval(), "7")
    assert torch.allclose(layer.keys(latents(2)), plain.keys(latents(2)), atol=1e-5)


@pytest.mark.parametrize("name, words", [
    ("layer5.cnv", "layer5.conv"), ("Layer5.conv", "layer5.conv"), ("layer55.conv", "layer5.conv"),
    ("layer5.relu", "LeakyReLU"), ("", "ProgGAN"),
])  # fmt: skip
def test_unknown_layers_suggest_names(name, words):
    with pytest.raises(rc.UnknownLayerError, match=words) as caught:
        rc.bind(make("proggan"), name)
    assert "did you mean" in str(caught.value)


def test_what_cannot_be_edited_says_why():
    with pytest.raises(rc.UnknownLayerError, match="grouped"):
        rc.bind(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0")
    with pytest.raises(rc.UnknownLayerError, match="parametrization"):
        rc.bind(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))), "0")
    with pytest.raises(rc.UnknownLayerError, match="no bindable"):
        rc.bind(nn.Sequential(nn.Linear(4, 4)), "0")
    with pytest.raises(rc.RewriteCoreError, match="torch.nn.Module"):
        rc.bind("generator", "0")
    with pytest.raises(rc.UnknownLayerError, match="family"):
        rc.bind(make("dcgan"), "1", family="stylegan2")


def test_a_layer_that_never_runs():
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(12, 3, 1), nn.Conv2d(12, 3, 1)

        def forward(self, z):
            return self.used(z[:, :, None, None])

    with pytest.raises(rc.UnknownLayerError, match="never reached"):
        rc.bind(Generator(), "unused").keys(latents(1))


def test_latents_are_the_reference_rows():
    import numpy as np

    rows = np.random.RandomState(1).standard_normal(200 * 64).reshape(200, 64)
    assert torch.equal(rc.sample_latents(64, 200), torch.from_numpy(rows).float())
    assert torch.equal(rc.sample_latents(64, 10), rc.sample_latents(64, 200)[:10])
    with pytest.raises(rc.RewriteCoreError):
        rc.sample_latents(0, 5)
