"""Edits as the checks of a GPU fit them: a 3x3 layer, 512 channels, 10x10 pixels, a goal that a rank-R change explains.

They come from a seed, on the machine that needs them. How well they can be fitted was found in float64 elsewhere, and
is in goals.npz.

``python -m rewrite_core.benchmarks.gpu.problems`` makes goals.npz anew (a few minutes).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewrite_core.ops import fit_low_rank, fit_projected

GOALS = Path(__file__).with_name("goals.npz")
KINDS = ("linear", "stylegan2")
RANKS = (1, 4)
STEPS = 201  # of the projected solver
SAMPLE = 32  # channels whose goals are kept: they are fitted one by one
TAPS = 9
EPS = 1e-8


@dataclass(frozen=True)
class Edit:
    """A layer, its key and a goal, in float64.

    maps    [I, 9, P]  the layer's linear operator on each input map with each one-hot kernel
    weight  [O, I, 9]
    style   [I] or None: what demodulation scales the weight by
    shift   [O, P] or None
    rows    [R, I], orthonormal
    target  [O, P]
    """

    maps: np.ndarray
    weight: np.ndarray
    style: np.ndarray | None
    shift: np.ndarray | None
    rows: np.ndarray
    target: np.ndarray
    slope: float
    gain: float
    side: int

    @property
    def base(self) -> np.ndarray:
        return np.tensordot(self.weight, self.maps, 2)

    def value(self, weight: np.ndarray) -> np.ndarray:
        """What the layer makes of its key with that weight."""
        out = np.tensordot(weight, self.maps, 2)
        if self.style is not None:
            out /= np.sqrt(np.square(self.style[:, None] * weight).sum((1, 2)) + EPS)[:, None]
        if self.shift is not None:
            out = out + self.shift
        return self.gain * np.where(out > 0, out, self.slope * out)


def make(
    kind: str = "linear",
    rank: int = 1,
    inputs: int = 512,
    outputs: int = 512,
    side: int = 10,
    slope: float | None = None,
    seed: int = 0,
) -> Edit:
    """`kind`: "linear", or "stylegan2" with style, demodulation, noise, bias and leaky ReLU.

    RandomState's numbers are the same with every NumPy."""
    random = np.random.RandomState(seed + 1000 * rank + inputs + side)
    rows = np.linalg.qr(random.randn(inputs, max(rank, 1)))[0].T
    noise = np.pad(random.randn(inputs, side, side), ((0, 0), (1, 1), (1, 1)))
    shifted = [noise[:, y : y + side, x : x + side] for y in range(3) for x in range(3)]
    key = sum(shifted) / 3  # neighbouring pixels agree
    key = key + (rows.sum(0) * math.sqrt(inputs) / 4)[:, None, None]  # and share the context
    style = shift = None
    weight = random.randn(outputs, inputs, TAPS)
    scale = 1 / math.sqrt(TAPS * inputs)
    if kind == "stylegan2":
        style = 1 + 0.3 * random.randn(inputs)
        key = style[:, None, None] * key
        shift = 0.1 * random.randn(outputs, 1) + 0.1 * random.randn(1, side * side)
    key = np.pad(key * scale, ((0, 0), (1, 1), (1, 1)))
    maps = np.stack([key[:, y : y + side, x : x + side].reshape(inputs, -1) for y in range(3) for x in range(3)], 1)
    slope = slope if slope is not None else 0.2 if kind == "stylegan2" else 1.0
    gain = math.sqrt(2) if slope != 1.0 else 1.0
    layer = Edit(
        maps, weight, None if style is None else scale * style, shift, rows[:rank], np.empty(0), slope, gain, side
    )
    hidden = np.einsum("ort,ri->oit", random.randn(outputs, len(rows), TAPS), rows)
    hidden *= layer.base.std() / np.tensordot(hidden, maps, 2).std()
    target = layer.value(weight + hidden)
    target += 0.3 * target.std() * random.randn(*target.shape)
    return Edit(**{**vars(layer), "target": target})


def _tensor(array: np.ndarray, dtype: torch.dtype, device: str) -> Tensor:
    return torch.from_numpy(np.array(array, order="C")).to(device, dtype)


def fit_arguments(edit: Edit, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    """Those of ops.fit_low_rank, unbatched."""
    rows, (inputs, taps, pixels) = edit.rows, edit.maps.shape
    arguments: dict[str, Any] = {
        "basis": _tensor((rows @ edit.maps.reshape(inputs, -1)).reshape(-1, pixels), dtype, device),
        "base": _tensor(edit.base, dtype, device),
        "target": _tensor(edit.target, dtype, device),
        "slope": edit.slope,
        "gain": edit.gain,
    }
    if edit.shift is not None:
        arguments["shift"] = _tensor(np.broadcast_to(edit.shift, edit.target.shape), dtype, device)
    if edit.style is not None:
        square = np.square(edit.style)
        parts = (
            (square[:, None] * np.square(edit.weight)).sum((1, 2)) + EPS,
            np.einsum("oit,ri->ort", edit.weight, rows * square).reshape(len(edit.weight), -1),
            np.kron(rows * square @ rows.T, np.eye(taps)),
        )
        arguments["demodulation"] = tuple(_tensor(part, torch.float64, device) for part in parts)
    return arguments


def projected_arguments(
    edit: Edit, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Those of ops.fit_projected: the ones by position, and the others."""
    maps = (edit.side, edit.side)
    shape = (len(edit.weight), *maps)
    operator = _tensor(edit.maps.reshape(-1, 3, 3, *maps), dtype, device)
    base, target, value = (
        _tensor(part.reshape(shape), dtype, device) for part in (edit.base, edit.target, edit.value(edit.weight))
    )
    options: dict[str, Any] = {"value": value, "slope": edit.slope, "gain": edit.gain}
    options["directions"] = _tensor(edit.rows, dtype, device) if len(edit.rows) else None
    if edit.shift is not None:
        options["shift"] = _tensor(np.broadcast_to(edit.shift, edit.target.shape).reshape(shape), dtype, device)
    if edit.style is not None:
        weight = _tensor(edit.weight.reshape(len(edit.weight), -1, 3, 3), dtype, device)
        options["demodulation"] = weight, _tensor(edit.style, dtype, device), EPS
    return (operator, base, target), options


def to(part: Any, change: Any) -> Any:
    """`change` of every tensor in nested tuples and dictionaries."""
    if isinstance(part, dict):
        return {name: to(item, change) for name, item in part.items()}
    if isinstance(part, tuple):
        return tuple(to(item, change) for item in part)
    return change(part) if isinstance(part, Tensor) else part


def losses_of(arguments: dict[str, Any], coefficients: Tensor, loss: str) -> Tensor:
    """What coefficients [..., O, J] really leave: the mean |r| or r^2 of every channel, [..., O] float64."""
    wide = to(arguments, lambda part: part.double() if part.is_floating_point() else part)
    x = coefficients.double()
    lin = wide["base"] + x @ wide["basis"]
    m = torch.ones((), dtype=torch.float64, device=x.device)
    if wide.get("demodulation") is not None:
        constant, linear, quadratic = wide["demodulation"]
        if wide.get("segments") is None:
            m = (constant + 2 * (linear * x).sum(-1) + ((x @ quadratic) * x).sum(-1)).rsqrt()[..., None]
        else:  # [..., G, O] of each group of pixels
            of = x[..., None, :, :]
            m = (constant + 2 * (linear * of).sum(-1) + ((of @ quadratic) * of).sum(-1)).rsqrt()
            m = m[wide["segments"]].mT
    pre = m * lin
    if wide.get("shift") is not None:
        pre = pre + wide["shift"]
    value = wide["gain"] * torch.where(pre > 0, pre, wide["slope"] * pre)
    residual = value - wide["target"]
    return (residual.abs() if loss == "l1" else residual.square()).mean(-1)


# --- goals ---


def _first(arguments: dict[str, Any], count: int) -> dict[str, Any]:
    """The first output channels alone."""
    some = {name: part[:count] if name in ("base", "target", "shift") else part for name, part in arguments.items()}
    if "demodulation" in some:
        constant, linear, quadratic = some["demodulation"]
        some["demodulation"] = constant[:count], linear[:count], quadratic
    return some


def fit_goal(edit: Edit, count: int = SAMPLE) -> np.ndarray:
    """The l1 of the first channels that the reference backend reaches in float64."""
    arguments = to(_first(fit_arguments(edit), count), Tensor.double)
    return fit_low_rank(**arguments, loss="l1", backend="reference").loss.numpy()


def projected_goal(edit: Edit, steps: int = STEPS) -> np.ndarray:
    """The l1 before each step, in float64."""
    arguments, options = to(projected_arguments(edit), Tensor.double)
    return fit_projected(*arguments, **options, loss="l1", steps=steps, backend="reference").losses.numpy()


def fingerprint(edit: Edit) -> np.ndarray:
    """A few numbers by which an edit is known again."""
    parts = (edit.base, edit.target, edit.maps, edit.rows)
    return np.array([number for part in parts for number in (np.abs(part).mean(), part.reshape(-1)[::37].sum())])


@functools.cache
def goals() -> dict[str, np.ndarray]:
    with np.load(GOALS, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def goal(what: str, edit: Edit) -> np.ndarray:
    """The goal of that name. Raises RuntimeError where it was made for another edit."""
    known = goals()
    if not np.allclose(known[f"{what}: edit"], fingerprint(edit), rtol=1e-9, atol=1e-9):
        raise RuntimeError(f"the goal of {what!r} is of another edit: make goals.npz anew, as problems.py says")
    return known[what]


def names() -> dict[str, tuple[str, int]]:
    """Every goal's name, with the kind and the rank of its edit."""
    fits = {f"fit {kind}, rank {rank}": (kind, rank) for kind in KINDS for rank in RANKS}
    return fits | {f"projected {kind}": (kind, 1) for kind in KINDS}


def write_goals(path: Path = GOALS) -> None:
    found: dict[str, Any] = {}
    for name, (kind, rank) in names().items():
        edit = make(kind, rank)
        found[name] = fit_goal(edit) if name.startswith("fit") else projected_goal(edit)
        found[f"{name}: edit"] = fingerprint(edit)
        print(f"{name}: mean {found[name].mean():.6g}, last {found[name][-1]:.6g}", flush=True)
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    write_goals()
