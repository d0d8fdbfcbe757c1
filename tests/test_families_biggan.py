"""BigGAN: spectral norm in four ways, conditional batch normalisation, class labels. See ``test_families.py``."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from torch import nn
from torch.nn.utils import parametrizations

import rewrite_core as rc


def _sigma(weight, u, eps=1e-12):
    """One step of the power method: the largest singular value, and the next u."""
    with torch.no_grad():
        v = F.normalize(u @ weight.flatten(1), eps=eps)
        u = F.normalize(v @ weight.flatten(1).T, eps=eps)
    return (v @ weight.flatten(1).T @ u.T).squeeze(), u


class W_:
    """Spectral norm by a method that the forward pass calls."""

    def W_(self):
        sigma, u = _sigma(self.weight, self.u0)
        if self.training:
            self.u0[:], self.sv0[:] = u, sigma.detach()
        return self.weight / sigma

    def start(self, outputs):
        self.register_buffer("u0", torch.randn(1, outputs))
        self.register_buffer("sv0", torch.ones(1))


class SNConv2d(nn.Conv2d, W_):
    def __init__(self, *args, **options):
        nn.Conv2d.__init__(self, *args, **options)
        self.start(self.out_channels)

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class SNLinear(nn.Linear, W_):
    def __init__(self, *args, **options):
        nn.Linear.__init__(self, *args, **options)
        self.start(self.out_features)

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class OtherSN:
    """The same under another collection's names."""

    def sn_weights(self):
        sigma, u = _sigma(self.weight, self.sn_u)
        if self.training:
            self.sn_u[:], self.sn_sigma[:] = u, sigma.detach()
        return self.weight / sigma


def other_snconv2d(*args, **options):
    class SNConv2d(nn.Conv2d, OtherSN):
        def forward(self, x):
            return F.conv2d(x, self.sn_weights(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    module = SNConv2d(*args, **options)
    module.register_buffer("sn_u", torch.randn(1, module.out_channels))
    module.register_buffer("sn_sigma", torch.ones(1))
    return module


def wrapped(norm):
    return lambda *args, **options: norm(nn.Conv2d(*args, **options)), lambda *args: norm(nn.Linear(*args))


NORMS = {
    "method": (SNConv2d, SNLinear),
    "other_method": (other_snconv2d, nn.Linear),
    "hook": wrapped(nn.utils.spectral_norm),
    "parametrization": wrapped(parametrizations.spectral_norm),
}


class ccbn(nn.Module):
    """Batch normalisation whose gain and bias are linear in the class embedding."""

    def __init__(self, channels, embedding, linear):
        super().__init__()
        self.gain, self.bias = linear(embedding, channels), linear(embedding, channels)
        self.bn = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x, y):
        return (1 + self.gain(y))[:, :, None, None] * self.bn(x) + self.bias(y)[:, :, None, None]


class GBlock(nn.Module):
    def __init__(self, inputs, outputs, embedding, conv, linear):
        super().__init__()
        self.bn1, self.bn2 = ccbn(inputs, embedding, linear), ccbn(outputs, embedding, linear)
        self.conv1, self.conv2 = conv(inputs, outputs, 3, padding=1), conv(outputs, outputs, 3, padding=1)
        self.conv_sc = conv(inputs, outputs, 1)

    def forward(self, x, y):
        h = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2)
        h = self.conv2(F.relu(self.bn2(self.conv1(h), y)))
        return h + self.conv_sc(F.interpolate(x, scale_factor=2))


class Generator(nn.Module):
    def __init__(self, conv, linear, classes=4, latent=12):
        super().__init__()
        self.shared = nn.Embedding(classes, 6)
        self.linear = linear(latent, 10 * 16)
        self.block = GBlock(10, 8, latent + 6, conv, linear)
        self.output = conv(8, 3, 3, padding=1)

    def forward(self, z, y):
        code = torch.cat([z, self.shared(y)], 1)
        x = self.block(self.linear(z).unflatten(1, (10, 4, 4)), code)
        return torch.tanh(self.output(F.relu(x)))


def make(norm="method"):
    torch.manual_seed(0)
    generator = Generator(*NORMS[norm])
    with torch.no_grad():
        for _ in range(20):  # statistics and singular vectors of its own
            generator(torch.randn(16, 12), torch.randint(4, (16,)))
    return generator


def labelled(generator, z):
    return generator(z, torch.full((len(z),), 2))


def some_edit(layer, size=8):
    z = rc.sample_latents(12, 24)
    moment = rc.collect_second_moment(layer, z, progress=False)
    mask = torch.ones(size, size)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    return reference.rewrite(layer, moment, edit, z, loss="l2"), z


@pytest.mark.parametrize("norm", NORMS)
def test_layers(norm):
    infos = {info.name: info for info in rc.list_layers(make(norm), torch.randn(1, 12), forward=labelled)}
    assert {"block.conv1", "block.conv2", "block.conv_sc", "output", "linear"} <= set(infos)
    assert infos["block.conv1"].family == ("biggan" if "method" in norm else "conv")
    assert infos["block.conv1"].solver == "closed_form"
    with pytest.raises(TypeError, match="missing 1 required"):  # the labels
        rc.bind(make(norm), "block.conv1").keys(torch.randn(1, 12))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [False, True])
def test_a_change_folds_the_norm_and_reverting_unfolds_it(norm, training):
    generator = make(norm).train(training)
    layer = rc.bind(generator, "block.conv2", forward=labelled)
    module = layer.module
    before, state = layer.weight, copy.deepcopy(generator.state_dict())
    parameters, hooks = dict(generator.named_parameters()), dict(module._forward_pre_hooks)
    change, z = some_edit(layer)
    assert all(torch.equal(value, state[key]) for key, value in generator.state_dict().items())
    images = layer.render(z)
    with change:
        # exactly what was asked for, and not normalised again
        assert torch.equal(layer.weight, before + change.weight_delta())
        assert torch.equal(module.eval().weight, layer.parameter)  # train mode would iterate
        module.train(training)
        edited = layer.render(z)
        assert not torch.allclose(edited, images, atol=1e-3)
        twin = copy.deepcopy(generator)
    assert torch.equal(rc.bind(twin, "block.conv2", forward=labelled).render(z), edited)
    change.revert(twin)
    for copied in (generator, twin):
        assert list(copied.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in copied.state_dict().items())
        assert torch.equal(rc.bind(copied, "block.conv2", forward=labelled).render(z), images)
    assert {id(value) for value in parameters.values()} == {id(value) for value in generator.parameters()}
    assert dict(module._forward_pre_hooks) == hooks
    if norm not in ("parametrization", "other_method"):  # torch itself pickles no parametrized module; a local class
        with change:
            pickled = pickle.loads(pickle.dumps(generator))
        assert torch.equal(labelled(pickled.eval(), z), edited)
        change.revert(pickled)
        assert torch.equal(labelled(pickled.eval(), z), images)
    # training goes on where it was
    generator.train()
    labelled(generator, z)
    assert any(not torch.equal(value, state[key]) for key, value in generator.state_dict().items() if "conv2" in key)


def test_a_hook_that_was_removed_while_the_weight_was_folded_stays_away():
    generator = make("hook").eval()
    layer, calls = rc.bind(generator, "block.conv2", forward=labelled), []
    first, _last = (layer.module.register_forward_pre_hook(lambda module, args, n=n: calls.append(n)) for n in range(2))
    hooks = list(layer.module._forward_pre_hooks)
    change, z = some_edit(layer)
    with change:
        first.remove()
        third = layer.module.register_forward_pre_hook(lambda module, args: calls.append(2))
    assert list(layer.module._forward_pre_hooks) == [key for key in hooks if key != first.id] + [third.id]
    calls.clear()
    labelled(generator, z[:1])
    assert calls == [1, 2]


class RestlessSpectralNorm:
    """By hook, as a SAGAN port has it: the power iteration goes on in eval mode, and replaces its buffer."""

    name = "weight"

    def __call__(self, module, args):
        matrix = module.weight_bar.flatten(1)
        v = nn.functional.normalize(matrix.T @ module.weight_u, dim=0)
        module.weight_u = nn.functional.normalize(matrix @ v, dim=0)
        module.weight = module.weight_bar / (module.weight_u @ matrix @ v)


def test_a_hook_that_changes_the_weight_at_every_pass_is_refused_until_it_rests():
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    layer.weight_bar = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.register_buffer("weight_u", torch.randn(8))
    layer.register_forward_pre_hook(RestlessSpectralNorm())
    generator, z = nn.Sequential(layer).eval(), rc.sample_latents(12, 3)
    generator(z)
    u, weight = layer.weight_u, layer.weight
    before = u.clone()
    with pytest.raises(rc.UnknownLayerError, match="at every pass.*until the weight rests"):
        rc.bind(generator, "0")
    assert layer.weight_u is u and layer.weight is weight and torch.equal(u, before)
    layer.weight_bar.data = torch.eye(8, 12)[[0] * 8]  # of rank one, where the iteration ends at once
    for _ in range(3):
        generator(z)
    assert torch.allclose(rc.bind(generator, "0").values(z)[:, :, 0], generator(z), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_folding_a_frozen_generator_leaves_it_frozen(norm):
    generator = make(norm).eval().requires_grad_(False)
    change, z = some_edit(rc.bind(generator, "block.conv2", forward=labelled))
    with change:
        assert not labelled(generator, z).requires_grad
    assert not any(parameter.requires_grad for parameter in generator.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_a_folded_generator_is_moved_and_cast(norm):
    generator = make(norm).eval()
    layer = rc.bind(generator, "block.conv2", forward=labelled)
    change, _z = some_edit(layer)
    original = copy.deepcopy(generator).double()
    change.apply()
    generator.double()
    change.revert()
    assert all(
        value.dtype == torch.float64 or not value.is_floating_point() for value in generator.state_dict().values()
    )
    for key, value in original.state_dict().items():
        assert torch.equal(value, generator.state_dict()[key])


def test_the_state_dict_of_a_folded_layer_fits_the_plain_one():
    generator = make("method").eval()
    layer = rc.bind(generator, "block.conv2", forward=labelled)
    change, _z = some_edit(layer)
    with change:
        state = {key: value for key, value in generator.state_dict().items() if key.startswith("block.conv2")}
        assert set(state) == {"block.conv2.weight", "block.conv2.bias"}
        with pytest.raises(RuntimeError, match="Missing key"):  # it would be normalised again
            make("method").load_state_dict(generator.state_dict())
