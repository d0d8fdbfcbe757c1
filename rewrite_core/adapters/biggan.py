"""BigGAN generators (Brock, Donahue, Simonyan, ICLR 2019, arXiv 1809.11096): spectrally normalised convolutions, and
conditional batch normalisation between them.

Where torch's own spectral norm does it, by hook or parametrization, the layers are plain convolutions and
``weights.py`` folds their weight. Here are those whose forward calls a method for its normalised weight: SNConv2d and
SNLinear. The value is the convolution's output; the class-conditional normalisation that follows belongs to the next
layer's key. Class labels go in through ``forward``.
"""

from __future__ import annotations

from torch import nn

from .base import LayerAdapter
from .conv import ConvLayer, LinearLayer, kind_of
from .weights import Normalised


class BigGANLayer(ConvLayer):
    """An SNConv2d: ``nn.Conv2d`` with a method ``W_`` or ``sn_weights``."""

    family = "biggan"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        kind = kind_of(module)
        if kind not in (nn.Conv2d, nn.Linear) or not isinstance(cls(path, module).computed, Normalised):
            return None
        return (BigGANLinearLayer if kind is nn.Linear else BigGANLayer)(path, module)

    def refusal(self) -> str | None:
        if self.module.padding_mode != "zeros":
            return f"{type(self.module).__name__} does not pad with {self.module.padding_mode!r} as it says"
        return LayerAdapter.refusal(self)


class BigGANLinearLayer(LinearLayer):
    """An SNLinear."""

    family = "biggan"

    def refusal(self) -> str | None:
        return LayerAdapter.refusal(self)
