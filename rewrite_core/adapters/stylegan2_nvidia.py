"""StyleGAN2 generators whose layers call a functional ``modulated_conv2d``, fused or not, with float16 layers.

A SynthesisLayer or ToRGBLayer holds weight [O, I, k, k], ``affine`` (latent -> style) and a bias. It adds noise, and
ends with bias, leaky ReLU, gain and a clamp. A float16 layer normalises weight and style first, which the demodulation
undoes: its key carries the normalised style, in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..waits import unlikely
from .base import Capture, LayerAdapter, PostOperation, has, per_channel
from .modulated import ModulatedLayer, as_drawn_next, resample
from .weights import class_name

SLOPES = {"linear": 1.0, "lrelu": 0.2, "relu": 0.0}


class NvidiaStyleGAN2Layer(ModulatedLayer):
    """A SynthesisLayer (its value: after noise, bias, leaky ReLU, gain, clamp) or a ToRGBLayer (after bias, clamp)."""

    family = "stylegan2_nvidia"

    @classmethod
    def recognise(cls, generator: nn.Module, path: str) -> LayerAdapter | None:
        module = generator.get_submodule(path)
        kinds = {"SynthesisLayer": ("act_gain", "resample_filter", "up"), "ToRGBLayer": ("weight_gain",)}
        needed = ("affine", "weight", "bias", "conv_clamp", *kinds.get(class_name(module), ("not a layer",)))
        return cls(path, module) if has(module, *needed) else None

    @property
    def demodulates(self) -> bool:
        return not self._to_rgb

    @property
    def _to_rgb(self) -> bool:
        return hasattr(self.module, "weight_gain")

    def refusal(self) -> str | None:
        activation = getattr(self.module, "activation", "linear")
        if activation not in SLOPES:
            return f"its activation {activation!r} is not one of {list(SLOPES)}"
        return super().refusal()

    def capture(self, args: tuple, kwargs: dict[str, Any]) -> Capture:
        return self._capture(*args, **kwargs)

    def _capture(
        self, x: Tensor, w: Tensor, noise_mode: str = "random", fused_modconv: bool = True, gain: float = 1
    ) -> Capture:
        module = self.module
        style = module.affine(w)
        if self._to_rgb:
            style = style * module.weight_gain
        elif x.dtype == torch.float16:
            style = style / style.abs().amax(1, keepdim=True)
        wide = torch.promote_types(x.dtype, torch.float32)
        style = style.to(wide)
        extra = {"style": style, "gain": torch.tensor(float(gain), dtype=wide, device="cpu")}
        if not self._to_rgb and module.use_noise and noise_mode != "none":
            noise = module.noise_const
            if noise_mode == "random":
                with as_drawn_next(x.device):
                    noise = torch.randn([len(x), 1, module.resolution, module.resolution], device=x.device)
            noise = noise.reshape(-1, 1, *noise.shape[-2:]) * module.noise_strength
            extra["noise"] = noise.detach().to(wide)
        return Capture(x.to(wide) * style[:, :, None, None], extra)

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        module, size = self.module, weight.shape[2]
        if self._to_rgb:
            return F.conv2d(key, weight)
        if module.up == 1:
            return F.conv2d(key, weight, padding=module.padding)
        taps, up = len(module.resample_filter), module.up
        before = module.padding + (taps + up - 1) // 2 - (size - 1)
        after = module.padding + (taps - up) // 2 - (size - up)
        out = F.conv_transpose2d(key, weight.transpose(0, 1), stride=up)
        return resample(out, module.resample_filter, pad=(before, after) * 2, gain=up**2)

    def after(self, capture: Capture) -> PostOperation:
        shift = per_channel(self.module.bias.detach().to(capture.key.dtype), 2)
        if self._to_rgb:
            return PostOperation(shift)
        if "noise" in capture.extra:
            shift = shift + capture.extra["noise"]
        gain = float(self.module.act_gain) * capture.extra["gain"].item()
        return PostOperation(shift, SLOPES[self.module.activation], gain)

    def _limit(self, capture: Capture) -> float:
        clamp = self.module.conv_clamp
        return math.inf if clamp is None else float(clamp) * capture.extra["gain"].item()

    def post_operation(self, capture: Capture) -> PostOperation | None:
        """None where the clamp of float16 layers is at work, as no channel's output is then known from its sum."""
        if self._limit(capture) < math.inf:
            with torch.no_grad():
                weight = self.canonical(self.weight.detach()).to(capture.key.dtype)
                if unlikely(super().value(capture, weight).abs().max() >= self._limit(capture)):
                    return None
        return super().post_operation(capture)

    def value(self, capture: Capture, weight: Tensor) -> Tensor:
        value, limit = super().value(capture, weight), self._limit(capture)
        return value if limit == math.inf else value.clamp(-limit, limit)
