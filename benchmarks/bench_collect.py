"""Collecting a second moment, end to end, against the bare forward pass up to the layer and the
reference implementation's way. Generators of true widths with random weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rewrite_core import bind, collect_second_moment, sample_latents
from rewrite_core.generators.proggan import ProgGAN
from rewrite_core.generators.stylegan2 import StyleGAN2

from .harness import Case, Contender, Problem

OP = "collect"
KERNEL = "second_moment"  # the op whose backend it uses
TESTS = ("moments", "moments_collection")
BATCH, BATCHES = 8, 8


def proggan_256() -> nn.Module:
    return ProgGAN([512, 512, 512, 512, 512, 256, 128, 64])


def stylegan2_256() -> nn.Module:
    return StyleGAN2(256)


def small_proggan() -> nn.Module:
    return ProgGAN([32, 32, 32])


def small_stylegan2() -> nn.Module:
    return StyleGAN2(8, style_dim=32, n_mlp=2, channels={4: 32, 8: 32})


def small_before(channels: int, groups: int = 1, side: int = 32) -> nn.Module:
    """A convolution with next to nothing before it: what is left is its keys."""
    return nn.Sequential(
        nn.Linear(16, channels * side),
        nn.Unflatten(1, (channels, 1, side)),
        nn.Upsample(size=side),
        nn.Conv2d(channels, channels, 3, padding=1, groups=groups),
    )


def depthwise_512() -> nn.Module:
    return small_before(512, groups=512)


def grouped_512() -> nn.Module:
    return small_before(512, groups=4)


def dense_23() -> nn.Module:
    """As many weights as the depthwise one, to 3 %."""
    return small_before(23)


def dense_256() -> nn.Module:
    """As many weights as the one of four groups."""
    return small_before(256)


def small_depthwise() -> nn.Module:
    return small_before(32, groups=32, side=8)


# 512 channels @ 32x32. convs.6 is the reference implementation's layer 8; convs.5 has the least to run before it.
FULL = (
    (proggan_256, "layer8.conv", 512),
    (stylegan2_256, "convs.6.conv", 512),
    (stylegan2_256, "convs.5.conv", 512),
    *((build, "3", 16) for build in (depthwise_512, dense_23, grouped_512, dense_256)),
)
QUICK = ((small_proggan, "layer4.conv", 32), (small_stylegan2, "convs.1.conv", 32), (small_depthwise, "3", 16))


class _Stop(Exception):
    pass


def cases(quick: bool) -> list[Case]:
    return [
        Case(f"{build.__name__} {name}", functools.partial(make, build, name, size))
        for build, name, size in (QUICK if quick else FULL)
    ]


def make(
    build: Callable[[], nn.Module], name: str, size: int, backend: str, device: str = "cpu", batch_size: int = BATCH
) -> Problem:
    """The bare pass yields no moment, so its error is 1.

    The reference's way adds every key by itself, in float32, after the same forward pass, so its error grows with their
    number; on a GPU, where it would take minutes, a product of the permuted copy stands for it. It knows of no groups
    of channels; its matrix counts within them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = build().eval().requires_grad_(False).to(device)
    layer = bind(generator, name)
    latents = sample_latents(size, batch_size * BATCHES, seed=1).to(device)
    channels, size = layer.in_channels, layer.in_channels // layer.groups
    group = torch.arange(channels, device=device) // size
    within = group[:, None] == group

    def rows(batch: Tensor) -> Tensor:
        return layer.keys(batch).permute(0, 2, 3, 1).reshape(-1, channels)

    exact, count = torch.zeros(channels, channels, dtype=torch.float64, device=device), 0
    for batch in latents.split(batch_size):
        wide = rows(batch).double()
        exact.addmm_(wide.T, wide)
        count += len(wide)
    exact *= within / count

    def ours() -> Tensor:
        return collect_second_moment(layer, latents, batch_size=batch_size, progress=False).matrix()

    def bare() -> Tensor:
        def stop(module: nn.Module, args: tuple) -> None:
            raise _Stop

        handle = layer.module.register_forward_pre_hook(stop)
        with torch.no_grad():
            for batch in latents.split(batch_size):
                with contextlib.suppress(_Stop):
                    generator(batch)
        handle.remove()
        return torch.zeros_like(exact)

    def reference() -> Tensor:
        total = torch.zeros(channels, channels, device=device)
        for batch in latents.split(batch_size):
            keys = rows(batch)
            if device == "cpu":
                for key in keys:
                    total.addr_(key, key)
            else:
                total.addmm_(keys.T, keys)
        return total * within / count

    return Problem(
        ours=Contender("rewrite_core", ours),
        stock=[
            Contender("bare forward pass", bare, aside=True),
            Contender("rank-1 updates", reference, rounds=3) if device == "cpu" else Contender("addmm", reference),
        ],
        shapes={"latents": list(latents.shape), "keys": [count, channels]},
        dtype="float32",
        operations=count * channels * (size + 1),
        traffic=count * channels * 4 + channels * (size + 1) * 8,
        error=lambda matrix: ((matrix.double().to(device) - exact).norm() / exact.norm()).item(),
        error_kind="relative Frobenius error",
        tolerance=1e-6 if device == "cpu" else 2e-6,
    )


def bench_collect(measure: Callable[[], None]) -> None:
    measure()
