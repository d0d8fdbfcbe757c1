"""GPT-2's linear layers in the ``transformers`` package: Conv1D, an ``nn.Linear`` whose weight is stored as [I, O].

The key and the value are those of a linear layer: vectors at token positions, input and output.
"""

from __future__ import annotations

from torch import Tensor, nn

from .base import LayerAdapter, has
from .conv import LinearLayer
from .weights import class_name


class Conv1DLayer(LinearLayer):
    """A Conv1D, known by its name, ``weight`` [I, O], ``bias`` and ``nf``."""

    family = "transformers"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        return cls(path, module) if class_name(module) == "Conv1D" and has(module, "weight", "bias", "nf") else None

    def refusal(self) -> str | None:
        return LayerAdapter.refusal(self)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)

    def native(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1)
