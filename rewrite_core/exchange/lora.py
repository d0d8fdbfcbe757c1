"""Rewrites as LoRA adapters: folders of peft, files of diffusers, and peft's folders as rewrites.

peft's LoRA of a convolution is a k x k convolution down to r channels, then a 1 x 1 one up. A rank-R rewrite of a layer
with t taps is exactly that with r = R t: each tap of each direction is a channel (:meth:`rewrite_core.Rewrite.lora`).
Neither peft nor diffusers is needed to write or read them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileFormatError, MismatchError, RewriteCoreError, SolverError
from ..files import atomic_write, from_json, open_file, read_tensors, save_tensors, shown, to_json
from ..layers.binding import bind
from ..layers.bound import BoundLayer
from ..rewrites.change import Rewrite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
_PREFIX = "base_model.model."
_LOWEST = 1e-6  # singular values below this share of the first are no direction of a LoRA's input


def _as_peft_sees(bound: BoundLayer) -> nn.Module:
    """The layer's module, of a kind that peft and diffusers put adapters on; raises SolverError for another."""
    module = bound.module
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    known = isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    if not known or bound.groups > 1 or getattr(module, "padding_mode", "zeros") != "zeros":
        what = "a grouped convolution" if bound.groups > 1 else f"a {type(module).__name__}"
        raise SolverError(
            f"{bound.name!r} is {what}, which a LoRA adapter does not describe; export the state dict instead."
        )
    if bound._adapter.computed is not None:
        raise SolverError(f"The weight of {bound.name!r} is computed, so export the state dict instead.")
    return module


def _factors(
    changes: Sequence[Rewrite], generator: nn.Module, strength: float
) -> dict[str, tuple[Tensor, Tensor, nn.Module]]:
    """Each layer's A and B, with B A the change times its strength; several changes of one layer side by side."""
    if not changes:
        raise RewriteCoreError("There is no rewrite to export; give at least one.")
    found: dict[str, tuple[Tensor, Tensor, nn.Module]] = {}
    for change in changes:
        bound = change._bind(generator)
        module = _as_peft_sees(bound)
        a, b = change.lora()
        b = b * strength
        if change.layer in found:
            before = found[change.layer]
            a, b = torch.cat([before[0], a]), torch.cat([before[1], b], 1)
        found[change.layer] = a.contiguous(), b.contiguous(), module
    return found


def save_peft(
    changes: Sequence[Rewrite], generator: nn.Module, folder: str | os.PathLike, strength: float = 1.0
) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(generator, folder)`` loads: the change, exactly.

    Args:
        changes: rewrites of linear layers, or of ordinary convolutions; several of one layer add up.
        generator: what they were made on; only looked at.
        folder: made where it is not there.
        strength: what the changes are scaled by.

    Raises SolverError for a layer that a LoRA does not describe (transposed, grouped or modulated convolutions,
    computed weights); MismatchError for another generator.
    """
    factors = _factors(changes, generator, strength)
    ranks = {name: len(a) for name, (a, _, _) in factors.items()}
    common = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": common,
        "lora_alpha": common,  # so that the scale is 1
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "target_modules": sorted(factors),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(type(module).__name__ == "Conv1D" for _, _, module in factors.values()),
        "inference_mode": True,
    }
    tensors = {}
    for name, (a, b, _) in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = a.cpu(), b.cpu()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_tensors(target / WEIGHTS, tensors, {"format": "pt"})
    with atomic_write(target / CONFIG) as partial:
        partial.write_text(to_json(config, indent=2) + "\n", encoding="utf-8")


def save_diffusers(
    changes: Sequence[Rewrite],
    generator: nn.Module,
    path: str | os.PathLike,
    part: str = "unet",
    strength: float = 1.0,
) -> None:
    """Write a file that ``pipeline.load_lora_weights`` and ``unet.load_lora_adapter`` of diffusers load.

    Args:
        part: of the pipeline that the generator is: "unet", "transformer", "text_encoder".

    The rest, and what is raised, as :func:`save_peft`.
    """
    tensors = {}
    for name, (a, b, _) in _factors(changes, generator, strength).items():
        tensors[f"{part}.{name}.lora_A.weight"], tensors[f"{part}.{name}.lora_B.weight"] = a.cpu(), b.cpu()
    save_tensors(path, tensors, {"format": "pt"})


def load_peft(folder: str | os.PathLike, generator: nn.Module) -> list[Rewrite]:
    """The rewrites that a peft LoRA folder holds, one for each layer: exactly its change, with as few directions as
    that has.

    Raises:
        FileFormatError: no LoRA adapter of peft, or one of a kind that is more than B A (DoRA, biases).
        MismatchError, UnknownLayerError: it is of another generator.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    changes = []
    for name in sorted({key.rpartition(".lora_")[0] for key in tensors}):
        pair = [tensors.get(f"{name}.lora_{half}.weight") for half in "AB"]
        if pair[0] is None or pair[1] is None or name.startswith(_PREFIX) is False:
            raise FileFormatError(f"{shown(folder)} lacks lora_A or lora_B of {name.removeprefix(_PREFIX)!r}.")
        layer = name.removeprefix(_PREFIX)
        changes.append(_rewrite(bind(generator, layer), pair[0], pair[1], _scale(config, layer, len(pair[0]))))
    return changes


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with open_file(folder / CONFIG) as file:
        config = from_json(file.read(), shown(folder / CONFIG))
    with open_file(folder / WEIGHTS) as file:
        tensors, _ = read_tensors(file, folder / WEIGHTS)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not tensors:
        raise FileFormatError(f"{shown(folder)} holds no LoRA adapter of peft.")
    more = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if more or config.get("use_dora"):
        what = f"{more[0]!r}" if more else "use_dora"
        raise FileFormatError(f"{shown(folder)} has {what}, so its change is more than B A and no rewrite.")
    return config, tensors


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    """What peft multiplies B A by."""

    def of(pattern: str, usual: object) -> object:
        found = config.get(pattern) or {}
        return next((value for key, value in found.items() if layer == key or layer.endswith(f".{key}")), usual)

    alpha = of("alpha_pattern", config.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise FileFormatError(f"The adapter's lora_alpha is {alpha!r}, not a number.")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _rewrite(bound: BoundLayer, a: Tensor, b: Tensor, scale: float) -> Rewrite:
    """scale B A as Lambda D: D spans the input channels that A reads, orthonormal."""
    shape = tuple(bound.weight.shape)
    down, up = a.double().reshape(*a.shape[:2], -1), b.double().flatten(1)  # [r, I, t] and [O, r]
    if (len(up), down.shape[1], down.shape[2]) != (shape[0], shape[1], math.prod(shape[2:])) or len(down) != up.shape[
        1
    ]:
        raise MismatchError(
            f"The adapter changes a weight of shape {[len(up), *a.shape[1:]]} and {bound.name!r} has {list(shape)}; it "
            "is of another generator."
        )
    rows = down.transpose(1, 2).flatten(0, 1)  # [r t, I]
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    directions = right[values > _LOWEST * values.max().clamp_min(1e-300)]
    if not len(directions):
        raise FileFormatError(f"The adapter does not change {bound.name!r}: its lora_A is zero.")
    coefficients = torch.einsum("or,rit,di->odt", scale * up, down, directions).reshape(shape[0], -1, *shape[2:])
    return Rewrite(
        layer=bound.name,
        directions=directions.float(),
        coefficients=coefficients.float(),
        fitted_to=bound.weight_fingerprint(bound.weight),
        solver="lora",
        bound=bound,
    )


def is_peft(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of peft's."""
    return (Path(path) / CONFIG).is_file()
