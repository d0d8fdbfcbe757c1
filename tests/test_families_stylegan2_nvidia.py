"""StyleGAN2 with a functional modulated_conv2d, fused and not, and float16 layers. See ``test_families.py``."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import solver_of
from helpers import reference
from torch import nn

import rewrite_core as rc


def upfirdn(x, f, up, pad, gain):
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    x = F.pad(x, (pad[0], pad[1], pad[0], pad[1]))
    return F.conv2d(x, (f * gain).flip(0, 1).to(x.dtype).repeat(c, 1, 1, 1), groups=c)


def convolve(x, w, f, up, padding, groups=1):
    """Zero-insertion, low-pass filter, convolution: in this order, as it is defined."""
    if up == 1:
        return F.conv2d(x, w, padding=padding, groups=groups)
    taps = len(f)
    x = upfirdn(x, f, up, (padding + (taps + up - 1) // 2, padding + (taps - up) // 2), up**2)
    return F.conv2d(x, w.flip(2, 3), groups=groups)  # a convolution, not a correlation


def modulated_conv2d(
    x, weight, styles, noise=None, up=1, padding=0, resample_filter=None, demodulate=True, fused_modconv=True
):
    n = len(x)
    if x.dtype == torch.float16 and demodulate:
        fan_in = weight[0].numel()
        weight = weight / weight.abs().amax((1, 2, 3), keepdim=True) / math.sqrt(fan_in)
        styles = styles / styles.abs().amax(1, keepdim=True)
    kernels = weight[None] * styles[:, None, :, None, None]
    norm = torch.rsqrt(kernels.square().sum((2, 3, 4)) + 1e-8) if demodulate else torch.ones(n, len(weight))
    if fused_modconv:
        kernels = (kernels * norm[:, :, None, None, None]).to(x.dtype)
        x = convolve(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), resample_filter, up, padding, groups=n)
        x = x.reshape(n, -1, *x.shape[2:])
    else:
        x = convolve(x * styles.to(x.dtype)[:, :, None, None], weight.to(x.dtype), resample_filter, up, padding)
        x = x * norm.to(x.dtype)[:, :, None, None]
    return x if noise is None else x + noise.to(x.dtype)


class FullyConnectedLayer(nn.Module):
    def __init__(self, in_features, out_features, bias_init=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.full([out_features], bias_init))

    def forward(self, x):
        return F.linear(x, self.weight / math.sqrt(x.shape[1]), self.bias)


class SynthesisLayer(nn.Module):
    def __init__(self, in_channels, out_channels, w_dim, resolution, up=1, activation="lrelu", conv_clamp=None):
        super().__init__()
        self.resolution, self.up, self.activation, self.conv_clamp = resolution, up, activation, conv_clamp
        self.use_noise, self.padding, self.act_gain = True, 1, 1 if activation == "linear" else math.sqrt(2)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("resample_filter", torch.outer(taps, taps) / 64)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn([out_channels, in_channels, 3, 3]))
        self.register_buffer("noise_const", torch.randn([resolution, resolution]))
        self.noise_strength = nn.Parameter(torch.tensor(0.3))
        self.bias = nn.Parameter(0.1 * torch.randn([out_channels]))

    def forward(self, x, w, noise_mode="random", fused_modconv=True, gain=1):
        noise = None
        if noise_mode == "random":
            noise = torch.randn([len(x), 1, self.resolution, self.resolution], device=x.device) * self.noise_strength
        if noise_mode == "const":
            noise = self.noise_const * self.noise_strength
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise,
            self.up,
            self.padding,
            self.resample_filter,
            fused_modconv=fused_modconv,
        )
        x = x + self.bias.to(x.dtype)[None, :, None, None]
        if self.activation != "linear":
            x = F.leaky_relu(x, {"lrelu": 0.2, "relu": 0.0}[self.activation])
        x = x * (self.act_gain * gain)
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp * gain, self.conv_clamp * gain)


class ToRGBLayer(nn.Module):
    def __init__(self, in_channels, out_channels, w_dim, conv_clamp=None):
        super().__init__()
        self.conv_clamp, self.weight_gain = conv_clamp, 1 / math.sqrt(in_channels)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn([out_channels, in_channels, 1, 1]))
        self.bias = nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x, w, fused_modconv=True):
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, demodulate=False, fused_modconv=fused_modconv)
        x = x + self.bias.to(x.dtype)[None, :, None, None]
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)


class Generator(nn.Module):
    def __init__(self, w_dim=12, half=False, clamp=None, fused=True):
        super().__init__()
        self.half_precision, self.fused = half, fused
        self.mapping = nn.Sequential(
            FullyConnectedLayer(w_dim, w_dim), nn.LeakyReLU(0.2), FullyConnectedLayer(w_dim, w_dim)
        )
        self.const = nn.Parameter(torch.randn([14, 4, 4]))
        self.conv1 = SynthesisLayer(14, 12, w_dim, 4, conv_clamp=clamp)
        self.conv2 = SynthesisLayer(12, 10, w_dim, 8, up=2, conv_clamp=clamp)
        self.conv3 = SynthesisLayer(10, 8, w_dim, 8, activation="relu", conv_clamp=clamp)
        self.torgb = ToRGBLayer(8, 3, w_dim, conv_clamp=clamp)

    def forward(self, z, noise_mode="random"):
        w = self.mapping(z)
        x = self.const.repeat(len(z), 1, 1, 1)
        x = self.conv1(x, w, noise_mode=noise_mode, fused_modconv=self.fused)
        if self.half_precision:
            x = x.half()
        x = self.conv2(x, w, noise_mode=noise_mode, fused_modconv=self.fused)
        x = self.conv3(x, w, noise_mode=noise_mode, fused_modconv=self.fused, gain=math.sqrt(0.5))
        return self.torgb(x, w, fused_modconv=self.fused).float()


def make(**options):
    torch.manual_seed(0)
    return Generator(**options)


def const(generator, z):
    return generator(z, noise_mode="const")


def test_every_synthesis_layer_is_bound():
    infos = rc.list_layers(make(), torch.randn(1, 12))
    assert [(info.name, info.solver) for info in infos] == [
        ("conv1", "lm"),
        ("conv2", "lm"),
        ("conv3", "lm"),
        ("torgb", "closed_form"),
    ]
    assert {info.family for info in infos} == {"stylegan2_nvidia"}
    assert (infos[1].key_size, infos[1].value_size) == ((4, 4), (8, 8))


@pytest.mark.parametrize("name", ["conv2", "conv3", "torgb"])
@pytest.mark.parametrize("fused", [True, False])
def test_half_layers(name, fused):
    """The bound layer's float32 value is what the float16 layer computes, to float16's precision."""
    generator, z = make(half=True, clamp=256, fused=fused), torch.randn(3, 12)
    layer = rc.bind(generator, name, forward=const)
    seen = []
    handle = layer.module.register_forward_hook(lambda module, args, output: seen.append(output))
    generator(z, noise_mode="const")
    handle.remove()
    assert seen[0].dtype == torch.float16
    values = layer.values(z)
    assert values.dtype == torch.float32 and (values - seen[0]).norm() < 2e-3 * values.norm()
    if name != "torgb":  # its key is at most the input, however large the style
        assert layer.capture(z).extra["style"].abs().max() <= 1


def test_a_clamp_at_work_has_no_post_operation():
    mask = torch.ones(8, 8)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    z = rc.sample_latents(12, 16)
    for clamp, solver in ((100.0, "lm"), (0.5, "adam")):
        generator = make(clamp=clamp)
        assert {info.name: info.solver for info in rc.list_layers(generator, z, forward=const)}["conv3"] == solver
        layer = rc.bind(generator, "conv3", forward=const)
        moment = rc.collect_second_moment(layer, z, progress=False)
        if solver == "adam":
            with pytest.raises(rc.SolverError, match="solver='adam'"):
                reference.rewrite(layer, moment, edit, z)
        change = reference.rewrite(layer, moment, edit, z, solver=solver_of(solver, 30))
        assert change.solver == solver and change.final_loss < change.losses[0]


def test_an_unknown_activation_is_refused():
    generator = make()
    generator.conv3.activation = "swish"
    with pytest.raises(rc.UnknownLayerError, match="'swish' is not one of"):
        rc.bind(generator, "conv3")
