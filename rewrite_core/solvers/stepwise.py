"""Solvers that go step by step.

``adam``           Adam on Lambda through autograd; works for any layer
``projected``      the reference implementation's: Adam on all of W, projected back to D every few steps
``unconstrained``  Adam on all of W, no directions: the baseline
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from ..backends import select
from ..errors import NonFiniteError, RewriteCoreError, SolverError
from .lm import fit_inputs
from .problem import Problem, Solution, combine, is_known, warn_underdetermined


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
    warn_underdetermined(problem)
    weight = problem.weight
    directions = problem.directions.to(weight.dtype)
    coefficients = torch.zeros(problem.coefficient_shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    scale = None
    if problem.preserve:
        if not is_known(problem):
            raise SolverError(f"What follows {problem.layer.name!r} is not known per channel: use preserve=0.")
        inputs = [fit_inputs(problem, group) for group in range(problem.layer.groups)]
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
    if not is_known(problem):
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
