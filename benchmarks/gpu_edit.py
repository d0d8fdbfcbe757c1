"""The part of ``make gpu-check`` that times an edit's kernels: the fit, the projected solver, and solves with second
moments, against stock PyTorch on the same GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rewrite_core.ops import fit_low_rank, fit_projected, spd_solve
from rewrite_core.solvers.lm import fit_inputs

from .bench_edit import STEPS, _goal, _problem
from .harness import Case, Checked, Contender, Problem, Race, Refused, measurement
from .report import Report

CHANNELS, SIDE = 512, 10
FITS = tuple((kind, rank, edits) for kind in ("linear", "stylegan2") for rank in (1, 4) for edits in (1, 64))
SOLVES = (
    (1, 64, 1),
    (1, 256, 8),
    (1, 512, 8),
    (1, 512, 64),
    (1, 1024, 8),
    (1, 2048, 8),
    (8, 512, 8),
)  # batch, n, sides
FEW = 21  # of the reference's steps, for contenders that would take seconds


def cases(device: str = "cuda", channels: int = CHANNELS, side: int = SIDE, steps: int = STEPS) -> list[Case]:
    """Each with the op that it times as its group."""
    size = f"{channels} channels, {side}x{side}"
    fits = [
        Case(
            f"fit {kind}, {size}, rank {rank}, {edits} edit{'s' * (edits > 1)} gpu",
            functools.partial(make_fit, kind, channels, side, rank, edits, device),
            "fit_low_rank",
        )
        for kind, rank, edits in FITS
    ]
    projected = [
        Case(
            f"projected {kind}, {size}, rank 1, {steps} steps gpu",
            functools.partial(make_projected, kind, channels, side, steps, device),
            "fit_projected",
        )
        for kind in ("linear", "stylegan2")
    ]
    solves = [
        Case(
            f"solve {batch}x n {n}, {sides} rhs gpu",
            functools.partial(make_solve, batch, n, sides, device),
            "spd_solve",
        )
        for batch, n, sides in SOLVES
    ]
    return [*fits, *projected, *solves]


def _projected_arguments(problem, device: str) -> tuple[tuple[Tensor, ...], dict]:
    """Positional and other arguments of ops.fit_projected, as rewrite_core.solvers makes them."""
    ((capture, target),) = problem.regions
    layer, key, weight = problem.layer, capture.key, problem.weight
    after = layer.post_operation(capture)
    with torch.no_grad():
        kernels = torch.eye(9).reshape(9, 1, 3, 3)
        operator = layer.linear(key.transpose(0, 1), kernels)
        operator = operator.reshape(len(operator), 3, 3, *operator.shape[2:])
        base, value = layer.linear(key, weight)[0], layer.value(capture, weight)[0]
    options = {"value": value, "directions": problem.directions, "slope": after.slope, "gain": after.gain, "loss": "l1"}
    if after.shift is not None:
        options["shift"] = after.shift.float().expand(target.shape)[0]
    if after.style is not None:
        options["demodulation"] = weight, after.style[0].float(), after.eps
    return tuple(part.to(device) for part in (operator, base, target[0])), _to(options, device)


def _to(item, device: str):
    if isinstance(item, dict):
        return {name: _to(part, device) for name, part in item.items()}
    if isinstance(item, tuple):
        return tuple(_to(part, device) for part in item)
    return item.detach().to(device) if isinstance(item, Tensor) else item


def _loop(problem, device: str) -> Callable[[int], Tensor]:
    """The reference's loop for a linear 3x3 layer: F.conv2d, autograd, torch.optim.Adam, projection every ten steps."""
    ((capture, goal),) = problem.regions
    key, original, target, rows = (
        part.detach().to(device) for part in (capture.key, problem.weight, goal, problem.directions)
    )

    def project(weight: Tensor) -> Tensor:
        return torch.einsum("oryx,ri->oiyx", torch.einsum("oiyx,ri->oryx", weight, rows), rows)

    def run(steps: int) -> Tensor:
        weight = original.clone().requires_grad_(True)
        orthogonal = original - project(original)
        optimiser = torch.optim.Adam([weight], lr=0.05)
        losses = []
        for step in range(steps):
            with torch.enable_grad():
                loss = F.l1_loss(F.conv2d(key, weight, padding=1), target)
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            losses.append(loss.detach())
            with torch.no_grad():
                if step % 10 == 0 or step == steps - 1:
                    weight.copy_(orthogonal + project(weight))
        return torch.stack(losses)

    return run


def _stock(problem, kind: str, device: str, steps: int, part: float) -> list[Contender]:
    """The reference's loop, a few steps of it: its first losses."""
    arguments, options = _projected_arguments(problem, device)
    few = min(FEW, steps)
    part = part * few / steps

    def as_matrix() -> Tensor:
        return fit_projected(*arguments, **options, steps=few, backend="reference").losses

    stock = [Contender("the reference's loop, operator as a matrix", as_matrix, rounds=5, part=part)]
    if kind == "linear":
        loop = _loop(problem, device)
        stock.append(Contender("the reference's loop", lambda: loop(few), rounds=5, part=part))
    return stock


def make_fit(kind: str, channels: int, side: int, rank: int, edits: int, device: str, backend: str) -> Problem:
    problem = _problem(kind, channels, side, rank)
    goal = _goal(problem)
    arguments = _to(fit_inputs(problem), device)
    many = {name: _batch(part, edits) for name, part in arguments.items()}
    generator = torch.Generator(device).manual_seed(edits)
    noise = torch.randn(many["target"].shape, generator=generator, device=device)
    noise[0] = 0
    many["target"] = many["target"] + 0.1 * many["target"].std() * noise
    found = fit_low_rank(**many, backend=backend)
    unknowns, pixels = 9 * rank, side * side
    system = min(unknowns, pixels)
    steps = found.iterations.sum().item()

    def error(result: object) -> float:
        if isinstance(result, Tensor):  # the first losses of a loop that does a part of the job
            return 0.0
        return (result.loss[0, :32].mean().item() - goal) / goal

    return Problem(
        ours=Contender("rewrite_core", lambda: fit_low_rank(**many, backend=backend)),
        stock=_stock(problem, kind, device, STEPS, 1 / edits),
        shapes={"basis": list(many["basis"].shape), "base": list(many["base"].shape)},
        dtype="float32",
        operations=steps * (pixels * unknowns * (system + 5) + system**3 / 3 + 2 * system**2),
        traffic=4.0 * (many["basis"].numel() + 3 * many["base"].numel() + found.coefficients.numel()),
        error=error,
        error_kind="l1 above the float64 reference's, relative",
        tolerance=0.01,
        details={"steps": steps, "edits": edits, "final_l1": found.loss.mean().item()},
    )


def _batch(part, edits: int):
    if isinstance(part, tuple):
        return tuple(_batch(item, edits) for item in part)
    return part.expand(edits, *part.shape).contiguous() if isinstance(part, Tensor) else part


def make_projected(kind: str, channels: int, side: int, steps: int, device: str, backend: str) -> Problem:
    problem = _problem(kind, channels, side, 1)
    arguments, options = _projected_arguments(problem, device)
    few = min(FEW, steps)
    # step few - 1 projects either way
    curve = fit_projected(
        *(part.double() for part in arguments), **_double(options), steps=few, backend="reference"
    ).losses

    def error(result: object) -> float:
        losses = result if isinstance(result, Tensor) else result.losses
        return ((losses[:few].double() - curve).abs() / curve).max().item()

    weights, pixels = 9 * channels, side * side
    return Problem(
        ours=Contender("rewrite_core", lambda: fit_projected(*arguments, **options, steps=steps, backend=backend)),
        stock=_stock(problem, kind, device, steps, 1.0),
        shapes={"operator": list(arguments[0].shape), "base": list(arguments[1].shape)},
        dtype="float32",
        operations=float(steps) * channels * weights * (4 * pixels + 16),
        traffic=4.0 * (weights * pixels + 3 * channels * pixels),
        error=error,
        error_kind="largest relative error of the first losses",
        tolerance=0.02,
        details={"steps": steps},
    )


def _double(item):
    if isinstance(item, dict):
        return {name: _double(part) for name, part in item.items()}
    if isinstance(item, tuple):
        return tuple(map(_double, item))
    return item.double() if isinstance(item, Tensor) else item


def make_solve(batch: int, n: int, sides: int, device: str, backend: str) -> Problem:
    """Whether a kernel of ours could pay: what torch.linalg takes, in float64, and by a float32 factor with refinement."""
    generator = torch.Generator(device).manual_seed(n)
    keys = torch.randn(batch, 4 * n, n, generator=generator, device=device, dtype=torch.float64)
    keys *= torch.logspace(-1.5, 0, n, device=device, dtype=torch.float64)
    matrix = keys.mT @ keys / (4 * n)
    rhs = torch.randn(batch, n, sides, generator=generator, device=device, dtype=torch.float64)

    def refined() -> Tensor:
        lower = torch.linalg.cholesky_ex(matrix.float())[0]
        x = torch.zeros_like(rhs)
        for _ in range(4):
            x = x + torch.cholesky_solve((rhs - matrix @ x).float(), lower).double()
        return x

    return Problem(
        ours=Contender("rewrite_core", lambda: spd_solve(matrix, rhs, backend=backend)),
        stock=[
            Contender("linalg.solve", lambda: torch.linalg.solve(matrix, rhs)),
            Contender(
                "cholesky, cholesky_solve", lambda: torch.cholesky_solve(rhs, torch.linalg.cholesky_ex(matrix)[0])
            ),
            Contender("linalg.inv", lambda: torch.linalg.inv(matrix) @ rhs),
            Contender("float32 cholesky, refined", refined),
        ],
        shapes={"matrix": list(matrix.shape), "rhs": list(rhs.shape)},
        dtype="float64",
        operations=batch * (n**3 / 3 + 2.0 * n * n * sides),
        traffic=8.0 * batch * (n * (n + 1) // 2 + 2 * n * sides),
        error=lambda x: ((matrix @ x - rhs).norm() / rhs.norm()).item(),
        error_kind="relative residual",
        tolerance=1e-10,
    )


def check(case: Case, backend: str, tests: str) -> Checked:
    """Every contender's error; raises Refused where ours is too large."""
    problem = case.make(backend)
    errors = {contender.name: problem.error(contender.run()) for contender in problem.contenders}
    if not errors[problem.ours.name] <= problem.tolerance:  # also NaN
        raise Refused(
            f"{case.group} is wrong here, so its speed is not reported: in case {case.name!r} the {problem.error_kind} "
            f"is {errors[problem.ours.name]:.2e}, above {problem.tolerance:.0e}."
        )
    return Checked(case, problem, backend, tests, errors)


def measure(sheet: Report, race: Callable[[Problem], Race], case: Case) -> None:
    """Adds a case's line; raises Refused where ours is wrong."""
    checked = check(case, "reference" if case.group == "spd_solve" else "triton", "passed")
    timed = race(checked.problem)
    timed.run(False)
    sheet.add(measurement(case.group, checked, timed, False))
