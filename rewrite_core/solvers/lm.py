"""``lm``: per-channel Levenberg-Marquardt on Lambda, all edits and channels in one fit; the exact closed form where the
problem is linear (L2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import NonFiniteError, SolverError
from ..ops.fit_low_rank_op.problem import STATUS
from ..waits import on_host, sent, unlikely
from .base import Solver
from .problem import (
    LayerProblem,
    LayerSolution,
    after,
    basis_maps,
    grouped_basis_maps,
    inputs_of,
    is_known,
)


def _demodulation(problem: LayerProblem, style: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The squared norm that demodulation divides by, as a quadratic in Lambda: constant [O], linear [O, J] (half
    the gradient) and quadratic [J, J], float64."""
    # [O, I, T] in its own precision: float32 products of all of W cost a tenth of float64 ones
    weight, square = problem.weight.flatten(2), style.to(problem.weight).square()
    rows = problem.directions.to(square)
    squares = problem.layer._adapter.once("squares", weight, weight.square)
    constant = torch.matmul(square, squares).double().sum(1) + eps
    linear = torch.matmul(rows * square, weight).double().flatten(1)
    rows, square = rows.double(), square.double()
    gram = rows * square @ rows.T
    quadratic = torch.kron(gram, torch.eye(weight.shape[2], dtype=gram.dtype, device=gram.device))
    return constant, linear, quadratic


def all_fit_inputs(problem: LayerProblem) -> dict[str, Any]:
    """:func:`fit_inputs` of every group, each tensor with the groups as a dimension before its own. Where nothing but
    the group's own channels matters they are computed together, as many small convolutions would take a hundred times
    as long as one."""
    layer, groups = problem.layer, problem.layer.groups
    operations = [after(problem, capture) for capture, _ in problem.regions]
    if groups == 1 or any(operation.style is not None for operation in operations):
        return _stacked([fit_inputs(problem, group) for group in range(groups)])
    maps: dict[str, list[Tensor]] = {name: [] for name in ("basis", "base", "target", "shift")}  # [groups, ..., P]
    for (capture, target), operation in zip(problem.regions, operations, strict=True):
        with torch.no_grad():
            maps["basis"].append(grouped_basis_maps(layer, capture.key, problem.directions)[0].flatten(2))
            base = layer.used(capture.key, problem.own_weight)
        shift = torch.zeros((), dtype=base.dtype, device=base.device) if operation.shift is None else operation.shift
        for name, whole in (("base", base), ("target", target), ("shift", shift.to(base.dtype).expand(target.shape))):
            maps[name].append(whole[0].flatten(1).unflatten(0, (groups, -1)))
    joined = {name: parts[0] if len(parts) == 1 else torch.cat(parts, -1) for name, parts in maps.items()}
    last = operations[-1]
    inputs: dict[str, Any] = {**joined, "slope": last.slope, "gain": last.gain, "demodulation": None}
    if problem.generic is not None:
        scale = joined["base"].new_full((groups, layer.out_channels // groups), last.gain**2, dtype=torch.float64)
        inputs |= {"penalty": problem.preserve * problem.generic, "penalty_scale": scale}
    return inputs


def _stacked(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Arguments of fits of one kind, each tensor with a dimension more."""

    def stacked(values: Sequence[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(map(stacked, zip(*values)))
        if isinstance(values[0], Tensor):
            return values[0][None] if len(values) == 1 else torch.stack(tuple(values))
        return values[0]

    return {name: stacked([part[name] for part in parts]) for name in parts[0]}


def fit_inputs(problem: LayerProblem, group: int = 0) -> dict[str, Any]:
    """One edit's arguments of ops.fit_low_rank for the output channels of one group, unbatched, the pixels of all its
    regions flattened.

    The penalty holds demodulation at its value without the change, as a preserve term quadratic in Lambda must.
    """
    layer, weight, rows, own, seen = problem.layer, problem.weight, problem.directions, slice(None), slice(None)
    if layer.groups > 1:  # a group sees its own input channels alone
        outputs, seen = len(weight) // layer.groups, inputs_of(layer, group)
        own = slice(group * outputs, (group + 1) * outputs)
        weight, rows = weight[own, seen], rows[:, seen]
    maps: dict[str, list[Tensor]] = {name: [] for name in ("basis", "base", "target", "shift")}
    styles: list[tuple[Tensor | None, Tensor]] = []  # captured and as [I], each that is another than those before it
    segments = []
    for capture, target in problem.regions:
        operation, key = after(problem, capture), capture.key[:, seen]
        with torch.no_grad():
            maps["basis"].append(basis_maps(layer, key, rows)[0].flatten(1))
            maps["base"].append(layer.linear(key, weight)[0].flatten(1))
        base = maps["base"][-1]
        shift = torch.zeros((), dtype=base.dtype, device=base.device) if operation.shift is None else operation.shift
        maps["target"].append(target[0].flatten(1)[own])
        maps["shift"].append(shift.to(base.dtype).expand(target.shape)[0].flatten(1)[own])
        if operation.style is not None:
            captured, style = capture.extra.get("style"), operation.style[0]
            same = [
                number
                for number, (tensor, other) in enumerate(styles)
                if (tensor is captured and captured is not None) or unlikely((other == style).all())
            ]
            if not same:
                styles.append((captured, style))
            number = same[0] if same else len(styles) - 1
            segments.append(torch.full((base.shape[1],), number, device=base.device))
    arguments: dict[str, Any] = {
        name: same[0] if len(same) == 1 else torch.cat(same, -1) for name, same in maps.items()
    }
    arguments |= {"slope": operation.slope, "gain": operation.gain, "demodulation": None}
    scale = torch.full((len(base),), operation.gain**2, dtype=torch.float64, device=base.device)
    if styles:
        parts = [_demodulation(problem, style, operation.eps) for _, style in styles]
        if len(styles) == 1:
            arguments["demodulation"] = parts[0]
            scale = scale / parts[0][0]
        else:
            arguments["demodulation"] = tuple(map(torch.stack, zip(*parts)))
            arguments["segments"] = torch.cat(segments)
            # each pixel's style at the weight as it is; the mean over the pixels
            scale = scale * arguments["demodulation"][0].reciprocal()[arguments["segments"]].mean(0)
    if problem.generic is not None:
        generic = problem.generic if layer.groups == 1 else problem.generic[group]
        arguments["penalty"] = problem.preserve * generic
        arguments["penalty_scale"] = scale
    return arguments


def _in_segments(part: dict[str, Any], count: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A problem's demodulations as `count` of each fit, with the segments that say which pixel has which; the rest is
    unused."""
    segments = part.get("segments")
    parts = part["demodulation"] if segments is not None else tuple(own[:, None] for own in part["demodulation"])
    if segments is None:
        basis = part["basis"]
        segments = torch.zeros(len(basis), basis.shape[-1], dtype=torch.int64, device=basis.device)
    missing = count - parts[0].shape[1]
    fill = [own.new_full((len(own), missing, *own.shape[2:]), value) for own, value in zip(parts, (1.0, 0.0, 0.0))]
    return tuple(torch.cat(pair, 1) for pair in zip(parts, fill)), segments


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Of one problem no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _pad(parts: Sequence[Tensor], pixels: int) -> Tensor:
    return _joined([part if part.shape[-1] == pixels else F.pad(part, (0, pixels - part.shape[-1])) for part in parts])


Look = Callable[[LayerProblem, Tensor], object]  # at a problem and its coefficients, which are still on their device


def solve_lm(problems: Sequence[LayerProblem], backend: str = "auto", look: Look | None = None) -> list[LayerSolution]:
    """All problems (edits of one layer, same rank and loss) in one batched fit. `look` is called for each before
    anything is read, so that what it puts off costs no wait of its own on a GPU.

    Raises SolverError where what follows the layer is unknown.
    """
    first = problems[0]
    if not all(map(is_known, problems)):
        raise SolverError(
            f"What follows {first.layer.name!r} is not known per channel, so 'lm' cannot run; use solver='adam'.",
            advice={"solver": "adam"},
        )
    groups = first.layer.groups
    inputs = [all_fit_inputs(problem) for problem in problems]
    sizes = [part["basis"].shape[-1] for part in inputs]
    pixels = max(sizes)
    maps = ("basis", "base", "target", "shift")
    arguments: dict[str, Any] = {name: _pad([part[name] for part in inputs], pixels) for name in maps}
    if min(sizes) < pixels:
        each = [size for size in sizes for _ in range(groups)]
        sizes_of = sent(torch.tensor(each, device="cpu"), arguments["basis"].device)
        valid = torch.arange(pixels, device=sizes_of.device) < sizes_of[:, None]
        arguments["pixel_weights"] = valid.to(arguments["basis"])
    if any("segments" in part for part in inputs):
        count = max(part["demodulation"][0].shape[1] for part in inputs if "segments" in part)
        parts, segments = zip(*(_in_segments(part, count) for part in inputs))
        arguments["demodulation"] = tuple(map(_joined, zip(*parts)))
        arguments["segments"] = _pad(segments, pixels)
    elif inputs[0]["demodulation"] is not None:
        arguments["demodulation"] = tuple(map(_joined, zip(*(part["demodulation"] for part in inputs))))
    for name in ("penalty", "penalty_scale"):
        if name in inputs[0]:
            arguments[name] = _joined([part[name] for part in inputs])
    slope, gain = inputs[0]["slope"], inputs[0]["gain"]
    fit = ops.fit_low_rank(**arguments, slope=slope, gain=gain, loss=first.loss, backend=backend)
    # All that is read comes over at once: on a GPU this is the only wait of the fit.
    rows = [fit.initial_loss, fit.loss, fit.iterations, *(fit.status == code for code in STATUS)]
    read = torch.stack([row.reshape(len(problems), -1).double().sum(1) for row in rows], 1)
    whole = torch.ones_like(read[:, :1])
    looked_at = [fit.coefficients]
    if fit.loss.device.type != "cpu":  # where fit_low_rank does not look into what it is given
        looked_at += [arguments[name] for name in maps]
    for part in looked_at:
        whole = whole * part.reshape(len(problems), -1).isfinite().all(1, keepdim=True)
    own = [
        fit.coefficients[number * groups : (number + 1) * groups].reshape(problem.coefficient_shape)
        for number, problem in enumerate(problems)
    ]
    if look is not None:
        for problem, coefficients in zip(problems, own):
            look(problem, coefficients)
    solutions = []
    for number, (problem, (initial, final, iterations, *counts, finite)) in enumerate(
        zip(problems, on_host(torch.cat([read, whole], 1)).tolist())
    ):
        if not finite:
            raise NonFiniteError("The fit met NaN or infinity; check the generator's weights at this layer.")
        channels = problem.coefficient_shape[0]
        solutions.append(
            LayerSolution(
                coefficients=own[number],
                losses=[initial / channels, final / channels],
                solver=fit.solver,
                final_loss=final / channels,
                status={STATUS[code]: int(count) for code, count in zip(STATUS, counts) if count},
                iterations=int(iterations),
                finite=True,
            )
        )
    return solutions


@dataclasses.dataclass(frozen=True)
class LM(Solver):
    """Levenberg-Marquardt on Lambda, every output channel by itself; for l2, where the value is linear in the weight,
    the exact least-squares solution. It has no options: it runs until it is done.

    Raises SolverError where what follows the layer is not known per channel.
    """

    name: ClassVar[str] = "lm"
    preserves: ClassVar[bool] = True

    def solve(
        self,
        problems: Sequence[LayerProblem],
        *,
        progress: bool = False,
        backend: str = "auto",
        look: Look | None = None,
    ) -> list[LayerSolution]:
        """All problems in one batched fit, on the ops' `backend`; nothing takes long enough for `progress`. `look`: see
        :func:`solve_lm`."""
        return solve_lm(problems, backend, look)
