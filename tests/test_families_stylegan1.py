"""StyleGAN: equalised weights made by a hook, fused upsampling, AdaIN. See ``test_families.py``."""

import copy
import math

import torch
import torch.nn.functional as F
from helpers import reference
from torch import nn

import rewrite_core as rc


class EqualLR:
    """Equalised learning rate: the weight is stored at unit variance and scaled before every forward pass."""

    def __init__(self, name):
        self.name = name

    def compute_weight(self, module):
        weight = getattr(module, self.name + "_orig")
        return weight * math.sqrt(2 / weight[0].numel())

    def __call__(self, module, input):
        setattr(module, self.name, self.compute_weight(module))


def equal_lr(module, name="weight"):
    weight = getattr(module, name)
    del module._parameters[name]
    module.register_parameter(name + "_orig", nn.Parameter(torch.randn_like(weight)))
    module.register_forward_pre_hook(EqualLR(name))
    return module


class EqualConv2d(nn.Module):
    def __init__(self, *args, **options):
        super().__init__()
        self.conv = equal_lr(nn.Conv2d(*args, **options))

    def forward(self, input):
        return self.conv(input)


class EqualLinear(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.linear = equal_lr(nn.Linear(in_dim, out_dim))

    def forward(self, input):
        return self.linear(input)


class FusedUpsample(nn.Module):
    def __init__(self, in_channel, out_channel, kernel_size, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_channel, out_channel, kernel_size, kernel_size))
        self.bias = nn.Parameter(0.1 * torch.randn(out_channel))
        self.multiplier = math.sqrt(2 / (in_channel * kernel_size**2))
        self.pad = padding

    def forward(self, input):
        w = F.pad(self.weight * self.multiplier, [1, 1, 1, 1])
        w = sum(w[:, :, a : w.shape[2] - 1 + a, b : w.shape[3] - 1 + b] for a in (0, 1) for b in (0, 1)) / 4
        return F.conv_transpose2d(input, w, self.bias, stride=2, padding=self.pad)


class NoiseInjection(nn.Module):
    def __init__(self, channel):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(1, channel, 1, 1))

    def forward(self, image, noise):
        return image + self.weight * noise


class AdaptiveInstanceNorm(nn.Module):
    def __init__(self, in_channel, style_dim):
        super().__init__()
        self.norm = nn.InstanceNorm2d(in_channel)
        self.style = EqualLinear(style_dim, 2 * in_channel)

    def forward(self, input, style):
        gamma, beta = self.style(style)[:, :, None, None].chunk(2, 1)
        return (1 + gamma) * self.norm(input) + beta


class StyledConvBlock(nn.Module):
    def __init__(self, in_channel, out_channel, style_dim, first):
        super().__init__()
        self.conv1 = first
        self.noise1, self.adain1 = NoiseInjection(in_channel), AdaptiveInstanceNorm(in_channel, style_dim)
        self.conv2 = EqualConv2d(in_channel, out_channel, 3, padding=1)
        self.noise2, self.adain2 = NoiseInjection(out_channel), AdaptiveInstanceNorm(out_channel, style_dim)

    def forward(self, input, style):
        out = self.conv1(input)
        for noise, adain, conv in ((self.noise1, self.adain1, self.conv2), (self.noise2, self.adain2, nn.Identity())):
            out = noise(out, torch.randn(len(out), 1, *out.shape[2:], device=out.device))
            out = conv(adain(F.leaky_relu(out, 0.2), style))
        return out


class Generator(nn.Module):
    def __init__(self, style_dim=12):
        super().__init__()
        self.style = nn.Sequential(EqualLinear(style_dim, style_dim), nn.LeakyReLU(0.2))
        self.input = nn.Parameter(torch.randn(1, 12, 4, 4))
        upsample = nn.Sequential(nn.Upsample(scale_factor=2), EqualConv2d(10, 10, 3, padding=1))
        self.progression = nn.ModuleList(
            [
                StyledConvBlock(12, 10, style_dim, nn.Identity()),
                StyledConvBlock(10, 9, style_dim, upsample),
                StyledConvBlock(8, 8, style_dim, FusedUpsample(9, 8, 3, padding=1)),
            ]
        )
        self.to_rgb = EqualConv2d(8, 3, 1)

    def forward(self, z):
        style = self.style(z)
        out = self.input.repeat(len(z), 1, 1, 1)
        for block in self.progression:
            out = block(out, style)
        return self.to_rgb(out)


def make():
    torch.manual_seed(0)
    return Generator()


def test_the_convolutions_are_bound_by_the_weights_they_store():
    generator = make()
    infos = {info.name: info for info in rc.list_layers(generator, torch.randn(1, 12)) if "style" not in info.name}
    assert list(infos) == [
        "progression.0.conv2.conv",
        "progression.1.conv1.1.conv",
        "progression.1.conv2.conv",
        "progression.2.conv1",
        "progression.2.conv2.conv",
        "to_rgb.conv",
    ]
    assert {(info.family, info.solver) for info in infos.values()} == {("stylegan1", "closed_form")}
    layer = rc.bind(generator, "progression.1.conv2")
    assert layer.name == "progression.1.conv2.conv" and layer.parameter is layer.module.weight_orig


def test_an_edited_state_dict_loads_where_the_original_did():
    generator, other, z = make(), make(), rc.sample_latents(12, 24)
    layer = rc.bind(generator, "progression.1.conv2")
    moment = rc.collect_second_moment(layer, z, progress=False)
    mask = torch.ones(8, 8)
    edit = rc.Edit(copy=rc.Selection(1, mask), paste=rc.Selection(2, mask))
    with reference.rewrite(layer, moment, edit, z, loss="l2"):
        edited, images = copy.deepcopy(generator.state_dict()), layer.render(z)
    assert not torch.equal(layer.render(z), images)
    other.load_state_dict(edited)
    assert torch.equal(rc.bind(other, "to_rgb").render(z), images)
