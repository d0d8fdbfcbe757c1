import copy
import functools
import gc
import random
import threading
import time
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import solver_of
from helpers import reference
from torch import nn
from torch.nn.utils import parametrizations

import rewrite_core as rc
from rewrite_core.generators.proggan import ProgGAN
from rewrite_core.generators.stylegan2 import StyleGAN2
from rewrite_core.solvers.problem import basis_maps, combine

CPU = torch.device("cpu")


class DCGAN(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (12, 1, 1)),
            nn.ConvTranspose2d(12, 16, 4, 1, 0, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 10, 5, 2, 2, output_padding=1),
            nn.BatchNorm2d(10),
            nn.LeakyReLU(0.2),
            nn.Conv2d(10, 8, 3, 1, 1, padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, (3, 5), stride=2, padding=(1, 2), dilation=1),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 3, 4, 2, 1),
            nn.Tanh(),
        )


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


CASES = [
    (kind, info.name)
    for kind in ("proggan", "stylegan2", "dcgan")
    for info in rc.list_layers(make(kind), torch.randn(1, 12))
]


def latents(count=24):
    return rc.sample_latents(12, count, seed=5)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_every_convolution_is_listed():
    names = [name for kind, name in CASES if kind == "dcgan"]
    assert names == ["1", "4", "7", "10", "12"]
    assert [name for kind, name in CASES if kind == "proggan"] == [f"layer{i}.conv" for i in range(1, 9)] + [
        "output_32x32.conv"
    ]
    assert {name for kind, name in CASES if kind == "stylegan2"} == {
        "conv1.conv",
        "to_rgb1.conv",
        *(f"convs.{i}.conv" for i in range(4)),
        *(f"to_rgbs.{i}.conv" for i in range(2)),
    }
    solvers = {info.name: info.solver for info in rc.list_layers(make("stylegan2"), latents())}
    assert solvers["convs.0.conv"] == "lm" and solvers["to_rgb1.conv"] == "closed_form"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_value_is_what_the_generator_computes(kind, name):
    generator = make(kind).eval()
    layer = rc.bind(generator, name)
    seen = []
    handle = layer._adapter.site.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        generator(latents(3))
    handle.remove()
    assert relative(layer.values(latents(3)), seen[0]) < 1e-5
    keys = layer.keys(latents(3))
    assert keys.shape[:2] == (3, layer.in_channels) and seen[0].shape[1] == layer.out_channels


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_keys_times_weight_reproduce_the_linear_output(kind, name):
    """The basis of all I one-hot directions times the weight is the linear output: linear in the key."""
    layer = rc.bind(make(kind), name)
    keys = layer.keys(latents(2))
    basis = basis_maps(layer, keys, torch.eye(layer.in_channels))
    product = torch.einsum("oj,njhw->nohw", layer.weight.flatten(1), basis)
    assert relative(product, layer.linear(keys, layer.weight)) < 1e-5


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_applied_change_is_what_the_solver_predicted(kind, name):
    generator = make(kind).eval()
    layer = rc.bind(generator, name)
    z = latents()
    moment = rc.collect_second_moment(layer, z, progress=False)
    size = layer.values(z[:1]).shape[2]
    mask = torch.zeros(size, size)
    mask[: max(1, size // 2), : max(1, size // 2)] = 1
    edit = rc.Edit(
        copy=rc.Selection(1, mask), paste=rc.Selection(2, mask), context=[rc.Selection(2, mask), rc.Selection(3, mask)]
    )
    before = copy.deepcopy(generator.state_dict())
    images = generator(z).detach()
    whole = {"region": "map"} if (kind, name) == ("dcgan", "7") else {}  # reflection padding has no crops
    for options in ({}, {"loss": "l2"}, {"region": "map"}, {"solver": rc.Projected(steps=11)}):
        change = reference.rewrite(layer, moment, edit, z, **whole | options)
        assert change.solver == "projected" or "solver" not in options
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


@pytest.mark.parametrize("first", [nn.Conv2d(5, 8, 3, padding=1), nn.Linear(6, 6)])
def test_render_leaves_the_value_that_it_is_given(first):
    layer = rc.bind(nn.Sequential(first, nn.ReLU(inplace=True)), "0")
    value = torch.randn_like(layer.values(maps()))
    before = value.clone()
    layer.render(maps(), value)
    assert torch.equal(value, before) and (value < 0).any()


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
@pytest.mark.parametrize(
    ("kind", "name"), [("proggan", "layer5.conv"), ("stylegan2", "convs.1.conv"), ("stylegan2", "convs.2.conv")]
)
def test_other_precisions(kind, name, dtype):
    generator = make(kind).to(dtype).eval()
    layer = rc.bind(generator, name)
    z = latents()
    moment = rc.collect_second_moment(layer, z, progress=False)
    mask = torch.ones(8, 8)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    before = layer.weight.clone()
    for solver in ("lm", "projected"):
        change = reference.rewrite(layer, moment, edit, z, solver=solver_of(solver, 11))
        with change:
            assert layer.parameter.dtype == dtype and not torch.equal(layer.weight, before)
        assert torch.equal(layer.weight, before)


def test_channels_last_generators():
    generator = make("dcgan").eval().to(memory_format=torch.channels_last)
    layer = rc.bind(generator, "7")
    plain = rc.bind(make("dcgan").eval(), "7")
    assert torch.allclose(layer.keys(latents(2)), plain.keys(latents(2)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer5.cnv", "layer5.conv"),
        ("Layer5.conv", "layer5.conv"),
        ("layer55.conv", "layer5.conv"),
        ("layer5.relu", "LeakyReLU"),
        ("", "ProgGAN"),
    ],
)
def test_unknown_layers_suggest_names(name, words):
    with pytest.raises(rc.UnknownLayerError, match=words) as caught:
        rc.bind(make("proggan"), name)
    assert "did you mean" in str(caught.value)


def test_a_module_around_layers_suggests_those_in_it():
    generator = nn.Sequential(nn.Conv2d(5, 8, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)))
    with pytest.raises(rc.UnknownLayerError, match="is a Sequential.*did you mean '1.1' or '1.2'"):
        rc.bind(generator, "1")


def test_what_cannot_be_edited_says_why():
    made = nn.Conv2d(4, 4, 1)  # by a hypernetwork, say
    del made.weight
    made.weight = torch.randn(4, 4, 1, 1)
    with pytest.raises(rc.UnknownLayerError, match="computed by something unknown"):
        rc.bind(nn.Sequential(made), "0")
    with pytest.raises(rc.UnknownLayerError, match="no bindable layer at all, so only convolutions, linear layers and"):
        rc.bind(nn.Sequential(nn.ReLU()), "0")
    with pytest.raises(rc.RewriteCoreError, match="torch.nn.Module"):
        rc.bind("generator", "0")
    with pytest.raises(
        rc.UnknownLayerError, match="is of family 'conv_transpose', not 'stylegan2'; leave the family out"
    ):
        rc.bind(make("dcgan"), "1", family="stylegan2")
    with pytest.raises(rc.UnknownLayerError, match="is of family 'proggan' or 'conv', not 'stylegan2'"):
        rc.bind(make("proggan"), "layer3.conv", family="stylegan2")
    with pytest.raises(
        rc.RewriteCoreError, match=r"no family 'foo'; choose from \['biggan', 'conv', 'conv_transpose', 'd"
    ):
        rc.bind(make("dcgan"), "1", family="foo")
    with pytest.raises(rc.UnknownLayerError, match="run it once"):
        rc.bind(nn.Sequential(nn.LazyConv2d(4, 1)), "0")
    buffered = nn.Linear(4, 4)
    del buffered.weight
    buffered.register_buffer("weight", torch.randn(4, 4))
    with pytest.raises(rc.UnknownLayerError, match="a buffer"):
        rc.bind(nn.Sequential(buffered), "0")
    with pytest.raises(rc.UnknownLayerError, match="complex64.* real"):
        rc.bind(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), "0")
    for norm in (lambda module: module, nn.utils.spectral_norm):
        with pytest.raises(rc.UnknownLayerError, match="meta device.*load_state_dict"):
            rc.bind(nn.Sequential(norm(nn.Linear(4, 4))).to("meta"), "0")


def test_a_layer_that_never_runs():
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(12, 3, 1), nn.Conv2d(12, 3, 1)

        def forward(self, z):
            return self.used(z[:, :, None, None])

    with pytest.raises(rc.UnknownLayerError, match="never reached"):
        rc.bind(Generator(), "unused").keys(latents(1))


def test_latents_that_are_no_tensor_are_told_so():
    with pytest.raises(TypeError, match="torch.as_tensor"):
        rc.bind(make("proggan"), "layer5.conv").keys(latents(2).numpy())
    with pytest.raises(TypeError, match="torch.stack"):
        rc.bind(make("proggan"), "layer5.conv").render(list(latents(2)))
    with pytest.raises(TypeError, match="not list"):
        rc.list_layers(make("proggan"), [[0.0] * 12])


# --- weights that are not used as stored, and classes of other people -------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("stylegan2", "convs.1"), ("proggan", "layer5"), ("dcgan", "4")])
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_computed_weight_is_what_the_generator_uses(kind, name, wrap):
    generator = make(kind).eval()
    module = rc.bind(generator, name).module
    wrap(module)
    with torch.no_grad():
        images = generator(latents(3))
        layer = rc.bind(generator, name)
        assert torch.equal(layer.parameter, module.weight) and not isinstance(layer.parameter, nn.Parameter)
        assert torch.allclose(layer.render(latents(3), layer.values(latents(3))), images, atol=1e-5)
        layer.fold()
        assert torch.equal(generator(latents(3)), images) and isinstance(layer.parameter, nn.Parameter)
        layer.parameter.add_(torch.randn_like(layer.parameter))
        assert not torch.allclose(generator(latents(3)), images, atol=1e-3)
        layer.unfold()
        assert torch.equal(generator(latents(3)), images)


class Conv2d(nn.Module):  # as ADM and EDM name theirs
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight / 10, padding=1)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 0.1


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class Small(nn.Conv2d):
    """Nothing but another start."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        nn.init.normal_(self.weight, std=0.1)


def maps(count=3):
    return torch.randn(count, 5, 6, 6, generator=torch.Generator().manual_seed(0))


def test_other_peoples_convolutions():
    def chain(second):
        return nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), second)

    assert [info.name for info in rc.list_layers(chain(Conv2d()), maps())] == ["0"]
    assert rc.bind(chain(Conv2d()), "1").family == "general"
    patched = nn.Conv2d(8, 6, 3, padding=1)
    patched.forward = lambda x: 2 * nn.Conv2d.forward(patched, x)
    for conv in (Scaled(8, 6, 3, padding=1), Standardized(8, 6, 3, padding=1), patched):
        assert [info.name for info in rc.list_layers(chain(conv), maps())] == ["0"]
        generator = chain(conv)
        layer = rc.bind(generator, "1")
        assert layer.family == "general" and torch.equal(layer.values(maps()), generator(maps()))
        infos = rc.list_layers(generator, maps(), general=True)
        assert [(info.name, info.solver) for info in infos] == [("0", "closed_form"), ("1", "adam")]
    generator = chain(Small(8, 6, 3, padding=1))
    assert torch.equal(rc.bind(generator, "1").values(maps()), generator(maps()))


def test_a_convolution_beside_a_wscale():
    def block(conv):
        return nn.Sequential(OrderedDict(conv=conv, wscale=nn.Identity()))

    transposed = nn.Sequential(OrderedDict(block=block(nn.ConvTranspose2d(5, 8, 4, 2, 1))))
    layer = rc.bind(transposed, "block.conv")
    assert (layer.family, layer.in_channels, layer.out_channels) == ("conv_transpose", 5, 8)
    assert torch.allclose(layer.values(maps()), transposed(maps()), atol=1e-6)
    own = nn.Sequential(OrderedDict(first=nn.Conv2d(5, 8, 1), block=block(Conv2d())))
    assert [info.name for info in rc.list_layers(own, maps())] == ["first"]
    root = block(nn.Conv2d(5, 8, 3, padding=1))
    assert [info.name for info in rc.list_layers(root, maps())] == ["conv"]
    assert rc.bind(root, "conv").name == rc.bind(root, "").name == "conv"
    assert rc.bind(make("stylegan2").conv1, "").name == "conv"


def test_a_layer_of_two_names():
    generator = nn.Sequential(OrderedDict(a=nn.Conv2d(5, 5, 1), b=nn.Identity()))
    generator.b = generator.a
    assert rc.bind(generator, "b").name == "b" and rc.bind(generator, "b").module is rc.bind(generator, "a").module


# --- latents -------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1).bfloat16()

    def forward(self, x):
        return self.b(self.a(x).bfloat16())


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(10, 5), nn.Conv2d(5, 8, 3, padding=1)

    def forward(self, index):
        return self.conv(self.embed(index)[:, :, None, None].expand(-1, -1, 6, 6))


def test_listing_reads_a_computed_weight_a_few_times_however_many_there_are():
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight):
            Counting.calls += 1
            return 2 * weight

    counts = []
    for depth in 2, 8:
        generator = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
        for module in generator:
            nn.utils.parametrize.register_parametrization(module, "weight", Counting())
        Counting.calls = 0
        rc.list_layers(generator, torch.randn(1, 4))
        counts.append(Counting.calls)
    assert counts[1] == 4 * counts[0] <= 8 * 8


def test_latents_are_as_the_first_weight_wants_them():
    generator = Mixed()
    layer = rc.bind(generator, "b")
    assert layer.keys(maps()).dtype == torch.bfloat16
    assert relative(layer.values(maps().double()).float(), generator(maps()).float()) < 0.02
    assert torch.equal(layer.render(maps()), generator(maps()))
    assert [info.name for info in rc.list_layers(generator, maps().double())] == ["a", "b"]
    assert [info.name for info in rc.list_layers(Classes(), torch.arange(3))] == ["conv"]
    assert rc.bind(Classes(), "conv").keys(torch.arange(3)).shape == (3, 5, 6, 6)
    assert rc.list_layers(nn.Identity(), maps()) == []


@pytest.mark.parametrize(("kind", "name"), [("proggan", "layer5.conv"), ("stylegan2", "convs.0.conv"), ("dcgan", "4")])
def test_values_where_forward_uses_autocast(kind, name):
    generator = make(kind).eval()

    def forward(generator, z):
        with torch.autocast("cpu", torch.bfloat16):
            return generator(z)

    layer = rc.bind(generator, name, forward)
    values = layer.values(latents(3))
    assert relative(values.float(), rc.bind(generator, name).values(latents(3))) < 0.05
    assert layer.render(latents(3), values).shape == generator(latents(3)).shape
    assert name in [info.name for info in rc.list_layers(generator, latents(3), forward)]


# --- the fingerprint -----------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Everything before `conv` is used in another way, and everything after it too."""

    def __init__(self):
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(5, 1, 1)), nn.Parameter(torch.ones(6, 1, 1))])
        self.named = nn.ParameterDict({"first": nn.Parameter(torch.ones(5, 1, 1)), "last": nn.Parameter(torch.ones(1))})
        self.noises = nn.Module()  # with no forward of its own
        self.noises.register_buffer("first", torch.zeros(6, 6))
        self.noises.register_buffer("last", torch.zeros(6, 6))
        self.lent, self.own = nn.Linear(5, 5), nn.Linear(5, 5)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)  # never calls its out_proj
        self.slope = nn.LeakyReLU(0.2)
        self.conv, self.last = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 3, 1)
        self.start = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = (x + self.start + self.noises.first) * self.gains[0] * self.named["first"]
        rows = F.linear(self.own(x.flatten(2).mT), 2 * self.lent.weight)
        rows = self.slope(rows + self.attention(rows, rows, rows)[0])
        x = self.conv(rows.mT.reshape(x.shape))
        return self.last((x + self.noises.last) * self.gains[1] * self.named["last"])


BEFORE = [
    "gains.0",
    "named.first",
    "noises.first",
    "lent.weight",
    "own.weight",
    "own.bias",
    "start",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
]
AFTER = ["gains.1", "named.last", "noises.last", "conv.weight", "last.weight"]


@pytest.mark.parametrize("name", BEFORE + AFTER)
@pytest.mark.parametrize("inference", [False, True])
def test_the_fingerprint_is_of_all_that_the_key_depends_on(name, inference):
    generator = Everything().eval()
    layer = rc.bind(generator, "conv")
    with torch.inference_mode(inference):
        before, keys = layer.fingerprint(maps()), layer.keys(maps())
        assert layer.fingerprint(maps()) == before
        state = dict(generator.named_parameters()) | dict(generator.named_buffers())
        with torch.no_grad():
            state[name] += torch.linspace(0, 1, state[name].shape[-1]) + 1
        assert torch.equal(layer.keys(maps()), keys) == (name in AFTER), "the test itself"
        assert (layer.fingerprint(maps()) == before) == (name in AFTER)


def test_the_fingerprint_sees_settings():
    generator = Everything().eval()
    layer = rc.bind(generator, "conv")
    before = layer.fingerprint(maps())
    generator.slope.negative_slope = 0.3
    assert layer.fingerprint(maps()) != before


class Configured(nn.Module):
    """Has settings of many kinds, and counts and caches as it runs."""

    def __init__(self, power=1, pair=(1, (2.0, "a")), *, mode="plus", device=CPU, at="cuda:0"):
        super().__init__()
        self.power, self.pair, self.mode, self.device, self.at = power, pair, mode, device, at
        self.calls, self.grid, self.side, self.seen = 0, None, 0, None
        self.first, self.conv = nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)

    def prepare(self, x):
        self.calls += 1
        self.side, self.seen = x.shape[0], x + 1
        if self.grid is None:
            self.grid = torch.linspace(0, 1, x.shape[-1])

    def forward(self, x):
        self.prepare(x)
        x = self.first(x) * self.pair[1][0] + self.grid + 0 * self.seen
        return self.conv(x**self.power if self.mode == "plus" else -x)


def test_the_fingerprint_sees_plain_settings_and_no_counters():
    generator = Configured().eval()
    layer = rc.bind(generator, "conv")
    moment = rc.collect_second_moment(layer, maps(), batch_size=3, progress=False)
    prints = [moment.fingerprint]
    generator.device, generator.at = torch.device("cuda"), "cpu"
    for count in (1, 2, 3):
        generator(maps()[:count])
        assert layer.fingerprint(maps()) == prints[0] == rc.bind(generator, "conv").fingerprint(maps())
    for name, value in (("power", 2), ("pair", (1, (3.0, "a"))), ("mode", "minus")):
        before = layer.keys(maps())
        setattr(generator, name, value)
        prints.append(layer.fingerprint(maps()))
        assert not torch.equal(layer.keys(maps()), before), "the test itself"
    generator.first.padding_mode = "circular"
    prints.append(layer.fingerprint(maps()))
    assert len(set(prints)) == 5
    with pytest.raises(rc.MismatchError, match="weights"):
        moment.check(layer, maps())


class Writing(nn.Module):
    """Its forward pass and train() write attributes that are named as its constructor's arguments."""

    def __init__(self, batch_size=None, training=True, inplace=False):
        super().__init__()
        self.batch_size, self.training, self.inplace = batch_size, training, inplace
        self.act, self.norm, self.conv = (
            nn.ReLU(),
            nn.utils.weight_norm(nn.Conv2d(5, 6, 3, padding=1)),
            nn.Conv2d(6, 6, 1),
        )

    def forward(self, x):
        self.batch_size = len(x)
        return self.conv(self.act(self.norm(x)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_fingerprint_does_not_see_what_passes_write():
    generator = Writing().eval()
    prints = set()
    for change in (
        lambda: None,
        generator.train,
        lambda: setattr(generator.act, "inplace", True),
        lambda: setattr(generator, "norm", torch.compile(generator.norm, backend="eager")),
    ):
        change()
        for count in (1, 3):
            generator(maps()[:count])
            prints.add(rc.bind(generator, "conv").fingerprint(maps()))
    assert len(prints) == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_hooked_layer_is_rewritten_twice_and_left_with_its_weight(norm):
    generator = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), norm(nn.Conv2d(6, 6, 1))).eval()
    generator(maps())
    weight = generator[1].weight.detach().clone()
    layer = rc.bind(generator, "1")
    before = layer.fingerprint(maps())
    moment = rc.collect_second_moment(layer, maps(), progress=False)
    with rc.insert(layer, moment, torch.randn(2, 6), torch.randn(2, 6), rank=1):
        assert rc.bind(generator, "1").fingerprint(maps()) == before
        moment.check(rc.bind(generator, "1"), maps())
    assert torch.equal(generator[1].weight, weight)  # before any pass


def test_the_fingerprint_sees_what_a_forward_holds():
    generator, label = make("stylegan2"), torch.ones(12)

    def bent(by, more=None):
        return rc.bind(generator, "convs.1", forward=lambda g, z: g(z * by if more is None else z * by + more))

    layers = [
        rc.bind(generator, "convs.1"),
        bent(1.0),
        bent(0.7),
        bent(1.0, label),
        bent(1.0, 2 * label),
        rc.bind(generator, "convs.1", forward=lambda g, z: g(z * 0.5)),
        rc.bind(generator, "convs.1", forward=functools.partial(lambda by, g, z: g(z * by), 0.3)),
    ]
    prints = [layer.fingerprint(latents()) for layer in layers]
    assert len(set(prints)) == len(prints)
    assert (
        prints == [layer.fingerprint(latents()) for layer in layers] and bent(0.7).fingerprint(latents()) == prints[2]
    )
    moment = rc.collect_second_moment(layers[1], latents(), progress=False)
    with pytest.raises(rc.MismatchError, match="truncation"):
        moment.check(layers[2], latents())


def test_the_fingerprint_of_stylegan2():
    generator = make("stylegan2").eval()
    generator.latent_avg = generator.style(latents()).mean(0).detach()
    layer = rc.bind(generator, "convs.1")
    before = layer.fingerprint(latents())
    generator.noises.noise_4.normal_()
    generator.convs[1].noise.weight.data.add_(1)  # follows the convolution, as do the bias and its own weight
    generator.convs[1].activate.bias.data.add_(1)
    generator.convs[1].conv.weight.data.add_(1)
    generator.convs[2].conv.modulation.weight.data.add_(1)
    assert layer.fingerprint(latents()) == before
    for change in (
        lambda: generator.noises.noise_1.normal_(),
        lambda: generator.convs[1].conv.modulation.bias.data.add_(1),
        lambda: generator.input.input.data.add_(1),
        lambda: setattr(generator, "truncation", 0.5),
        lambda: generator.latent_avg.add_(1),
    ):
        keys, before = layer.keys(latents()), layer.fingerprint(latents())
        change()
        assert not torch.equal(layer.keys(latents()), keys), "the test itself"
        assert layer.fingerprint(latents()) != before
    silent = rc.bind(generator, "convs.1", forward=lambda g, z: g(z, noise="none"))
    before = silent.fingerprint(latents())
    generator.noises.noise_1.normal_()
    assert silent.fingerprint(latents()) == before


def test_the_fingerprint_with_a_tied_weight():
    generator = nn.Sequential(
        OrderedDict(a=nn.Conv2d(5, 5, 3, padding=1), relu=nn.ReLU(), b=nn.Conv2d(5, 5, 3, padding=1))
    )
    generator.b.weight = generator.a.weight
    first, second = rc.bind(generator, "a"), rc.bind(generator, "b")
    before = first.fingerprint(maps()), second.fingerprint(maps())
    with torch.no_grad():
        generator.a.weight.mul_(3)
    assert first.fingerprint(maps()) == before[0], "its key is the input"
    assert second.fingerprint(maps()) != before[1]


def test_passes_in_two_threads_leave_the_random_state_alone():
    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.conv, self.seconds = nn.Conv2d(5, 8, 3, padding=1), seconds

        def forward(self, x):
            time.sleep(self.seconds)
            return self.conv(x + random.random() + np.random.rand() + torch.rand(()))

    layers = [rc.bind(Slow(seconds), "conv") for seconds in (0.02, 0.05)]
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    for layer in layers:
        layer.keys(maps())  # how far it draws is known from now on
    threads = [threading.Thread(target=layer.keys, args=(maps(),)) for layer in layers]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert (np.random.get_state(legacy=False)["state"]["key"] == numpy["state"]["key"]).all()


def test_threads_draw_their_own_numbers_where_a_generator_draws_none():
    """nn.Sequential cannot draw from Python's generator, so it is not seeded for its passes."""
    generator = nn.Sequential(nn.Conv2d(5, 6, 1), nn.Conv2d(6, 6, 1))
    drawn = []
    generator[0].register_forward_pre_hook(lambda module, args: drawn.append((random.random(), np.random.rand())))
    for _ in range(3):
        rc.bind(generator, "1").keys(maps())
    assert len(set(drawn)) == len(drawn) >= 3


def test_noise_is_repeated_and_the_random_state_left_alone():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 8, 3, padding=1)

        def forward(self, x):
            noise = torch.randn_like(x) + torch.from_numpy(np.random.randn(*x.shape)) + random.random()
            return self.conv(x + noise.to(x))

    generator = Noisy()
    layer = rc.bind(generator, "conv")
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    keys = layer.keys(maps())
    assert torch.equal(keys, layer.keys(maps())) and torch.equal(layer.render(maps()), layer.render(maps()))
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert (np.random.get_state()[1] == numpy[1]).all() and np.random.get_state()[2] == numpy[2]
    assert not torch.equal(generator(maps()), generator(maps()))


# --- one edit through several bindings --------------------------------------------------------------------------


def test_a_dome_to_spire_edit_is_the_same_through_the_plain_binding_and_the_family():
    """The embedded generator's own edit: through the ProgGAN family and as a plain convolution, with the same keys, the
    weights are the same to the bit."""
    from rewrite_core.demo import chapels, load_edit

    z = rc.sample_latents(16, 400, seed=1)
    weights = []
    for family in ("proggan", "conv"):
        generator = chapels()
        layer = rc.bind(generator, "synthesis.layer4.conv", family=family)
        assert layer.family == family
        moment = rc.collect_second_moment(layer, z, progress=False)
        change = reference.rewrite(layer, moment, load_edit("spire"), z, rank=4, loss="l2", region="map")
        with change:
            weights.append(layer.parameter.detach().clone())
    assert torch.equal(*weights) and change.solver == "closed_form"


class Split(nn.Module):
    """A StyledConv taken apart, its convolution a modulated one or, with the same weight, a plain one."""

    def __init__(self, styled, plain):
        super().__init__()
        self.modulated, self.noise, self.activate = styled.conv, styled.noise, styled.activate
        self.plain = None
        if plain:
            weight = styled.conv.weight.detach()[0] * styled.conv.scale
            self.plain = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False)
            self.plain.weight = nn.Parameter(weight)

    def forward(self, x, latent, noise=None):
        out = self.modulated(x, latent) if self.plain is None else self.plain(self.modulated.key(x, latent)[0])
        return self.activate(self.noise(out, noise))


def test_a_dome_to_spire_edit_is_the_same_through_the_plain_binding_and_the_stylegan2_family():
    """The embedded edit at a StyleGAN2 of its size, where both bindings mean the same value: the convolution's output,
    not demodulated. The weights are the same, but for the rounding of the constant scale."""
    from rewrite_core.demo import load_edit

    z, changes = rc.sample_latents(16, 400, seed=1), []
    for plain in (False, True):
        torch.manual_seed(0)
        generator = StyleGAN2(32, style_dim=16, n_mlp=2, channels={4: 16, 8: 16, 16: 12, 32: 8}).eval()
        generator.convs[1].conv.demodulate = False
        images = generator(z[:3])
        generator.convs[1] = Split(generator.convs[1], plain)
        assert torch.allclose(generator(z[:3]), images, atol=1e-5)
        layer = rc.bind(generator, "convs.1.plain" if plain else "convs.1.modulated")
        assert layer.family == ("conv" if plain else "stylegan2")
        moment = rc.collect_second_moment(layer, z, progress=False)
        change = reference.rewrite(layer, moment, load_edit("spire"), z, rank=4, loss="l2", region="map")
        assert change.solver == "closed_form" and change.coefficients.any()
        with change:
            changes.append(layer.weight * (1 if plain else layer.module.scale))
    assert relative(*changes) < 1e-5
