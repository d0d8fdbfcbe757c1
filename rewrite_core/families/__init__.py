"""Generator families, most specific first."""

from __future__ import annotations

from .base import Box, Capture, LayerFamily, PostOperation
from .conv import ConvLayer
from .proggan import ProgGAN, ProgGANLayer, load_proggan
from .stylegan2 import StyleGAN2, StyleGAN2Layer, load_stylegan2

FAMILIES: tuple[type[LayerFamily], ...] = (StyleGAN2Layer, ProgGANLayer, ConvLayer)

__all__ = [
    "FAMILIES", "Box", "Capture", "ConvLayer", "LayerFamily", "PostOperation", "ProgGAN", "ProgGANLayer",
    "StyleGAN2", "StyleGAN2Layer", "load_proggan", "load_stylegan2",
]  # fmt: skip
