"""A diffusion UNet and a VAE decoder with the blocks of diffusers. See ``test_families.py``."""

import math
import types

import torch
import torch.nn.functional as F
from torch import nn

import rewrite_core as rc


class ResnetBlock2D(nn.Module):
    def __init__(self, in_channels, out_channels, temb_channels=None):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, in_channels), nn.GroupNorm(2, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels) if temb_channels else None
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, input_tensor, temb=None):
        hidden_states = self.conv1(F.silu(self.norm1(input_tensor)))
        if self.time_emb_proj is not None:
            hidden_states = hidden_states + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        return hidden_states + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))


class Upsample2D(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states):
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Downsample2D(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_states):
        return self.conv(hidden_states)


class UNet2DModel(nn.Module):
    def __init__(self, channels=8, temb_channels=16):
        super().__init__()
        self.time_embedding = nn.Linear(8, temb_channels)
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.down = nn.ModuleList([ResnetBlock2D(channels, channels, temb_channels), Downsample2D(channels)])
        self.mid = ResnetBlock2D(channels, channels, temb_channels)
        self.up = nn.ModuleList([Upsample2D(channels), ResnetBlock2D(2 * channels, channels, temb_channels)])
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, sample, timestep):
        angles = timestep[:, None] * torch.exp(-math.log(1e4) * torch.arange(4, device=sample.device) / 4).to(sample)
        temb = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1))
        skip = self.down[0](self.conv_in(sample), temb)
        x = self.up[0](self.mid(self.down[1](skip), temb))
        return types.SimpleNamespace(sample=self.conv_out(self.up[1](torch.cat([x, skip], 1), temb)))


class Decoder(nn.Module):
    """Of a VAE; of a tiny autoencoder where `tiny`: convolutions and ReLU alone."""

    def __init__(self, tiny=False):
        super().__init__()
        self.conv_in = nn.Conv2d(12, 8, 1)
        if tiny:
            self.layers = nn.Sequential(
                nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()
            )
        else:
            self.layers = nn.Sequential(ResnetBlock2D(8, 8), Upsample2D(8), ResnetBlock2D(8, 6))
        self.conv_out = nn.Conv2d(8 if tiny else 6, 3, 3, padding=1)

    def forward(self, z):
        return self.conv_out(self.layers(self.conv_in(z)))


def make(kind="unet"):
    torch.manual_seed(0)
    return UNet2DModel() if kind == "unet" else Decoder(tiny=kind == "tiny")


def rows(latents):
    """[N, 12] -> [N, 5, 8, 8]: four channels of noise, and one that holds the row's own timestep."""
    noise = torch.cat([latents, latents.flip(1), latents[:, :8]], 1)
    noise = torch.einsum("ni,nj->nij", noise, noise)[:, :, :32].reshape(len(latents), 4, 16, 16)[:, :, :8, :8]
    steps = (latents[:, :1].abs() * 300).round().clamp(max=999)
    return torch.cat([noise, steps[:, :, None, None].expand(-1, 1, 8, 8)], 1)


def denoise(unet, latents):
    packed = rows(latents)
    return unet(packed[:, :-1], packed[:, -1].mean((1, 2))).sample


def decode(decoder, latents):
    return decoder(latents[:, :, None, None].expand(-1, -1, 4, 4))


def test_every_convolution_of_a_unet_is_bound():
    infos = {info.name: info for info in rc.list_layers(make(), torch.randn(1, 12), forward=denoise)}
    assert {name for name, info in infos.items() if info.family == "diffusers"} == {
        "down.0.conv1",
        "down.0.conv2",
        "down.1.conv",
        "mid.conv1",
        "mid.conv2",
        "up.0.conv",
        "up.1.conv1",
        "up.1.conv2",
        "up.1.conv_shortcut",
    }
    assert (
        infos["conv_in"].family == infos["conv_out"].family == "conv" and infos["mid.time_emb_proj"].family == "linear"
    )
    assert infos["up.0.conv"].key_size == (8, 8) and infos["down.1.conv"].value_size == (4, 4)


def test_keys_are_pooled_over_timesteps():
    """A row has a timestep of its own: the moment over all rows is the mean of those at single timesteps."""
    unet, z = make().eval(), rc.sample_latents(12, 32)
    layer = rc.bind(unet, "up.0.conv", forward=denoise)
    moment = rc.collect_second_moment(layer, z, progress=False)
    total = torch.zeros(8, 8, dtype=torch.float64)
    for row in rows(z):
        step = row[-1].mean()[None]

        def at_that_step(unet, noise, step=step):
            return unet(noise, step).sample

        keys = rc.bind(unet, "up.0.conv", forward=at_that_step).keys(row[None, :-1])[0].flatten(1).double()
        total += keys @ keys.T
    assert torch.allclose(moment.matrix(), total / moment.count, rtol=1e-4, atol=1e-6)


def test_a_vae_by_its_decode_method():
    class AutoencoderKL(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Conv2d(3, 12, 1), make("vae")

        def decode(self, z):
            return types.SimpleNamespace(sample=self.decoder(z))

    vae, z = AutoencoderKL(), torch.randn(2, 12, 4, 4)
    infos = rc.list_layers(vae, z, forward=lambda vae, z: vae.decode(z).sample)
    assert [info.name for info in infos][:3] == ["decoder.conv_in", "decoder.layers.0.conv1", "decoder.layers.0.conv2"]
    assert all(info.solver == "closed_form" for info in infos)
