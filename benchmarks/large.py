"""Large generators on one machine: every step of a rewrite, with its seconds and its memory beyond the generator.

``rewrite bench large`` runs each generator, of true widths and with random weights, in a process of its own, so that
the peaks are its own. ``python -m rewrite_core.benchmarks.large NAME`` is that process: it prints a JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewrite_core import Edit, Selection, bind, collect_second_moment, rewrite, sample_latents
from rewrite_core.generators.stylegan2 import StyleGAN2
from rewrite_core.layers.fingerprints import tensor_fingerprint

from .lines import Record, append
from .report import duration, environment

STEPS = ("pass", "to the layer", "bind", "collect", "rewrite", "apply", "revert", "save")
Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Made:
    """A generator, how it is called, and its latents [N, ...]."""

    generator: nn.Module
    latents: Tensor
    forward: Forward | None = None


@dataclasses.dataclass(frozen=True)
class Large:
    """A generator to try: what makes it (with tiny widths, if asked), the layer of the full and of the tiny one, and
    how many latents pass at a time."""

    make: Callable[[bool], Made]
    layer: str
    tiny_layer: str
    batch: int = 2  # what the library looks at in a first pass


# --- generators ------------------------------------------------------------------------------------------------------


def stylegan2(tiny: bool) -> Made:
    """Our StyleGAN2 module at 1024 x 1024."""
    generator = StyleGAN2(8, style_dim=32, n_mlp=2, channels={4: 32, 8: 32}) if tiny else StyleGAN2(1024)
    return Made(generator, sample_latents(generator.style_dim, 8, seed=1))


# The published configuration of biggan-deep-256: (up-sampling, channels in, channels out) of each block.
_BLOCKS = "nn16-16 up16-16 nn16-16 up16-8 nn8-8 up8-8 nn8-8 up8-4 nn4-4 up4-2 nn2-2 up2-1"


def biggan(tiny: bool) -> Made:
    """BigGAN-deep-256 of the package pytorch-pretrained-biggan."""
    package = importlib.import_module("pytorch_pretrained_biggan")
    blocks = [re.fullmatch(r"(nn|up)(\d+)-(\d+)", block) for block in _BLOCKS.split()]
    config = package.BigGANConfig(
        output_dim=256,
        channel_width=8 if tiny else 128,
        layers=[(block[1] == "up", int(block[2]), int(block[3])) for block in blocks if block is not None],
        attention_layer_position=8,
    )
    generator = package.BigGAN(config)
    nn.init.ones_(generator.generator.bn.weight)  # the package leaves them as they are in memory
    nn.init.zeros_(generator.generator.bn.bias)
    for module in generator.modules():
        for hook in module._forward_pre_hooks.values():
            for _ in range(5):  # as training does: untrained singular vectors leave weights of any size
                hook.compute_weight(module, do_power_iteration=True)
    label = torch.zeros(1, config.num_classes)
    label[0, 207] = 1
    return Made(generator, sample_latents(128, 8, seed=1), lambda g, z: g(z, label.expand(len(z), -1), 0.5))


def sdxl_unet(tiny: bool) -> Made:
    """A UNet2DConditionModel of diffusers with SDXL's configuration, in bfloat16, on latents of 32 x 32."""
    diffusers = importlib.import_module("diffusers")
    widths: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    }
    if tiny:
        widths = {
            "block_out_channels": (32, 32, 32),
            "attention_head_dim": 2,
            "transformer_layers_per_block": 1,
            "cross_attention_dim": 16,
            "projection_class_embeddings_input_dim": 16 + 6 * 256,
        }
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        generator = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            **widths,
        )
    finally:
        torch.set_default_dtype(usual)
    pooled = widths["projection_class_embeddings_input_dim"] - 6 * 256
    text = torch.randn(1, 77, widths["cross_attention_dim"], dtype=torch.bfloat16)
    more = {"text_embeds": torch.randn(1, pooled, dtype=torch.bfloat16), "time_ids": torch.ones(1, 6)}

    def forward(unet: nn.Module, z: Tensor) -> Tensor:
        added = {name: part.expand(len(z), -1) for name, part in more.items()}
        images: Tensor = unet(z, 500, text.expand(len(z), -1, -1), added_cond_kwargs=added).sample
        return images

    return Made(generator, sample_latents((4, 32, 32), 8, seed=1), forward)


LARGE = {
    "stylegan2-1024": Large(stylegan2, "convs.6.conv", "convs.1.conv"),
    "biggan-deep-256": Large(biggan, "generator.layers.4.conv_0", "generator.layers.4.conv_0"),
    "sdxl-unet": Large(sdxl_unet, "up_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv1"),
}


# glibc gives every block back as it is freed: what is resident is what is in use, for somewhat longer times
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}

# --- what a step takes -----------------------------------------------------------------------------------------------


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def measured(run: Callable[[], Any]) -> tuple[Record, Any]:
    """Seconds, and bytes of resident memory that `run` adds: at its peak, and what it keeps; and what it returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc kept of earlier steps would be used again, and not be seen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before, start = _resident("VmRSS"), time.perf_counter()
    result = run()
    seconds, peak = time.perf_counter() - start, _resident("VmHWM") - before
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"seconds": seconds, "peak": max(0, peak), "kept": _resident("VmRSS") - before}, result


class _Stop(Exception):
    pass


def _bare_pass(made: Made, rows: Tensor, module: nn.Module | None = None) -> None:
    """The generator's own pass, to its end or up to a module, as anybody would write it."""

    def stop(*_: object) -> None:
        raise _Stop

    handle = None if module is None else module.register_forward_hook(stop)
    try:
        with torch.no_grad():
            (made.forward or (lambda g, z: g(z)))(made.generator, rows)
    except _Stop:
        pass
    finally:
        if handle is not None:
            handle.remove()


def run(name: str, tiny: bool) -> Record:
    """Every step on one generator. Raises AssertionError where the generator is not as it was in the end."""
    torch.manual_seed(0)
    large = LARGE[name]
    made = large.make(tiny)
    generator = made.generator.eval().requires_grad_(False)
    layer_name, path = large.tiny_layer if tiny else large.layer, generator.named_modules()
    module = dict(path)[layer_name]
    dtype = next(generator.parameters()).dtype
    rows = made.latents[: large.batch].to(dtype)
    _bare_pass(made, rows[:1], module)  # the first is slow
    steps: dict[str, Record] = {}
    steps["pass"], _ = measured(lambda: _bare_pass(made, rows))
    steps["to the layer"], _ = measured(lambda: _bare_pass(made, rows, module))

    def begin() -> Any:
        layer = bind(generator, layer_name, forward=made.forward)
        layer.fingerprint(made.latents)
        return layer

    steps["bind"], layer = measured(begin)
    before = tensor_fingerprint(layer.weight)
    collect = functools.partial(
        collect_second_moment, layer, made.latents, batch_size=large.batch, progress=False, latent_seed=1
    )
    steps["collect"], moment = measured(collect)
    side = layer.keys(made.latents[:1]).shape[2:]
    mask = torch.zeros(side)
    mask[tuple(slice(length // 4, length // 2 + 1) for length in side)] = 1
    edit = Edit(copy=Selection(0, mask), paste=Selection(1, mask), context=[Selection(2, mask)])
    values: dict[str, Any] = {
        "rank": 1,
        "objective": "value",
        "region": "map",
        "loss": "l2",
        "preserve": 0.0,
        "trust": None,
    }  # of the layer alone, not of eight ordinary pictures at a time
    steps["rewrite"], change = measured(lambda: rewrite(layer, moment, edit, made.latents, **values))
    steps["apply"], _ = measured(change.apply)
    assert tensor_fingerprint(layer.weight) != before
    steps["revert"], _ = measured(change.revert)
    assert tensor_fingerprint(layer.weight) == before and not change.applied
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            moment.save(Path(folder, "moment"))
            change.save(Path(folder, "rule"))

        steps["save"], _ = measured(save)
    return {
        "generator": name,
        "tiny": tiny,
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
        "bytes": sum(parameter.nbytes for parameter in generator.parameters()),
        "dtype": str(dtype),
        "layer": layer_name,
        "weight": list(layer.weight.shape),
        "weight_bytes": layer.parameter.nbytes,
        "map": list(side),
        "latents": len(made.latents),
        "batch": large.batch,
        "statistics": 3 * 8 * layer.in_channels**2,
        "losses": change.losses,
        "steps": steps,
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def _table(record: Record) -> list[str]:
    weight, bound = record["weight_bytes"], record["statistics"] + record["steps"]["to the layer"]["peak"]
    bounds = {"bind": record["steps"]["pass"]["peak"], **dict.fromkeys(STEPS[STEPS.index("collect") :], bound)}
    lines = [
        f"{record['generator']}: {record['parameters'] / 1e6:.0f} million parameters, {record['dtype']}, "
        f"{record['bytes'] / 2**20:.0f} MiB; {record['layer']} {record['weight']}, map {record['map']}",
        f"  one weight is {weight / 2**20:.1f} MiB; the bound, 3 C^2 doubles and what {record['batch']} latents take",
        f"  on their way to the layer, is {bound / 2**20:.1f} MiB (of bind, which looks at a whole pass: that pass)",
    ]
    for step, taken in record["steps"].items():
        lines.append(
            f"  {step:12} {duration(taken['seconds']):>8}   peak {taken['peak'] / 2**20:7.1f} MiB   "
            f"kept {taken['kept'] / 2**20:7.1f} MiB"
            + (f"   {taken['peak'] / bounds[step]:.2f} of the bound" if step in bounds else "")
        )
    return lines


def main(out: Path, quick: bool) -> int:
    """Run every generator that can be made here, append a line for each, print a table; the exit status."""
    here = environment()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{here['machine']}.large{'.quick' * quick}.jsonl"
    status = 0
    for name in LARGE:
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, name, *(["--tiny"] * quick)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | MALLOC)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            missing = reason.startswith("ModuleNotFoundError")
            print(f"{name} is left out: {reason}" if missing else f"{name} failed: {reason}", flush=True)
            status = status if missing else 1
            continue
        record = json.loads(done.stdout.splitlines()[-1])
        append(path, {**here, **record})
        print("\n".join(_table(record)), flush=True)
    print(f"-> {path}")
    return status


def begin() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=LARGE)
    parser.add_argument("--tiny", action="store_true", help="a tiny generator of the same kind")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of an edit that means nothing, on random weights
    record = run(options.name, True)  # first of all: what is imported and compiled for it is no step's memory
    print(json.dumps(record if options.tiny else run(options.name, False)))


if __name__ == "__main__":
    begin()
