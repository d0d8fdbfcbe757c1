"""Train the embedded generator: ``python -m rewrite_core.demo.train --out chapels.safetensors``.

Supervised: a random latent, its true render, an L1 loss. Four things make roofs crisp and windows visible:

- the regions of the judged factors weigh more than the background, the small roof most;
- every map size has a 1x1 head of its own (dropped afterwards) that must paint the scene at that size. It
  teaches the early layers where things are, and keeps their features local: what an edit needs;
- the layout is learned first, at 16x16 and 32x32, where a step costs a fraction;
- weights are averaged over the last thousand steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .generator import ProgGANChapels
from .world import FACTORS, LATENT_SIZE, Scene, factor_region, region, render, scene_from_latents

_REGION_WEIGHT = {"roof": 12.0, "lit": 3.0, "watermark": 4.0}


def evaluate(generator: nn.Module, latents: Tensor, batch_size: int = 50) -> dict[str, dict[str, float]]:
    """Quality on latents [N, 16]: per factor, the share of scenes whose painted region is nearer in L1
    to the true render than to every counterfactual, and the mean absolute error in that region (0..1).
    """
    hits = {factor: [] for factor in FACTORS}
    errors = {factor: [] for factor in FACTORS}
    with torch.inference_mode():
        for batch in latents.split(batch_size):
            scene = scene_from_latents(batch)
            truth = render(scene)
            painted = generator(batch).float() / 2 + 0.5
            for factor, states in FACTORS.items():
                mask = factor_region(scene, factor)[:, None]
                size = 3 * mask.sum((1, 2, 3))
                error = ((painted - truth).abs() * mask).sum((1, 2, 3)) / size
                hit = torch.ones(len(batch), dtype=torch.bool)
                for state in states:
                    other = render(scene.replace(**{factor: state}))
                    distance = ((painted - other).abs() * mask).sum((1, 2, 3)) / size
                    hit &= (getattr(scene, factor) == state) | (error < distance)
                hits[factor].append(hit.float())
                errors[factor].append(error)
    return {
        factor: {"nearest_is_true": torch.cat(hits[factor]).mean().item(), "error": torch.cat(errors[factor]).mean().item()}
        for factor in FACTORS
    }


def _sample(batch_size: int, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, their true renders in -1..1, and the weight of each pixel [N, 1, 64, 64]."""
    latents = torch.randn(batch_size, LATENT_SIZE, generator=noise)
    scene = scene_from_latents(latents)
    truth = render(scene)
    # each factor's region, estimated from one other state of it: over a run every state has its turn
    turn = 1 + torch.randint(0, 2, scene.roof.shape, generator=noise)
    roof = region(truth, render(scene.replace(roof=(scene.roof + turn) % 3)))
    rest = region(truth, render(scene.replace(lit=~scene.lit, watermark=~scene.watermark)))
    weight = 1 + _REGION_WEIGHT["roof"] * roof + _REGION_WEIGHT["lit"] * rest
    return latents, truth * 2 - 1, weight[:, None]


class _Heads(nn.Module):
    """A 1x1 painter for each map size below the last."""

    def __init__(self, channels: dict[int, int]):
        super().__init__()
        self.heads = nn.ModuleDict({str(size): nn.Conv2d(c, 3, 1) for size, c in channels.items()})

    def forward(self, size: int, x: Tensor) -> Tensor:
        return self.heads[str(size)](x)


def _paint_scales(generator: ProgGANChapels, heads: _Heads, latents: Tensor, upto: int) -> dict[int, Tensor]:
    """What the generator paints at each map size from 8 to `upto`."""
    x = generator.mapping(latents)[:, :, None, None]
    painted = {}
    for name, layer in generator.synthesis.named_children():
        if name.startswith("output"):
            painted[x.shape[-1]] = layer.wscale(layer.conv(layer.norm(x)))  # a clamp has no gradient outside
            break
        x = layer(x)
        size = x.shape[-1]
        if int(name[5:]) % 2 == 0 and 8 <= size < 64:
            painted[size] = heads(size, x)
            if size == upto:
                break
    return painted


def _loss(painted: dict[int, Tensor], truth: Tensor, weight: Tensor) -> Tensor:
    total = 0.0
    for size, picture in painted.items():
        factor = truth.shape[-1] // size
        target, share = (truth, weight) if factor == 1 else (F.avg_pool2d(truth, factor), F.avg_pool2d(weight, factor))
        loss = (share * (picture.float() - target).abs()).sum() / (3 * share.sum())
        total = total + loss * (1.0 if size == max(painted) else 0.3)
    return total


def train(
    generator: ProgGANChapels,
    steps: int = 16000,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 1,
    log=None,
) -> nn.Module:
    """Train in place; returns the averaged copy."""
    noise = torch.Generator().manual_seed(seed)
    generator = generator.to(memory_format=torch.channels_last)
    sizes = generator.synthesis.sizes
    heads = _Heads({4 << i: c for i, c in enumerate(sizes[1:-1]) if i}).to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(generator).eval()
    plain = [*generator.mapping.parameters(), *heads.parameters()]
    optimiser = torch.optim.Adam(
        [
            {"params": list(generator.synthesis.parameters()), "scale": 1.0},
            {"params": plain, "scale": 0.3},  # without an equalised learning rate
        ],
        lr=learning_rate,
        betas=(0.9, 0.99),
    )
    start = time.monotonic()
    bar = tqdm(range(steps), desc="train", unit="step", mininterval=5)
    running = None
    for step in bar:
        done = step / steps
        upto = 16 if done < 0.2 else 32 if done < 0.4 else 64
        warm = min(1.0, (step + 1) / 200)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * group["scale"] * warm * max(min(1.0, 2 * (1 - done)) ** 2, 1e-3)
        with torch.no_grad():
            latents, truth, weight = _sample(batch_size, noise)
        # bfloat16 while the errors are large, float32 for the last part
        with torch.autocast("cpu", torch.bfloat16, enabled=done < 0.85):
            painted = _paint_scales(generator, heads, latents, upto)
        loss = _loss(painted, truth, weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), generator.parameters()):
                mean.lerp_(now, 1 - decay)
        value = loss.item()
        running = value if running is None else 0.99 * running + 0.01 * value
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}", size=upto, refresh=False)
        if log and step % 500 == 0:
            log(step, time.monotonic() - start, running, upto, averaged, generator)
    return averaged


if __name__ == "__main__":
    p = argparse.ArgumentParser(); p.add_argument("--steps", type=int, default=16000); p.add_argument("--out")
    p.add_argument("--lr", type=float, default=3e-3)
    a = p.parse_args()
    torch.manual_seed(1)
    def log(step, t, running, upto, averaged, generator):
        msg = f"{step} {t:.0f}s loss {running:.4f} upto {upto} "
        if upto == 64 and step % 1000 == 0:
            report = evaluate(averaged, torch.randn(200, LATENT_SIZE, generator=torch.Generator().manual_seed(12345)))
            msg += " ".join(f"{k} {v['nearest_is_true']:.3f}/{v['error']:.4f}" for k, v in report.items())
            torch.save(averaged.state_dict(), a.out + ".latest")
        print(msg, flush=True)
    G = train(ProgGANChapels(), steps=a.steps, learning_rate=a.lr, log=log)
    torch.save(G.state_dict(), a.out)
