"""Adapters: one short file per generator family tells the library about that family's layers. Most specific first."""

from __future__ import annotations

from .base import LayerAdapter
from .biggan import BigGANLayer
from .conv import ConvLayer
from .diffusers import DiffusersLayer
from .general import GeneralLayer
from .proggan import ProgGANLayer
from .stylegan1 import EqualisedConvLayer, FusedUpsampleLayer
from .stylegan2 import StyleGAN2Layer
from .stylegan2_nvidia import NvidiaStyleGAN2Layer
from .stylegan3 import StyleGAN3Layer
from .transformers import Conv1DLayer

ADAPTERS: tuple[type[LayerAdapter], ...] = (
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


def family_names(kind: type[LayerAdapter] = LayerAdapter) -> set[str]:
    """The names of all families."""
    names = {kind.family} if hasattr(kind, "family") else set()
    return names.union(*map(family_names, kind.__subclasses__()))
