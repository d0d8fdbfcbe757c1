"""Diffusion UNets and VAE decoders of the ``diffusers`` package: convolutions in its resnet, up- and downsampling
blocks.

They are plain convolutions, and bind as such; the family says which are which. What differs is the call. A decoder is
bound by itself, or with ``forward=lambda vae, z: vae.decode(z).sample``. A UNet is run at many timesteps: its keys are
pooled over them by giving each row of latents a timestep of its own, for instance in one more channel,

    forward=lambda unet, z: unet(z[:, :-1], z[:, -1].mean((1, 2))).sample

so that a second moment is over latents and timesteps, and a selection's row says at which timestep the edit was marked.
"""

from __future__ import annotations

from torch import nn

from .base import LayerAdapter
from .conv import ConvLayer
from .weights import class_name

BLOCKS = ("ResnetBlock2D", "ResnetBlockCondNorm2D", "Upsample2D", "Downsample2D")


class DiffusersLayer(ConvLayer):
    """A convolution directly in one of the package's blocks."""

    family = "diffusers"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        if class_name(generator.get_submodule(path.rpartition(".")[0])) not in BLOCKS:
            return None
        layer = ConvLayer.recognise(generator, path)
        return cls(path, layer.module) if type(layer) is ConvLayer else None
