"""Solvers: find the coefficients Lambda of a rank-R change W1 = W0 + Lambda D (paper, eq. 10 to 15).

``lm``             per-channel Levenberg-Marquardt on Lambda; exact closed form where the problem is linear (L2)
``adam``           Adam on Lambda through autograd; works for any layer
``projected``      the reference implementation's: Adam on all of W, projected back to D every few steps
``unconstrained``  Adam on all of W, no directions: the baseline
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import ops
from .backends import select
from .binding import BoundLayer
from .errors import NonFiniteError, RewriteCoreError, SolverError, UnderdeterminedWarning, warn
from .families import Capture
from .ops.fit_low_rank import STATUS

SOLVERS = ("lm", "projected", "adam", "unconstrained")
LOSSES = ("l1", "l2")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Make the layer's value of `capture` equal `target` by changing its weight along `directions`; and those of `more`
    captures equal their targets, with the same change (an edit's other pastes)."""

    layer: BoundLayer
    capture: Capture  # one latent, perhaps cropped
    target: Tensor  # [1, O, H, W]
    directions: Tensor  # [R, I], orthonormal rows
    loss: str = "l1"
    preserve: float = 0.0
    generic: Tensor | None = (
        None  # [R kh kw, R kh kw] (or one per group), second moment of the basis maps over ordinary images
    )
    more: tuple[tuple[Capture, Tensor], ...] = ()

    @property
    def regions(self) -> tuple[tuple[Capture, Tensor], ...]:
        return ((self.capture, self.target), *self.more)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.to(self.target.dtype)

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        return (self.layer.out_channels, len(self.directions), *self.layer.kernel_size)

    def distance(self, weight: Tensor) -> Tensor:
        """Mean absolute (l1) or mean squared (l2) error with that weight, as torch.nn.functional defines them, over all
        pixels of all regions."""
        values = [self.layer.value(capture, weight) for capture, _ in self.regions]
        targets = [target for _, target in self.regions]
        if self.more:
            values, targets = ([torch.cat([part.flatten(2) for part in parts], 2)] for parts in (values, targets))
        return (F.l1_loss if self.loss == "l1" else F.mse_loss)(values[0], targets[0])


@dataclasses.dataclass(frozen=True)
class Solution:
    """coefficients [O, R, *kernel]; losses: before the first step, then one per step; solver: what ran; status: how many
    output channels ended how ("lm"), or ran as what ("projected", "unconstrained": "fused" or "autograd")."""

    coefficients: Tensor
    losses: list[float]
    solver: str
    final_loss: float
    status: dict[str, int] = dataclasses.field(default_factory=dict)
    iterations: int = 0  # "lm": tried by all channels together; else the number of steps


def combine(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Lambda D: [O, R, *kernel] and [R, I] -> [O, I, *kernel]."""
    return torch.einsum("or...,ri->oi...", coefficients, directions)


def basis_maps(layer: BoundLayer, key: Tensor, directions: Tensor) -> Tensor:
    """The maps u that a rank-R change enters through: [N, R kh kw, *map'] for keys [N, I, *map].

    u[(r, y, x)] is the layer's linear operator on the single map D[r] . k with the kernel that is one at
    (y, x), so that linear output = base + Lambda u for strided, transposed and blurred layers alike.
    """
    maps = torch.einsum("ri,ni...->nr...", directions.to(key.dtype), key)
    n, rank = maps.shape[:2]
    taps = math.prod(layer.kernel_size)
    kernels = torch.eye(taps, dtype=key.dtype, device=key.device).reshape(taps, 1, *layer.kernel_size)
    out = layer.linear(maps.reshape(n * rank, 1, *maps.shape[2:]), kernels)
    return out.reshape(n, rank * taps, *out.shape[2:])


def generic_second_moment(layer: BoundLayer, directions: Tensor, latents: Tensor, moment: Tensor) -> Tensor:
    """E[u u^T] over ordinary images, float64 [R kh kw, R kh kw]: what `preserve` penalises. Of a grouped layer
    one for each group, [groups, R kh kw, R kh kw].

    A 1x1 layer (stride 1, no padding) has it exactly, D C D^T; others estimate it from the images of `latents`.
    """
    weight, parts = layer.weight, [_inputs_of(layer, group) for group in range(layer.groups)]
    if math.prod(layer.kernel_size) == 1:
        axes = max(1, len(layer.kernel_size))
        with torch.no_grad():
            ones = weight.new_ones(1, 1, *[2] * axes), weight.new_ones(1, 1, *layer.kernel_size)
            scales = layer.linear(*ones).double()
        scale = scales.flatten()[0]
        if scales.shape[2:] == (2,) * axes and (scales == scale).all():
            rows, moment = directions.double(), moment.to(weight.device)
            exact = [scale.square() * rows[:, own] @ moment[own, own] @ rows[:, own].T for own in parts]
            return exact[0] if layer.groups == 1 else torch.stack(exact)
    totals, count = [None] * layer.groups, 0
    with torch.no_grad():
        for batch in latents.split(8):
            keys = layer.keys(batch)
            for group, own in enumerate(parts):
                basis = basis_maps(layer, keys[:, own], directions[:, own])
                totals[group] = ops.second_moment(basis.flatten(2)[..., None], out=totals[group])
            count += basis.numel() // basis.shape[1]
    return (totals[0] if layer.groups == 1 else torch.stack(totals)) / count


def _inputs_of(layer: BoundLayer, group: int) -> slice:
    """The input channels of a group."""
    size = layer.in_channels // layer.groups
    return slice(group * size, (group + 1) * size)


def _demodulation(problem: Problem, style: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The squared norm that demodulation divides by, as a quadratic in Lambda: constant [O], linear [O, J] (half
    the gradient) and quadratic [J, J], float64."""
    # [O, I, T] in its own precision: float32 products of all of W cost a tenth of float64 ones
    weight, square = problem.weight.flatten(2), style.to(problem.weight).square()
    rows = problem.directions.to(square)
    constant = torch.matmul(square, weight.square()).double().sum(1) + eps
    linear = torch.matmul(rows * square, weight).double().flatten(1)
    rows, square = rows.double(), square.double()
    gram = rows * square @ rows.T
    quadratic = torch.kron(gram, torch.eye(weight.shape[2], dtype=gram.dtype, device=gram.device))
    return constant, linear, quadratic


def _fit_inputs(problem: Problem, group: int = 0) -> dict:
    """One edit's arguments of ops.fit_low_rank for the output channels of one group, unbatched, the pixels of all its
    regions flattened.

    The penalty holds demodulation at its value without the change, as a preserve term quadratic in Lambda must.
    """
    layer, weight, rows, own, seen = problem.layer, problem.weight, problem.directions, slice(None), slice(None)
    if layer.groups > 1:  # a group sees its own input channels alone
        outputs, seen = len(weight) // layer.groups, _inputs_of(layer, group)
        own = slice(group * outputs, (group + 1) * outputs)
        weight, rows = weight[own, seen], rows[:, seen]
    maps: dict[str, list[Tensor]] = {name: [] for name in ("basis", "base", "target", "shift")}
    styles: list[Tensor] = []  # [I], each that is another than those before it
    segments = []
    for capture, target in problem.regions:
        after, key = layer.post_operation(capture), capture.key[:, seen]
        with torch.no_grad():
            maps["basis"].append(basis_maps(layer, key, rows)[0].flatten(1))
            maps["base"].append(layer.linear(key, weight)[0].flatten(1))
        base = maps["base"][-1]
        shift = torch.zeros((), dtype=base.dtype, device=base.device) if after.shift is None else after.shift
        maps["target"].append(target[0].flatten(1)[own])
        maps["shift"].append(shift.to(base.dtype).expand(target.shape)[0].flatten(1)[own])
        if after.style is not None:
            same = [number for number, style in enumerate(styles) if torch.equal(style, after.style[0])]
            if not same:
                styles.append(after.style[0])
            number = same[0] if same else len(styles) - 1
            segments.append(torch.full((base.shape[1],), number, device=base.device))
    arguments = {name: parts[0] if len(parts) == 1 else torch.cat(parts, -1) for name, parts in maps.items()}
    arguments |= {"slope": after.slope, "gain": after.gain, "demodulation": None}
    scale = torch.full((len(base),), after.gain**2, dtype=torch.float64, device=base.device)
    if styles:
        parts = [_demodulation(problem, style, after.eps) for style in styles]
        if len(styles) == 1:
            arguments["demodulation"] = parts[0]
            scale = scale / parts[0][0]
        else:
            arguments["demodulation"] = tuple(map(torch.stack, zip(*parts)))
            arguments["segments"] = torch.cat(segments)
            # each pixel's style at the weight as it is; the mean over the pixels
            scale = scale * arguments["demodulation"][0].reciprocal()[arguments["segments"]].mean(0)
    if problem.preserve:
        generic = problem.generic if layer.groups == 1 else problem.generic[group]
        arguments["penalty"] = problem.preserve * generic
        arguments["penalty_scale"] = scale
    return arguments


def _in_segments(part: dict, count: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """A fit's demodulation as one of `count`, with the segments that say which pixel has which; the rest is unused."""
    segments = part.get("segments")
    parts = part["demodulation"] if segments is not None else tuple(own[None] for own in part["demodulation"])
    if segments is None:
        segments = torch.zeros(part["basis"].shape[1], dtype=torch.int64, device=part["basis"].device)
    missing = count - len(parts[0])
    fill = [own.new_full((missing, *own.shape[1:]), value) for own, value in zip(parts, (1.0, 0.0, 0.0))]
    return tuple(torch.cat(pair) for pair in zip(parts, fill)), segments


def _pad(rows: Sequence[Tensor], pixels: int) -> Tensor:
    return torch.stack([F.pad(row, (0, pixels - row.shape[-1])) for row in rows])


def _is_known(problem: Problem) -> bool:
    """Whether what follows the layer is known, per channel."""
    return problem.layer.post_operation(problem.capture) is not None


def _warn_underdetermined(problem: Problem) -> None:
    rank, taps = len(problem.directions), math.prod(problem.coefficient_shape[2:])
    pixels = sum(math.prod(target.shape[2:]) for _, target in problem.regions)
    if rank * taps >= pixels and not problem.preserve:
        warn(
            f"Each channel has {rank * taps} unknowns for {pixels} pixels, so the goal is met whatever that does to "
            "other images: use tight=False where only a part of the map is fitted, a lower rank, or preserve=0.3.",
            UnderdeterminedWarning,
        )


def solve_lm(problems: Sequence[Problem], backend: str = "auto") -> list[Solution]:
    """All problems (edits of one layer, same rank and loss) in one batched fit.

    Raises SolverError where what follows the layer is unknown.
    """
    first = problems[0]
    if not all(map(_is_known, problems)):
        raise SolverError(
            f"What follows {first.layer.name!r} is not known per channel, so 'lm' cannot run; use solver='adam'."
        )
    for problem in problems:
        _warn_underdetermined(problem)
    groups = first.layer.groups
    inputs = [_fit_inputs(problem, group) for problem in problems for group in range(groups)]
    sizes = [part["basis"].shape[-1] for part in inputs]
    pixels = max(sizes)
    arguments = {name: _pad([part[name] for part in inputs], pixels) for name in ("basis", "base", "target", "shift")}
    valid = _pad([torch.ones_like(part["basis"][0]) for part in inputs], pixels)
    if any("segments" in part for part in inputs):
        count = max(len(part["demodulation"][0]) for part in inputs if "segments" in part)
        parts, segments = zip(*(_in_segments(part, count) for part in inputs))
        arguments["demodulation"] = tuple(map(torch.stack, zip(*parts)))
        arguments["segments"] = _pad(segments, pixels)
    elif inputs[0]["demodulation"] is not None:
        arguments["demodulation"] = tuple(map(torch.stack, zip(*(part["demodulation"] for part in inputs))))
    if "penalty" in inputs[0]:
        arguments["penalty"] = torch.stack([part["penalty"] for part in inputs])
        arguments["penalty_scale"] = torch.stack([part["penalty_scale"] for part in inputs])
    slope, gain = inputs[0]["slope"], inputs[0]["gain"]
    fit = ops.fit_low_rank(**arguments, pixel_weights=valid, slope=slope, gain=gain, loss=first.loss, backend=backend)
    # All that is read comes over at once: on a GPU this is the only wait of the fit.
    rows = [fit.initial_loss, fit.loss, fit.iterations, *(fit.status == code for code in STATUS)]
    read = torch.stack([row.reshape(len(problems), -1).double().sum(1) for row in rows], 1)
    whole = torch.ones_like(read[:, :1])
    parts = [fit.coefficients]
    if fit.loss.device.type != "cpu":  # where fit_low_rank does not look into what it is given
        parts += [arguments[name] for name in ("basis", "base", "target", "shift")]
    for part in parts:
        whole = whole * part.reshape(len(problems), -1).isfinite().all(1, keepdim=True)
    solutions = []
    for number, (problem, (initial, final, iterations, *counts, finite)) in enumerate(
        zip(problems, torch.cat([read, whole], 1).tolist())
    ):
        if not finite:
            raise NonFiniteError("The fit met NaN or infinity; check the generator's weights at this layer.")
        i, channels = slice(number * groups, (number + 1) * groups), problem.coefficient_shape[0]
        solutions.append(
            Solution(
                coefficients=fit.coefficients[i].reshape(problem.coefficient_shape),
                losses=[initial / channels, final / channels],
                solver=fit.solver,
                final_loss=final / channels,
                status={STATUS[code]: int(count) for code, count in zip(STATUS, counts) if count},
                iterations=int(iterations),
            )
        )
    return solutions


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise RewriteCoreError(f"A stepwise solver needs at least one step, not {steps}.")


def _steps(steps: int, progress: bool, label: str):
    _check_steps(steps)
    return tqdm(range(steps), desc=label, unit="step", disable=None if progress else True)


def _check_loss(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(
            "The loss became NaN or infinite; check the generator's activations, or lower the learning rate."
        )
    return value


def solve_adam(problem: Problem, steps: int = 2001, lr: float = 0.05, progress: bool = False) -> Solution:
    """Adam on Lambda alone, from zero (the reference's "linear insert")."""
    _warn_underdetermined(problem)
    weight = problem.weight
    directions = problem.directions.to(weight.dtype)
    coefficients = torch.zeros(problem.coefficient_shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    scale = None
    if problem.preserve:
        if not _is_known(problem):
            raise SolverError(f"What follows {problem.layer.name!r} is not known per channel: use preserve=0.")
        inputs = [_fit_inputs(problem, group) for group in range(problem.layer.groups)]
        penalty = torch.stack([part["penalty"] for part in inputs]).to(weight.dtype)
        scale = torch.cat([part["penalty_scale"] for part in inputs]).to(weight.dtype)
    optimiser = torch.optim.Adam([coefficients], lr=lr)
    losses = []
    with torch.enable_grad():
        for _ in _steps(steps, progress, "adam"):
            distance = problem.distance(weight + combine(coefficients, directions))
            objective = distance
            if scale is not None:
                flat = coefficients.flatten(1).unflatten(0, (len(penalty), -1))
                objective = distance + (scale * torch.einsum("goj,gjk,gok->go", flat, penalty, flat).flatten()).mean()
            optimiser.zero_grad()
            objective.backward()
            optimiser.step()
            losses.append(_check_loss(distance.detach()))
    final = coefficients.detach()
    with torch.no_grad():
        final_loss = problem.distance(weight + combine(final, directions)).item()
    return Solution(final, losses, "adam", final_loss, iterations=steps)


def _project(weight: Tensor, directions: Tensor) -> Tensor:
    return combine(torch.einsum("oi...,ri->or...", weight, directions), directions)


def solve_projected(
    problem: Problem,
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: bool = False,
    backend: str = "auto",
) -> Solution:
    """The reference implementation's algorithm: Adam on W, and after steps 0, 10, 20, ... and the last one W is
    replaced by its original part orthogonal to D plus its own projection on D.

    Fused (ops.fit_projected) where a kernel can take the problem and what follows the layer is known per channel; else
    through autograd, which makes the same steps but for rounding. The status says which. `backend`: "triton" and
    "cpp" insist on the one, "reference" on the other.
    """
    _refuse_preserve(problem, "projected")
    if project_every < 1:
        raise RewriteCoreError(f"project_every must be at least 1, not {project_every}.")
    original = problem.weight
    directions = problem.directions.to(original.dtype)
    if _fuses(problem, backend):
        return _fused(
            problem,
            "projected",
            steps,
            lr,
            progress,
            backend,
            directions=directions,
            project_every=project_every,
            project_gradient=project_gradient,
        )
    orthogonal = original - _project(original, directions)

    def project(step: int, weight: Tensor) -> None:
        if step % project_every == 0 or step == steps - 1:
            weight.copy_(orthogonal + _project(weight, directions))

    weight, losses, final_loss = _descend(
        problem,
        steps,
        lr,
        progress,
        "projected",
        project,
        (lambda gradient: _project(gradient, directions)) if project_gradient else None,
    )
    coefficients = torch.einsum("oi...,ri->or...", (weight - original).double(), directions.double())
    return Solution(
        coefficients.to(original.dtype), losses, "projected", final_loss, {"autograd": len(original)}, steps
    )


def solve_unconstrained(
    problem: Problem, steps: int = 2001, lr: float = 0.05, progress: bool = False, backend: str = "auto"
) -> Solution:
    """Adam on all of W: the baseline. Its directions are the identity, its coefficients the whole change. Fused or not
    as :func:`solve_projected`."""
    _refuse_preserve(problem, "unconstrained")
    if _fuses(problem, backend):
        return _fused(problem, "unconstrained", steps, lr, progress, backend)
    weight, losses, final_loss = _descend(problem, steps, lr, progress, "unconstrained", None, None)
    return Solution(weight - problem.weight, losses, "unconstrained", final_loss, {"autograd": len(weight)}, steps)


def _fuses(problem: Problem, backend: str) -> bool:
    """Whether ops.fit_projected has a kernel for this problem, by `backend`."""
    layer = problem.layer
    if len(layer.kernel_size) != 2 or layer.groups != 1:  # the kernel is for dense 2-D convolutions
        if backend not in ("auto", "reference"):
            raise SolverError(f"{layer.name!r} is no dense 2-D convolution: use backend='auto'.")
        return False
    places = problem.target.shape[2:]
    if problem.more:
        places = 1, sum(math.prod(target.shape[2:]) for _, target in problem.regions)
    shape = layer.in_channels, *layer.kernel_size, *places
    chosen = select("fit_projected", backend, problem.target.new_empty(()).expand(shape)).name
    reason = None
    if not _is_known(problem):
        reason = f"What follows {layer.name!r} is not known per channel"
    else:
        styles = [layer.post_operation(capture).style for capture, _ in problem.regions]
        if styles[0] is not None and not all(torch.equal(style, styles[0]) for style in styles):
            reason = "The pastes are on pictures of different styles, and the kernel knows one demodulation"
    if chosen != "reference" and backend != "auto" and reason:
        raise SolverError(f"{reason}: use backend='auto'.")
    return chosen != "reference" and not reason


def _fused(problem: Problem, solver: str, steps: int, lr: float, progress: bool, backend: str, **options) -> Solution:
    _check_steps(steps)
    layer, weight = problem.layer, problem.weight
    after, taps = layer.post_operation(problem.capture), math.prod(layer.kernel_size)
    maps: dict[str, list[Tensor]] = {name: [] for name in ("operator", "base", "target", "value", "shift")}
    with torch.no_grad():
        kernels = torch.eye(taps, dtype=weight.dtype, device=weight.device).reshape(taps, 1, *layer.kernel_size)
        for capture, target in problem.regions:
            operator = layer.linear(capture.key.transpose(0, 1), kernels)  # of each input map by itself
            shift = layer.post_operation(capture).shift
            shift = weight.new_zeros(()) if shift is None else shift.to(weight)
            maps["operator"].append(operator.reshape(len(operator), *layer.kernel_size, *operator.shape[2:]))
            maps["base"].append(layer.linear(capture.key, weight)[0])
            maps["target"].append(target[0])
            maps["value"].append(layer.value(capture, weight)[0])
            maps["shift"].append(shift.expand(target.shape)[0])
        if problem.more:  # pixels side by side, whatever picture they are of
            for name, parts in maps.items():
                maps[name] = [torch.cat([part.flatten(-2)[..., None, :] for part in parts], -1)]
        operator, base, target, value, shift = (parts[0] for parts in maps.values())
        fit = ops.fit_projected(
            operator,
            base,
            target,
            value=value,
            shift=None if after.shift is None else shift,
            demodulation=None if after.style is None else (weight, after.style[0].to(weight), after.eps),
            slope=after.slope,
            gain=after.gain,
            loss=problem.loss,
            steps=steps,
            lr=lr,
            backend=backend,
            progress=(lambda ranges, count: tqdm(ranges, total=count, desc=solver, unit="part", disable=None))
            if progress
            else None,
            **options,
        )
        losses = [_check_loss(loss) for loss in fit.losses.cpu()]
        directions = options.get("directions")
        change = fit.coefficients if directions is None else combine(fit.coefficients, directions)
        final_loss = problem.distance(weight + change).item()
    return Solution(fit.coefficients, losses, solver, final_loss, {"fused": len(weight)}, steps)


def _refuse_preserve(problem: Problem, solver: str) -> None:
    if problem.preserve:
        raise SolverError(f"Solver {solver!r} has no preserve term; use 'lm' or 'adam', or preserve=0.")


def _descend(problem, steps, lr, progress, label, project, project_gradient) -> tuple[Tensor, list[float], float]:
    weight = problem.weight.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([weight], lr=lr)
    losses = []
    with torch.enable_grad():
        for step in _steps(steps, progress, label):
            loss = problem.distance(weight)
            optimiser.zero_grad()
            loss.backward()
            if project_gradient is not None:
                weight.grad.copy_(project_gradient(weight.grad))
            optimiser.step()
            losses.append(_check_loss(loss.detach()))
            if project is not None:
                with torch.no_grad():
                    project(step, weight)
    with torch.no_grad():
        final_loss = problem.distance(weight).item()
    return weight.detach(), losses, final_loss
