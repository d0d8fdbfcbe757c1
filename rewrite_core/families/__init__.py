"""Generator families, most specific first."""

from __future__ import annotations

from .base import Box, Capture, LayerFamily, PostOperation, window
from .biggan import BigGANLayer
from .conv import ConvLayer
from .diffusers import DiffusersLayer
from .general import GeneralLayer
from .proggan import ProgGAN, ProgGANLayer, load_proggan
from .stylegan1 import EqualisedConvLayer, FusedUpsampleLayer
from .stylegan2 import StyleGAN2, StyleGAN2Layer, load_stylegan2
from .stylegan2_nvidia import NvidiaStyleGAN2Layer
from .stylegan3 import StyleGAN3Layer
from .transformers import Conv1DLayer

FAMILIES: tuple[type[LayerFamily], ...] = (
    StyleGAN2Layer,
    NvidiaStyleGAN2Layer,
    StyleGAN3Layer,
    EqualisedConvLayer,
    FusedUpsampleLayer,
    BigGANLayer,
    ProgGANLayer,
    DiffusersLayer,
    Conv1DLayer,
    ConvLayer,
    GeneralLayer,
)


def family_names(kind: type[LayerFamily] = LayerFamily) -> set[str]:
    """The names of all families."""
    names = {kind.name} if hasattr(kind, "name") else set()
    return names.union(*map(family_names, kind.__subclasses__()))


__all__ = [
    "FAMILIES",
    "Box",
    "Capture",
    "ConvLayer",
    "LayerFamily",
    "PostOperation",
    "ProgGAN",
    "ProgGANLayer",
    "StyleGAN2",
    "StyleGAN2Layer",
    "family_names",
    "load_proggan",
    "load_stylegan2",
    "window",
]
