"""Modules that no family knows, bound by running them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits, solver_of, state_bits
from helpers import reference
from torch import nn

import rewrite_core as rc


class EqualisedConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.scale = (inputs * 9) ** -0.5

    def forward(self, x):
        return F.leaky_relu(F.conv2d(x, self.weight * self.scale, self.bias, padding=1), 0.2)


class EqualisedLinear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight * 0.3, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Upsampling(nn.ConvTranspose2d):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Modulated(nn.Module):
    """As in several ports of StyleGAN2: one grouped convolution for all pictures, with styles as an argument."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, 3, 3))

    def forward(self, x, style):
        batch, _channels, *size = x.shape
        weights = self.weight * (style[:, None, :, None, None] + 1)
        weights = weights * torch.rsqrt(weights.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        out = F.conv2d(x.reshape(1, -1, *size), weights.flatten(0, 1), padding=1, groups=batch)
        return out.reshape(batch, -1, *size)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.style = EqualisedLinear(8, 6 * 16), nn.Linear(8, 10)
        self.first, self.second = EqualisedConv(6, 12), Standardised(12, 12, 3, padding=1)
        self.up, self.modulated = Upsampling(12, 10, 2, 2), Modulated(10, 9)
        self.patched, self.rgb = nn.Conv2d(9, 9, 3, padding=1), nn.Conv2d(9, 3, 1)
        plain = self.patched.forward
        self.patched.forward = lambda x: 2 * plain(x)

    def forward(self, z):
        x = self.first(self.lift(z).reshape(-1, 6, 4, 4))
        x = self.up(self.second(x).relu(), scale=0.5)
        x = self.modulated(x, style=self.style(z)).relu()
        return self.rgb(self.patched(x).relu()).tanh()


GENERAL = ("lift", "first", "second", "up", "modulated", "patched")


def make():
    torch.manual_seed(0)
    return Generator().eval()


def latents(count=48):
    return rc.sample_latents(8, count, seed=3)


def edit():
    mask = torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    copied, pasted, *context = (rc.Selection(i, mask) for i in (0, 1, 2, 3))
    return rc.Edit(copy=copied, paste=pasted, context=context)


def test_they_are_listed_where_asked_for():
    infos = rc.list_layers(make(), latents(), general=True)
    assert [info.name for info in infos if info.family == "general"] == list(GENERAL)
    assert {info.solver for info in infos if info.family == "general"} == {"adam"}
    assert {info.name for info in rc.list_layers(make(), latents())} == {"style", "rgb"}
    up = next(info for info in infos if info.name == "up")
    assert (up.in_channels, up.out_channels, up.key_size, up.value_size) == (12, 10, (4, 4), (8, 8))


@pytest.mark.parametrize("name", GENERAL)
def test_their_value_is_what_they_put_out(name):
    generator = make()
    layer, seen = rc.bind(generator, name), []
    handle = layer.module.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    images = layer.render(latents(3))
    values = layer.values(latents(3))
    handle.remove()
    assert torch.equal(layer._adapter.replace_value(seen[0], values), seen[0])
    assert torch.equal(layer.render(latents(3), values), images)
    wide = layer.value(layer.capture(latents(3)).to_dtype(torch.float64), layer.weight.double())
    assert wide.dtype == torch.float64 and torch.allclose(wide.float(), values, atol=1e-4)


@pytest.mark.parametrize("solver", ["lm", "projected"])
@pytest.mark.parametrize("name", GENERAL[1:])
def test_they_are_rewritten_through_autograd(name, solver):
    generator = make().train()
    z = latents()
    layer = rc.bind(generator, name)
    moment = rc.collect_second_moment(layer, z, progress=False)
    bits, before = state_bits(generator), generator(z)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        change = reference.rewrite(layer, moment, edit(), z, solver=solver_of(solver, 40), loss="l2", region="map")
    assert change.solver == ("adam" if solver == "lm" else solver)
    assert any("found by 'adam'" in str(warning.message) for warning in caught) == (solver == "lm")
    if solver == "lm":
        assert change.final_loss < 0.99 * change.losses[0]
    predicted = layer.value(layer.capture(z[1:2]), layer.weight + change.weight_delta())
    with change:
        assert torch.equal(layer.values(z[1:2]), predicted)
        assert not torch.equal(generator(z), before)
    assert same_bits(bits, state_bits(generator)) and torch.equal(generator(z), before)


def test_what_is_not_known_is_refused():
    generator, z = make(), latents()
    layer = rc.bind(generator, "first")
    moment = rc.collect_second_moment(layer, z, progress=False)
    for options in ({"solver": "adam"}, {"solver": "adam", "region": "map", "preserve": 0.3}):
        with pytest.raises(rc.SolverError, match="without `preserve`, and region='map'"):
            reference.rewrite(layer, moment, edit(), z, **options)
    generator.first = nn.Conv2d(6, 12, 3, padding=1, groups=2)
    generator.first.forward = lambda x: x
    with pytest.raises(rc.UnknownLayerError, match="groups of its own"):
        rc.bind(generator, "first")


class Gated(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.weight, self.give = nn.Parameter(torch.randn(6, 6)), give

    def forward(self, x, *more):
        return self.give(F.linear(x, self.weight))


@pytest.mark.parametrize(
    ("give", "more", "words"),
    [
        (lambda x: (x, x), (), "puts out tuple"),
        (lambda x: x[:, :2], (), r"puts out \[2, 2\]"),
        (lambda x: x, (torch.arange(2),), "torch.int64 tensor"),
    ],
)
def test_calls_that_are_not_understood_are_left_out(give, more, words):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gated = Gated(give)

        def forward(self, z):
            out = self.gated(z, *more)
            return out[0] if isinstance(out, tuple) else out

    with pytest.warns(UserWarning, match=f"'gated' is left out.*{words}"):
        assert rc.list_layers(Net(), torch.randn(2, 6), general=True) == []


def test_layers_whose_output_is_not_their_value_are_left_out():
    generator = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    generator[0].register_forward_hook(lambda module, args, output: 2 * output + 1)
    with pytest.warns(UserWarning, match="'0' is left out.*look for a hook"):
        assert [info.name for info in rc.list_layers(generator, torch.randn(2, 3, 5, 5))] == ["1"]


def test_layers_that_see_other_numbers_of_maps_are_left_out():
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(torch.cat([x, 0 * x])).chunk(2)[0]

    with pytest.warns(UserWarning, match="'conv' is left out.*4 maps for 2 latents"):
        assert rc.list_layers(Guided(), torch.randn(8, 3, 5, 5)) == []
