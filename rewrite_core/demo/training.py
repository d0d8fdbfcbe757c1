"""Train the embedded generator: ``python -m rewrite_core.demo.training --out chapels.safetensors``.

Supervised: a random latent, its true render, an L1 loss. Four things make roofs crisp and windows visible:

- the regions of the judged factors weigh more than the background, the small roof most;
- every map size has a 1x1 head of its own (dropped afterwards; a StyleGAN2 has such heads already) that must paint the
  scene at that size. It teaches the early layers where things are, and keeps their features local: what an edit needs;
- the layout is learned first, at 16x16 and 32x32, where a step costs a fraction;
- weights are averaged over the last thousand steps.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import save_tensors, to_json
from ..layers.latents import sample_latents
from ..progress import progress_bar
from .generator import ARCHITECTURES, ProgGANChapels, StyleGAN2Chapels, load_chapels
from .world import FACTORS, IMAGE_SIZE, LATENT_SIZE, factor_region, region, render, scene_from_latents

_ROOF_WEIGHT, _REGION_WEIGHT = 12.0, 3.0


def evaluate(generator: nn.Module, latents: Tensor, batch_size: int = 50) -> dict[str, dict[str, float]]:
    """Quality on latents [N, 16]: per factor, the share of scenes whose painted region is nearer in L1
    to the true render than to every counterfactual, and the mean absolute error in that region (0..1).
    """
    hits: dict[str, list[Tensor]] = {factor: [] for factor in FACTORS}
    errors: dict[str, list[Tensor]] = {factor: [] for factor in FACTORS}
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
        factor: {
            "nearest_is_true": torch.cat(hits[factor]).mean().item(),
            "error": torch.cat(errors[factor]).mean().item(),
        }
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
    weight = 1 + _ROOF_WEIGHT * roof + _REGION_WEIGHT * rest
    return latents, truth * 2 - 1, weight[:, None]


class _Heads(nn.Module):
    """A 1x1 painter for each map size below the last of a ProgGAN."""

    def __init__(self, channels: dict[int, int]):
        super().__init__()
        self.heads = nn.ModuleDict({str(size): nn.Conv2d(c, 3, 1) for size, c in channels.items()})

    def forward(self, size: int, x: Tensor) -> Tensor:
        return self.heads[str(size)](x)


def _paint_proggan(generator: ProgGANChapels, heads: _Heads, latents: Tensor, upto: int) -> dict[int, Tensor]:
    x = generator.mapping(latents)[:, :, None, None]
    painted = {}
    layer: Any
    for name, layer in generator.synthesis.named_children():
        if name.startswith("output"):
            painted[x.shape[-1]] = layer.wscale(layer.conv(layer.norm(x)))  # a clamp has no gradient outside
            break
        x = layer(x)
        size = x.shape[-1]
        if int(name[5:]) % 2 == 0 and 8 <= size < IMAGE_SIZE:
            painted[size] = heads(size, x)
            if size == upto:
                break
    return painted


def _paint_stylegan2(generator: StyleGAN2Chapels, latents: Tensor, upto: int) -> dict[int, Tensor]:
    synthesis = generator.synthesis
    latent = synthesis.mapping(generator.mapping(latents))
    x = synthesis.conv1(synthesis.input(len(latent)), latent)
    image = synthesis.to_rgb1(x, latent)
    painted = {}
    for index, conv in enumerate(synthesis.convs):
        x = conv(x, latent)
        if index % 2:
            image = synthesis.to_rgbs[index // 2](x, latent, image)
            painted[x.shape[-1]] = image
            if x.shape[-1] == upto:
                break
    return painted


def _loss(painted: dict[int, Tensor], truth: Tensor, weight: Tensor) -> Tensor:
    total = truth.new_zeros(())
    for size, picture in painted.items():
        factor = truth.shape[-1] // size
        target, share = (truth, weight) if factor == 1 else (F.avg_pool2d(truth, factor), F.avg_pool2d(weight, factor))
        loss = (share * (picture.float() - target).abs()).sum() / (3 * share.sum())
        total = total + loss * (1.0 if size == max(painted) else 0.3)
    return total


def train(
    generator: ProgGANChapels | StyleGAN2Chapels,
    steps: int = 16000,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 1,
    progress: bool = True,
) -> nn.Module:
    """Train in place, on the device the generator is on; returns the averaged copy in eval mode."""
    device = next(generator.parameters()).device
    noise = torch.Generator().manual_seed(seed)
    plain = list(generator.mapping.parameters())  # without an equalised learning rate
    if isinstance(generator, ProgGANChapels):
        proggan = generator
        proggan.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sizes = proggan.synthesis.sizes
        heads = _Heads({4 << i: c for i, c in enumerate(sizes[1:-1]) if i})
        heads = heads.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        plain += heads.parameters()

        def paint(latents: Tensor, upto: int) -> dict[int, Tensor]:
            return _paint_proggan(proggan, heads, latents, upto)
    else:

        def paint(latents: Tensor, upto: int) -> dict[int, Tensor]:
            return _paint_stylegan2(generator, latents, upto)

    averaged = copy.deepcopy(generator).eval()
    optimiser = torch.optim.Adam(
        [
            {"params": list(generator.synthesis.parameters()), "scale": 1.0},
            {"params": plain, "scale": 0.3},
        ],
        lr=learning_rate,
        betas=(0.9, 0.99),
    )
    running = None
    bar = progress_bar(range(steps), label="train", unit="step", show=progress)
    for step in bar:
        done = step / steps
        upto = 16 if done < 0.2 else 32 if done < 0.4 else IMAGE_SIZE
        rate = learning_rate * min(1.0, (step + 1) / 200) * max(min(1.0, 2 * (1 - done)) ** 2, 1e-3)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        with torch.no_grad():
            latents, truth, weight = (part.to(device) for part in _sample(batch_size, noise))
        # bfloat16 while the errors are large, float32 for the last part
        with torch.autocast(device.type, torch.bfloat16, enabled=done < 0.85):
            painted = paint(latents, upto)
        loss = _loss(painted, truth, weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), generator.parameters()):
                mean.lerp_(now, 1 - decay)
        if step % 50 == 0:
            running = loss.item() if running is None else 0.8 * running + 0.2 * loss.item()
            bar.set_postfix(loss=f"{running:.4f}", size=upto, refresh=False)
    return averaged


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded generator.")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write, float16")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="proggan")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    generator = ARCHITECTURES[options.architecture]().to(options.device)
    averaged = train(generator, options.steps, seed=options.seed).cpu()
    state = {name: tensor.half().contiguous() for name, tensor in averaged.state_dict().items()}
    save_tensors(options.out, state)
    stored = load_chapels(options.out, options.architecture)
    quality = evaluate(stored, sample_latents(LATENT_SIZE, 500, seed=2))
    minutes = round((time.perf_counter() - start) / 60, 1)
    print(to_json(quality | {"minutes": minutes}, "the report", indent=2))


if __name__ == "__main__":
    main()
