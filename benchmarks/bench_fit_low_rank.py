"""The Lambda fit alone (basis maps in, coefficients out) against plain PyTorch's ways to the same optimum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rewrite_core.ops import fit_low_rank
from rewrite_core.ops.fit_low_rank import FitResult

from .harness import Case, Contender, Problem

OP = "fit_low_rank"
ADAM_RATE = 0.05  # the reference implementation's, as are its 2001 steps
SLOPE, GAIN = 0.2, math.sqrt(2.0)  # StyleGAN2's leaky ReLU


def cases(quick: bool) -> list[Case]:
    def l1(channels: int, side: int, rank: int, adam: int = 0) -> Case:
        name = f"l1 {channels} channels, {side}x{side}, rank {rank}"
        return Case(name, functools.partial(make_l1, channels, side, rank, adam))

    def l2(channels: int, side: int, rank: int) -> Case:
        name = f"l2 linear {channels} channels, {side}x{side}, rank {rank}"
        return Case(name, functools.partial(make_l2, channels, side, rank))

    if quick:
        return [l1(16, 6, 1, adam=100), l2(16, 6, 1)]
    return [l1(64, 8, 1, adam=2001), l1(512, 10, 1), l1(512, 10, 4), l2(512, 10, 1), l2(512, 10, 4)]


def _layer(channels: int, side: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A 3x3 layer as the solver meets it: weight, style, directions, basis maps [J, P], linear output."""
    generator = torch.Generator().manual_seed(channels + side + rank)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / math.sqrt(9 * channels)
    style = 1 + 0.3 * torch.randn(channels, generator=generator)
    rows = torch.linalg.qr(torch.randn(channels, rank, generator=generator)).Q.T
    key = torch.randn(1, channels, side, side, generator=generator)
    key = style[:, None, None] * F.avg_pool2d(key, 3, 1, 1) * 3  # neighbouring pixels of a feature map agree
    key = key + (rows.sum(0) * math.sqrt(channels) / 4)[:, None, None]  # and share the context
    base = F.conv2d(key, weight, padding=1)[0].flatten(1)
    maps = torch.einsum("ri,nihw->rnhw", rows, key)
    return weight, style, rows, F.unfold(maps, 3, padding=1).flatten(0, 1), base


def _truth(basis: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients that explain most of the target, and noise for the rest: no fit reaches zero."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(len(base), len(basis), generator=generator)
    hidden = hidden * (base.std() / (hidden @ basis).std())
    return hidden, 0.3 * torch.randn(base.shape, generator=generator)


def make_l1(channels: int, side: int, rank: int, adam: int, backend: str) -> Problem:
    """StyleGAN2: demodulation, noise, leaky ReLU, l1. `adam`: against so many steps of Adam too."""
    weight, style, rows, basis, base = _layer(channels, side, rank)
    square = style.square()
    constant = torch.einsum("oiyx,i->o", weight.square(), square) + 1e-8
    linear = torch.einsum("oiyx,i,ri->oryx", weight, square, rows).flatten(1)
    quadratic = torch.kron(torch.einsum("ri,i,si->rs", rows, square, rows), torch.eye(9))
    hidden, noise = _truth(basis, base)
    shift = (0.1 * noise[:1]).expand_as(base)

    def value(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        one, two, form, maps, start, bias = (
            part.to(dtype) for part in (constant, linear, quadratic, basis, base, shift)
        )
        norm = one + (x * (2 * two + x @ form)).sum(-1)
        return GAIN * F.leaky_relu(norm.rsqrt()[:, None] * (start + x @ maps) + bias, SLOPE)

    target = value(hidden) + noise

    def loss(x: Tensor) -> float:
        return (value(x.double(), torch.float64) - target.double()).abs().mean().item()

    def fit(name: str, dtype: torch.dtype = torch.float32) -> FitResult:
        maps, start, goal, bias = (part.to(dtype) for part in (basis, base, target, shift))
        return fit_low_rank(
            maps, start, goal, shift=bias, demodulation=(constant, linear, quadratic), slope=SLOPE, gain=GAIN,
            loss="l1", backend=name,
        )  # fmt: skip

    def descend() -> Tensor:
        """Adam on Lambda through the basis maps: the reference's optimiser, spared its convolutions."""
        x = torch.zeros(channels, len(basis), requires_grad=True)
        optimiser = torch.optim.Adam([x], lr=ADAM_RATE)
        for _ in range(adam):
            optimiser.zero_grad()
            F.l1_loss(value(x), target).backward()
            optimiser.step()
        return x.detach()

    best = loss(fit("reference", torch.float64).coefficients)

    def error(result: FitResult | Tensor) -> float:
        """Relative excess of the loss, recomputed here, over the float64 reference's; negative is better."""
        if isinstance(result, Tensor):
            return loss(result) / best - 1
        true = loss(result.coefficients)
        honest = abs(result.loss.mean().item() / true - 1) <= 1e-3
        return true / best - 1 if honest else math.inf

    iterations = int(fit(backend).iterations.sum())
    stock = [Contender("reference backend", lambda: fit("reference"), rounds=5)]
    if adam:
        stock.append(Contender(f"Adam on Lambda, {adam} steps", descend, rounds=3))
    unknowns, pixels = basis.shape
    return Problem(
        ours=Contender("rewrite_core", lambda: fit(backend)),
        stock=stock,
        shapes={"basis": list(basis.shape), "base": list(base.shape)},
        dtype="float32",
        operations=iterations * (pixels * unknowns * (unknowns + 5) + unknowns**3 / 3 + 2 * unknowns**2),
        traffic=4
        * sum(part.numel() for part in (basis, base, target, shift[0], constant, linear, quadratic, hidden)),
        error=error,
        error_kind="loss above the float64 reference's, relative",
        tolerance=1e-2,
        details={"iterations": iterations},
    )


def make_l2(channels: int, side: int, rank: int, backend: str) -> Problem:
    """ProgGAN: the value is the convolution's own output, and least squares has its exact solution."""
    _, _, _, basis, base = _layer(channels, side, rank)
    hidden, noise = _truth(basis, base)
    target = base + hidden @ basis + noise
    exact = torch.linalg.lstsq(basis.double().T, (target.double() - base.double()).T).solution.T

    def fit(name: str) -> FitResult:
        return fit_low_rank(basis, base, target, loss="l2", backend=name)

    def least_squares(dtype: torch.dtype) -> Tensor:
        return torch.linalg.lstsq(basis.T.to(dtype), (target - base).T.to(dtype)).solution.T

    def normal_equations(dtype: torch.dtype) -> Tensor:
        maps, change = basis.to(dtype), (target - base).to(dtype)
        return torch.cholesky_solve(maps @ change.T, torch.linalg.cholesky(maps @ maps.T)).T

    def error(result: FitResult | Tensor) -> float:
        x = result if isinstance(result, Tensor) else result.coefficients
        return ((x.double() - exact).norm() / exact.norm()).item()

    unknowns, pixels = basis.shape
    return Problem(
        ours=Contender("rewrite_core", lambda: fit(backend)),
        stock=[
            Contender("linalg.lstsq", lambda: least_squares(torch.float32)),
            Contender("linalg.lstsq in float64", lambda: least_squares(torch.float64)),
            Contender("normal equations", lambda: normal_equations(torch.float32)),
            Contender("normal equations in float64", lambda: normal_equations(torch.float64)),
            Contender("reference backend", lambda: fit("reference")),
        ],
        shapes={"basis": list(basis.shape), "base": list(base.shape)},
        dtype="float32",
        operations=pixels * unknowns * (unknowns + 1)
        + unknowns**3 / 3
        + 2 * channels * unknowns * (pixels + unknowns),
        traffic=4 * (basis.numel() + 2 * base.numel() + hidden.numel()),
        error=error,
        error_kind="relative error of the coefficients",
        tolerance=1e-6,
    )


def bench_fit_low_rank(measure: Callable[[], None]) -> None:
    measure()
