"""StyleGAN3's SynthesisLayer. See ``test_families.py``."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import rewrite_core as rc


def fir(x, f, up=1, down=1, pad=(0, 0, 0, 0), gain=1.0):
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    x = F.pad(x, pad)
    if f is not None:
        rows = (f.flip(0) * math.sqrt(gain)).repeat(c, 1, 1)
        x = F.conv2d(F.conv2d(x, rows[:, :, None, :], groups=c), rows[:, :, :, None], groups=c)
    return x[:, :, ::down, ::down]


class Affine(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.ones(out_features))

    def forward(self, x):
        return F.linear(x, self.weight / math.sqrt(x.shape[1]), self.bias)


class SynthesisLayer(nn.Module):
    def __init__(self, w_dim, is_torgb, in_channels, out_channels, in_size, out_size, taps=6):
        super().__init__()
        self.is_torgb, self.conv_kernel, self.conv_clamp = is_torgb, 1 if is_torgb else 3, 256
        self.in_channels = in_channels
        self.affine = Affine(w_dim, in_channels)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, self.conv_kernel, self.conv_kernel))
        self.bias = nn.Parameter(0.1 * torch.randn(out_channels))
        self.register_buffer("magnitude_ema", torch.tensor(2.3))
        self.up_factor = 1 if is_torgb else 2 * out_size // in_size
        self.down_factor = 1 if is_torgb else 2
        for name, factor in (("up_filter", self.up_factor), ("down_filter", self.down_factor)):
            window = torch.hann_window(taps * factor + 2, periodic=False)[1:-1] if factor > 1 else None
            self.register_buffer(name, None if window is None else window / window.sum())
        reach = sum(taps * factor - 1 for factor in (self.up_factor, self.down_factor) if factor > 1)
        total = (out_size - 1) * self.down_factor + 1 - (in_size + self.conv_kernel - 1) * self.up_factor + reach
        low = (total + self.up_factor) // 2
        self.padding = [low, total - low, low, total - low]

    def forward(self, x, w, update_emas=False):
        styles = self.affine(w)
        weight = self.weight
        if self.is_torgb:
            styles = styles / math.sqrt(self.in_channels)
        else:
            weight = weight * torch.rsqrt(weight.square().mean((1, 2, 3), keepdim=True))
            styles = styles * torch.rsqrt(styles.square().mean())
        kernels = weight[None] * styles[:, None, :, None, None]
        if not self.is_torgb:
            kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        kernels = (kernels * self.magnitude_ema.rsqrt()).flatten(0, 1)
        n = len(x)
        x = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, padding=self.conv_kernel - 1, groups=n)
        x = x.reshape(n, -1, *x.shape[2:]) + self.bias[None, :, None, None]
        x = fir(x, self.up_filter, up=self.up_factor, pad=tuple(self.padding), gain=self.up_factor**2)
        if not self.is_torgb:
            x = F.leaky_relu(x, 0.2) * math.sqrt(2)
        return fir(x.clamp(-self.conv_clamp, self.conv_clamp), self.down_filter, down=self.down_factor)


class Generator(nn.Module):
    def __init__(self, w_dim=12):
        super().__init__()
        self.mapping = nn.Sequential(Affine(w_dim, w_dim), nn.LeakyReLU(0.2), Affine(w_dim, w_dim))
        self.input = nn.Parameter(torch.randn(14, 8, 8))
        self.L0 = SynthesisLayer(w_dim, False, 14, 12, 8, 8)
        self.L1 = SynthesisLayer(w_dim, False, 12, 10, 8, 16)
        self.L2 = SynthesisLayer(w_dim, True, 10, 3, 16, 16)

    def forward(self, z):
        w = self.mapping(z)
        x = self.input.repeat(len(z), 1, 1, 1)
        for layer in (self.L0, self.L1, self.L2):
            x = layer(x, w)
        return x


def make():
    torch.manual_seed(0)
    return Generator()


def test_every_layer_is_bound_at_its_convolution():
    infos = rc.list_layers(make(), torch.randn(1, 12))
    assert [(info.name, info.family, info.solver) for info in infos] == [
        ("L0", "stylegan3", "lm"),
        ("L1", "stylegan3", "lm"),
        ("L2", "stylegan3", "closed_form"),
    ]
    assert infos[1].key_size == (8, 8) and infos[1].value_size == (10, 10), "the convolution pads fully"


def test_the_rest_of_the_layer_follows_a_given_value():
    generator, z = make().eval(), torch.randn(3, 12)
    for name in ("L0", "L1", "L2"):
        layer = rc.bind(generator, name)
        assert torch.allclose(layer.render(z, layer.values(z)), generator(z), atol=1e-5)
        assert not torch.allclose(layer.render(z, 2 * layer.values(z)), generator(z), atol=1e-2)


def test_the_key_of_an_image_does_not_depend_on_its_batch():
    layer, z = rc.bind(make(), "L1"), torch.randn(3, 12)
    assert torch.allclose(layer.keys(z)[1:2], layer.keys(z[1:2]), atol=1e-4)
