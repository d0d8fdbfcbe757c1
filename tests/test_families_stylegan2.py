"""StyleGAN2 with a module that has a 5-D weight and one grouped convolution for all images (see test_families.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewrite_core as rc


class EqualLinear(nn.Module):
    def __init__(self, in_dim, out_dim, bias_init=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.full((out_dim,), bias_init))
        self.scale = 1 / math.sqrt(in_dim)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Blur(nn.Module):
    def __init__(self, pad):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(taps, taps) / 16)  # sums to 4
        self.pad = pad

    def forward(self, x):
        kernel = torch.flip(self.kernel, [0, 1]).repeat(x.shape[1], 1, 1, 1)
        return F.conv2d(F.pad(x, (*self.pad, *self.pad)), kernel, groups=x.shape[1])


class ModulatedConv2d(nn.Module):
    """One kernel per image, all images in the channels of one grouped convolution."""

    def __init__(
        self, in_channel, out_channel, kernel_size, style_dim, demodulate=True, upsample=False, downsample=False
    ):
        super().__init__()
        self.out_channel, self.kernel_size = out_channel, kernel_size
        self.demodulate, self.upsample, self.downsample = demodulate, upsample, downsample
        if upsample:
            self.blur = Blur((1, 1))
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channel, 1.0)

    def forward(self, input, style):
        n, i, h, w = input.shape
        weight = self.weight * self.scale * self.modulation(style)[:, None, :, None, None]
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        images = input.reshape(1, n * i, h, w)
        if self.upsample:
            kernels = weight.transpose(1, 2).reshape(n * i, self.out_channel, self.kernel_size, self.kernel_size)
            out = F.conv_transpose2d(images, kernels, stride=2, groups=n)
            return self.blur(out.reshape(n, self.out_channel, *out.shape[2:]))
        out = F.conv2d(images, weight.flatten(0, 1), padding=self.padding, groups=n)
        return out.reshape(n, self.out_channel, h, w)


class NoiseInjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.3))

    def forward(self, image, noise=None):
        if noise is None:
            noise = image.new_empty(len(image), 1, *image.shape[2:]).normal_()
        return image + self.weight * noise


class FusedLeakyReLU(nn.Module):
    def __init__(self, channel):
        super().__init__()
        self.bias = nn.Parameter(0.1 * torch.randn(channel))
        self.negative_slope, self.scale = 0.2, math.sqrt(2)

    def forward(self, input):
        return self.scale * F.leaky_relu(input + self.bias[None, :, None, None], self.negative_slope)


class StyledConv(nn.Module):
    def __init__(self, in_channel, out_channel, style_dim, upsample=False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channel, out_channel, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channel)

    def forward(self, input, style, noise=None):
        return self.activate(self.noise(self.conv(input, style), noise=noise))


class ToRGB(nn.Module):
    def __init__(self, in_channel, style_dim):
        super().__init__()
        self.conv = ModulatedConv2d(in_channel, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, input, style, skip=None):
        out = self.conv(input, style) + self.bias
        return out if skip is None else out + F.interpolate(skip, scale_factor=2)


class Generator(nn.Module):
    def __init__(self, style_dim=12):
        super().__init__()
        self.style = nn.Sequential(
            EqualLinear(style_dim, style_dim), nn.LeakyReLU(0.2), EqualLinear(style_dim, style_dim)
        )
        self.input = nn.Parameter(torch.randn(1, 14, 4, 4))
        self.conv1, self.to_rgb1 = StyledConv(14, 12, style_dim), ToRGB(12, style_dim)
        self.convs = nn.ModuleList([StyledConv(12, 10, style_dim, upsample=True), StyledConv(10, 8, style_dim)])
        self.to_rgbs = nn.ModuleList([ToRGB(8, style_dim)])
        self.noises = nn.Module()
        for number, side in enumerate([4, 8, 8]):
            self.noises.register_buffer(f"noise_{number}", torch.randn(1, 1, side, side))

    def forward(self, styles, randomize_noise=True):
        latent = self.style(styles[0])
        noise = [None] * 3 if randomize_noise else [getattr(self.noises, f"noise_{i}") for i in range(3)]
        x = self.conv1(self.input.repeat(len(latent), 1, 1, 1), latent, noise=noise[0])
        skip = self.to_rgb1(x, latent)
        x = self.convs[0](x, latent, noise=noise[1])
        x = self.convs[1](x, latent, noise=noise[2])
        return self.to_rgbs[0](x, latent, skip), None


def make():
    torch.manual_seed(0)
    return Generator()


def random_noise(generator, z):
    return generator([z])[0]


def stored_noise(generator, z):
    return generator([z], randomize_noise=False)[0]


def test_every_modulated_convolution_is_bound():
    infos = rc.list_layers(make(), torch.randn(1, 12), forward=random_noise)
    assert [(info.name, info.solver) for info in infos] == [
        ("conv1.conv", "lm"),
        ("to_rgb1.conv", "closed_form"),
        ("convs.0.conv", "lm"),
        ("convs.1.conv", "lm"),
        ("to_rgbs.0.conv", "closed_form"),
    ]
    assert {info.family for info in infos} == {"stylegan2"}
    assert infos[2].key_size == (4, 4) and infos[2].value_size == (8, 8)


def test_noise_is_the_same_in_every_pass_and_the_caller_s_is_untouched():
    generator, z = make(), torch.randn(3, 12)
    layer = rc.bind(generator, "convs.1", forward=random_noise)
    state = torch.get_rng_state()
    keys, values = layer.keys(z), layer.values(z)
    assert torch.equal(keys, layer.keys(z)) and torch.equal(values, layer.values(z))
    images = layer.render(z)
    assert torch.equal(images, layer.render(z)) and torch.allclose(images, layer.render(z, values), atol=1e-5)
    rc.list_layers(generator, z, forward=random_noise)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(random_noise(generator, z), random_noise(generator, z)), "the generator itself still draws"
    stored = rc.bind(generator, "convs.1", forward=stored_noise)
    assert not torch.allclose(stored.keys(z), keys, atol=1e-3)


def test_a_downsampling_one_is_refused():
    generator = make()
    generator.convs[1].conv.downsample = True
    with pytest.raises(rc.UnknownLayerError, match="downsamples"):
        rc.bind(generator, "convs.1")
