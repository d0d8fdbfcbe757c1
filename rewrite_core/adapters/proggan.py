"""Layers of Progressive GAN generators (Karras et al., 2018).

The *key* of ``layerN.conv`` is its input and the *value* its raw output, so the layer is linear in its weight and an L2
rewrite has the exact closed form.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import LayerAdapter
from .conv import ConvLayer


class ProgGANLayer(ConvLayer):
    """``layerN.conv`` of a ProgGAN: the convolution before its WScale. Also binds as ``layerN``."""

    family = "proggan"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module: Any = generator.get_submodule(path)
        if hasattr(module, "wscale") and hasattr(module, "conv"):
            path, module = f"{path}.conv".lstrip("."), module.conv
        else:
            parent = generator.get_submodule(path.rpartition(".")[0])
            if not hasattr(parent, "wscale") or getattr(parent, "conv", None) is not module:
                return None
        return cls(path, module) if isinstance(module, nn.Conv2d) else None
