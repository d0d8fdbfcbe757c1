"""The reference's model: value, residual and derivatives of the channels of one edit."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .problem import REACH


@dataclasses.dataclass(frozen=True)
class Model:
    """Value, residual and derivatives of n channels of one edit; float64, unknowns scaled. G demodulations."""

    basis: Tensor  # [J, P]
    base: Tensor  # [n, P], and so are target and shift
    target: Tensor
    shift: Tensor
    demodulation: tuple[Tensor, Tensor, Tensor] | None  # [G, n], [G, n, J], [G, J, J]
    slope: float
    gain: float
    segments: Tensor | None = None  # [P], or None where G is 1

    def spread(self, own: Tensor) -> Tensor:
        """What is each demodulation's own, [n, G, ...], for the pixels: [n, P, ...], or [n, 1, ...] where G is 1."""
        return own if self.segments is None else own[:, self.segments]

    def linearise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """lin [n, P], m [n, G], dm [n, G, J] or None."""
        lin = self.base + x @ self.basis
        if self.demodulation is None:
            return lin, torch.ones_like(lin[:, :1]), None
        constant, linear, quadratic = self.demodulation
        half = linear + x @ quadratic  # half the gradient of the squared norm
        m = (constant + ((linear + half) * x).sum(-1)).rsqrt()  # NaN where not positive: rejected
        return lin, m.mT, (-(m[..., None] ** 3) * half).transpose(0, 1)

    def reach(self, x: Tensor) -> Tensor:
        """x^T quadratic x over its largest allowed value, [n], for the demodulation where that is most; 0 without."""
        if self.demodulation is None:
            return torch.zeros_like(x[:, 0])
        constant, _, quadratic = self.demodulation
        return (((x @ quadratic) * x).sum(-1) / (REACH**2 * constant)).amax(0)

    def residual(self, lin: Tensor, m: Tensor, kink: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """r and two derivatives of the value by m lin; the kink is rounded over a width [n], or sharp."""
        pre = self.spread(m) * lin + self.shift
        if kink is None:
            steep = self.gain * torch.where(pre > 0, torch.ones_like(pre), self.slope)
            return steep * pre - self.target, steep, torch.zeros_like(steep)
        square = kink[:, None] ** 2
        root = (pre * pre + square).sqrt()
        up, down = 0.5 * self.gain * (1 + self.slope), 0.5 * self.gain * (1 - self.slope)
        return up * pre + down * root - self.target, up + down * pre / root, down * square / root**3

    def jacobian(self, lin: Tensor, m: Tensor, dm: Tensor | None) -> Tensor:
        """d (m lin) / dx, [n, J, P]."""
        rows = self.spread(m)[:, None] * self.basis
        return rows if dm is None else rows + self.spread(dm).mT * lin[:, None, :]
