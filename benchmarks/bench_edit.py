"""An edit's solvers against the reference implementation's loop: the fit, many edits at once, a whole `rc.rewrite`, and
the click.

The reference's loop here is our own plain PyTorch: ``rewrite_core.solvers`` through autograd (backend "reference"),
which tests/test_rewriting.py and tests/test_fit_projected.py hold to the loss curves recorded from it. Where a
contender takes minutes it runs a few of its 2001 steps, and says what part of the job it did.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewrite_core import (
    REFERENCE,
    Adam,
    Edit,
    Projected,
    Rewrite,
    SecondMoment,
    Selection,
    Session,
    bind,
    collect_second_moment,
    rewrite,
    sample_latents,
)
from rewrite_core.adapters.base import Capture
from rewrite_core.adapters.stylegan2 import StyleGAN2Layer
from rewrite_core.generators.stylegan2 import StyledConv, StyleGAN2
from rewrite_core.layers.bound import BoundLayer
from rewrite_core.ops import fit_low_rank
from rewrite_core.ops.fit_low_rank_op.problem import FitResult
from rewrite_core.solvers.lm import fit_inputs, solve_lm
from rewrite_core.solvers.problem import LayerProblem, LayerSolution, combine

from .harness import Case, Contender, Problem

OP = "edit"
KERNEL = "fit_low_rank"  # the op whose backend it uses
TESTS = ("fit_low_rank", "fit_projected")
STEPS = 2001  # the reference's
SAMPLE = 32  # channels that are compared with the float64 reference backend
KINDS = ("linear", "stylegan2")
CLICK: dict[str, Any] = REFERENCE | {"solver": "lm"}


def _few_steps(channels: int, side: int) -> tuple[int, int]:
    """Of the reference's loop and of Adam on Lambda: some seconds' worth."""
    return (2, 11) if side > 10 else (4, 8) if channels > 512 else (21, 101)


def cases(quick: bool) -> list[Case]:
    def fit(kind: str, channels: int, side: int, rank: int, steps: int, adam: int) -> Case:
        name = f"fit {kind}, {channels} channels, {side}x{side}, rank {rank}"
        return Case(name, functools.partial(make_fit, kind, channels, side, rank, steps, adam))

    def l2(channels: int, side: int, rank: int) -> Case:
        name = f"closed form, {channels} channels, {side}x{side}, rank {rank}"
        return Case(name, functools.partial(make_l2, channels, side, rank))

    def many(count: int, channels: int, side: int) -> Case:
        name = f"{count} edits at once, {channels} channels, {side}x{side}, rank 1"
        return Case(name, functools.partial(make_many, count, channels, side))

    def whole(channels: int, size: int, side: int, steps: int) -> Case:
        name = f"rc.rewrite, {channels} channels, {side}x{side} of {size}x{size}, rank 1"
        return Case(name, functools.partial(make_rewrite, channels, size, side, steps))

    def batch(count: int, size: int, layer: str) -> Case:
        name = f"{count} edits of StyleGAN2-{size} {layer}, from the edits to the changes"
        return Case(name, functools.partial(make_batch, count, size, layer))

    def click(size: int, layer: str, steps: int = STEPS) -> Case:
        return Case(f"click, StyleGAN2-{size} {layer}", functools.partial(make_click, size, layer, steps))

    def warm(size: int, layer: str) -> Case:
        return Case(
            f"click in a warm session, StyleGAN2-{size} {layer}", functools.partial(make_warm_click, size, layer)
        )

    if quick:
        return [
            fit("stylegan2", 16, 6, 1, 40, 40),
            l2(16, 6, 1),
            many(2, 16, 6),
            whole(16, 8, 4, 40),
            batch(3, 8, "convs.1.conv"),
            click(8, "convs.1.conv", 40),
            warm(8, "convs.1.conv"),
        ]
    sizes = [
        (64, 10, 1),
        (256, 10, 1),
        (1024, 10, 1),
        (512, 4, 1),
        (512, 32, 1),
        (512, 64, 1),
        (512, 10, 4),
        (512, 32, 16),
        (512, 10, 64),
    ]
    return [
        *(fit(kind, 512, 10, 1, STEPS, STEPS) for kind in KINDS),
        *(fit(kind, *size, *_few_steps(*size[:2])) for size in sizes for kind in KINDS),
        l2(512, 10, 1),
        l2(512, 10, 4),
        many(8, 512, 10),
        many(64, 512, 10),
        whole(512, 32, 10, STEPS),
        batch(1, 256, "convs.5.conv"),
        batch(64, 256, "convs.5.conv"),
        click(256, "convs.5.conv"),
        click(256, "convs.6.conv"),
        warm(256, "convs.6.conv"),
    ]


# --- problems --------------------------------------------------------------------------------------------


def _key(channels: int, side: int, rank: int) -> tuple[Tensor, Tensor]:
    """A key map [1, I, side, side] as generators make them, and directions [R, I]."""
    generator = torch.Generator().manual_seed(channels + side + rank)
    rows = torch.linalg.qr(torch.randn(channels, rank, generator=generator)).Q.T
    key = torch.randn(1, channels, side, side, generator=generator)
    key = F.avg_pool2d(key, 3, 1, 1) * 3  # neighbouring pixels agree
    return key + (rows.sum(0) * math.sqrt(channels) / 4)[:, None, None], rows  # and share the context


def _problem(kind: str, channels: int, side: int, rank: int, loss: str = "l1", number: int = 0) -> LayerProblem:
    """A 3x3 layer, and a goal that a rank-R change explains for the most part. `number` varies the goal."""
    key, rows = _key(channels, side, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "linear":
            convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.normal_(convolution.weight)
            layer = bind(nn.Sequential(convolution), "0")
            capture = Capture(key / math.sqrt(9 * channels))
        else:
            styled = StyledConv(channels, channels, 8)
            layer = BoundLayer(nn.Sequential(styled), StyleGAN2Layer("0.conv", styled.conv, styled))
            style = 1 + 0.3 * torch.randn(1, channels)
            capture = Capture(style[:, :, None, None] * key, {"style": style, "noise": torch.randn(1, 1, side, side)})
        torch.manual_seed(number + 1)
        hidden = combine(torch.randn(channels, rank, 3, 3), rows)
        with torch.no_grad():
            own = layer.linear(capture.key, layer.weight).std()
            hidden *= own / layer.linear(capture.key, hidden).std()
            target = layer.value(capture, layer.weight + hidden)
            target += 0.3 * target.std() * torch.randn_like(target)
    return LayerProblem(layer, ((capture, target),), rows, loss)


def _residual(problem: LayerProblem, coefficients: Tensor) -> Tensor:
    """What the change really leaves, [1, O, H, W] float64."""
    with torch.no_grad():
        weight = problem.layer.weight.double() + combine(coefficients.double(), problem.directions.double())
        ((capture, target),) = problem.regions
        return problem.layer.value(capture.to_dtype(torch.float64), weight) - target


def _goal(problem: LayerProblem) -> float:
    """The l1 that the float64 reference backend reaches, mean of the first channels (they are fitted one by one)."""
    part = fit_inputs(problem)
    for name in ("basis", "base", "target", "shift"):
        part[name] = part[name].double() if name == "basis" else part[name][:SAMPLE].double()
    if part["demodulation"] is not None:
        constant, linear, quadratic = part["demodulation"]
        part["demodulation"] = constant[:SAMPLE], linear[:SAMPLE], quadratic
    return fit_low_rank(**part, loss=problem.loss, backend="reference").loss.mean().item()


def _excess(residual: Tensor, goal: float, initial: float) -> float:
    """How far above the goal, relative to it, or to a hundredth of the first l1 where there is next to nothing left."""
    return (residual[:, :SAMPLE].abs().mean().item() - goal) / max(goal, 0.01 * initial)


def _name(solution: LayerSolution) -> str:
    return " ".join([solution.solver, *(word for word in ("fused", "autograd") if word in solution.status)])


def make_fit(kind: str, channels: int, side: int, rank: int, steps: int, adam: int, backend: str) -> Problem:
    """lm from keys and goal to coefficients (aside: its fit alone, from basis maps to coefficients), against the
    reference's loop, the same loop fused, and Adam on Lambda."""
    problem = _problem(kind, channels, side, rank)
    goal = _goal(problem)
    details: dict[str, float] = {}

    def error(solution: LayerSolution) -> float:
        assert solution.final_loss is not None  # of every solver that takes steps
        residual = _residual(problem, solution.coefficients)
        l1 = residual.abs().mean().item()
        details.update({f"{_name(solution)}: l1": l1, f"{_name(solution)}: l2": residual.square().mean().item()})
        initial = solution.losses[0]
        honest = abs(solution.final_loss - l1) <= 1e-3 * max(l1, 1e-3 * initial)
        return _excess(residual, goal, initial) if honest else math.inf

    lm = solve_lm([problem], backend)[0]
    details["lm: steps of all channels"] = lm.iterations
    inputs = fit_inputs(problem)
    ((capture, target),) = problem.regions

    def fit_alone() -> LayerSolution:
        fit = fit_low_rank(**inputs, loss=problem.loss, backend=backend)
        coefficients = fit.coefficients.reshape(problem.coefficient_shape)
        losses = [fit.initial_loss.mean().item(), fit.loss.mean().item()]
        return LayerSolution(coefficients, losses, "fit_low_rank", losses[-1])

    unknowns, pixels = 9 * rank, side * side
    system = min(unknowns, pixels)  # the normal equations are over the fewer of the two

    def stepwise(name: str, run: Callable[[], LayerSolution], count: int) -> Contender:
        rounds = 1 if count == STEPS else 3  # all steps take a minute
        return Contender(name, run, rounds=rounds, part=count / STEPS)

    return Problem(
        ours=Contender("rewrite_core", lambda: solve_lm([problem], backend)[0]),
        stock=[
            Contender("fit_low_rank alone", fit_alone, aside=True),
            stepwise("reference's loop", lambda: Projected(steps).solve([problem], backend="reference")[0], steps),
            stepwise("projected, fused", lambda: Projected(steps).solve([problem])[0], steps),
            stepwise("Adam on Lambda", lambda: Adam(adam).solve([problem])[0], adam),
        ],
        shapes={"weight": [channels, channels, 3, 3], "key": [channels, side, side], "directions": [rank, channels]},
        dtype="float32",
        operations=lm.iterations * (pixels * unknowns * (system + 5) + system**3 / 3 + 2 * system**2),
        traffic=4 * (2 * target.numel() + lm.coefficients.numel() + capture.key.numel()),
        error=error,
        error_kind="l1 above the float64 reference fit's, relative",
        tolerance=1e-2,
        details=details,
    )


def make_l2(channels: int, side: int, rank: int, backend: str) -> Problem:
    """Basis maps in, coefficients out, where least squares has its exact solution."""
    problem = _problem("linear", channels, side, rank, "l2")
    ((capture, goal),) = problem.regions
    maps = torch.einsum("ri,nihw->rnhw", problem.directions, capture.key)
    basis = F.unfold(maps, 3, padding=1).flatten(0, 1)
    with torch.no_grad():
        base = problem.layer.linear(capture.key, problem.weight)[0].flatten(1)
    target = goal[0].flatten(1)
    exact = torch.linalg.lstsq(basis.double().T, (target.double() - base.double()).T).solution.T

    def fit(name: str) -> FitResult:
        return fit_low_rank(basis, base, target, loss="l2", backend=name)

    def least_squares(dtype: torch.dtype) -> Tensor:
        return torch.linalg.lstsq(basis.T.to(dtype), (target - base).T.to(dtype)).solution.T

    def normal_equations(dtype: torch.dtype) -> Tensor:
        rows, change = basis.to(dtype), (target - base).to(dtype)
        return torch.cholesky_solve(rows @ change.T, torch.linalg.cholesky(rows @ rows.T)).T

    def error(result: FitResult | Tensor) -> float:
        x = result if isinstance(result, Tensor) else result.coefficients
        return ((x.double() - exact).norm() / exact.norm()).item()

    unknowns, pixels = basis.shape
    return Problem(
        ours=Contender("rewrite_core", lambda: fit(backend)),
        stock=[
            Contender("linalg.lstsq", lambda: least_squares(torch.float32)),
            Contender("linalg.lstsq in float64", lambda: least_squares(torch.float64)),
            Contender("normal equations", lambda: normal_equations(torch.float32)),
            Contender("normal equations in float64", lambda: normal_equations(torch.float64)),
            Contender("reference backend", lambda: fit("reference")),
        ],
        shapes={"basis": list(basis.shape), "base": list(base.shape)},
        dtype="float32",
        operations=pixels * unknowns * (unknowns + 1) + unknowns**3 / 3 + 2 * channels * unknowns * (pixels + unknowns),
        traffic=4 * (basis.numel() + 2 * base.numel() + exact.numel()),
        error=error,
        error_kind="relative error of the coefficients",
        tolerance=1e-6,
    )


def make_many(count: int, channels: int, side: int, backend: str) -> Problem:
    """Several edits of one layer in one call, against one call each and the reference backend."""
    problems = [_problem("stylegan2", channels, side, 1, number=number) for number in range(count)]
    goals = [_goal(problem) for problem in problems]
    steps = sum(solution.iterations for solution in solve_lm(problems, backend))

    def error(solutions: list[LayerSolution]) -> float:
        return max(
            _excess(_residual(problem, solution.coefficients), goal, solution.losses[0])
            for problem, solution, goal in zip(problems, solutions, goals, strict=True)
        )

    pixels = side * side
    return Problem(
        ours=Contender("rewrite_core", lambda: solve_lm(problems, backend)),
        stock=[
            Contender("one by one", lambda: [solve_lm([problem], backend)[0] for problem in problems]),
            Contender("reference backend", lambda: solve_lm(problems, "reference"), rounds=1),
        ],
        shapes={"weight": [channels, channels, 3, 3], "key": [count, channels, side, side]},
        dtype="float32",
        operations=steps * (pixels * 9 * 14 + 9**3 / 3 + 2 * 9**2),
        traffic=4 * count * (2 * channels * pixels + channels * 9 + channels * pixels),
        error=error,
        error_kind="l1 above the float64 reference fit's, relative, at worst",
        tolerance=1e-2,
        details={"lm: steps of all channels": steps},
        made=(count, "edits"),
    )


def make_rewrite(channels: int, size: int, side: int, steps: int, backend: str) -> Problem:
    """The whole of `rc.rewrite` with "lm" and with the reference's loop, on a generator that is one 3x3 convolution.

    Its latents are key maps. The moment and its factor are at hand; the error is how far "lm" ends above the loop.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False)).requires_grad_(False)
        latents = F.avg_pool2d(torch.randn(8, channels, size, size), 3, 1, 1)
    layer = bind(generator, "0", forward=lambda g, z: g(z))
    moment = collect_second_moment(layer, latents, batch_size=4, progress=False)
    assert moment.factor is not None  # made here, and kept
    mask = torch.zeros(size, size)
    box = slice(size // 4, size // 4 + side)
    mask[box, box] = 1
    edit = Edit(copy=Selection(0, mask), paste=Selection(1, mask), context=[Selection(2, mask), Selection(3, mask)])

    def run(solver: str, backend: str) -> Rewrite:
        how = CLICK | {"solver": "lm" if solver == "lm" else Projected(steps)}
        return rewrite(layer, moment, edit, latents, **how, backend=backend)

    loss: dict[str, float] = {}
    for name in ("lm", "projected"):
        final = run(name, backend).final_loss
        assert final is not None  # of every solver that takes steps
        loss[name] = final
    rounds = 1 if steps == STEPS else None
    return Problem(
        ours=Contender("rewrite_core", lambda: run("lm", backend)),
        stock=[
            Contender("reference's loop", lambda: run("projected", "reference"), rounds=rounds),
            Contender("projected, fused", lambda: run("projected", backend), rounds=rounds),
        ],
        shapes={"weight": list(layer.weight.shape), "key": [channels, size, size]},
        dtype="float32",
        operations=2.0 * layer.weight.numel(),
        traffic=4.0 * layer.weight.numel(),
        error=lambda change: max(0.0, change.final_loss / loss["projected"] - 1),
        error_kind="final l1 above the fused loop's, relative",
        tolerance=1e-2,
        details={f"{name}: l1": value for name, value in loss.items()},
    )


def _stylegan2(size: int, name: str) -> tuple[BoundLayer, Tensor, SecondMoment, Tensor]:
    """A layer of a StyleGAN2 with random weights, 8 latents, its moment with the factor at hand, and a mask."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width: dict[str, Any] = {} if size > 8 else {"style_dim": 32, "n_mlp": 2, "channels": {4: 32, 8: 32}}
        generator = StyleGAN2(size, **width).eval().requires_grad_(False)
    layer = bind(generator, name)
    latents = sample_latents(generator.style_dim, 8, seed=1)
    moment = collect_second_moment(layer, latents, batch_size=4, progress=False)
    assert moment.factor is not None  # made here, and kept
    side = layer.values(latents[:1]).shape[2]
    mask = torch.zeros(side, side)
    box = slice(side // 3, side // 3 + min(10, side // 2))
    mask[box, box] = 1
    return layer, latents, moment, mask


def make_batch(count: int, size: int, name: str, backend: str) -> Problem:
    """What ``rewrite batch`` does with edits of one layer: the pictures of 8 latents are shared, and all are fitted at
    once; against a call of `rc.rewrite` for each. The error is the largest difference of a coefficient."""
    layer, latents, moment, mask = _stylegan2(size, name)
    rows = [(number % 8, number // 8 % 8, (number + 3) % 8) for number in range(count)]
    edits = [
        Edit(copy=Selection(copy, mask), paste=Selection(paste, mask), context=[Selection(context, mask)])
        for copy, paste, context in rows
    ]

    def together() -> list[Rewrite]:
        return Session(layer, moment, latents).rewrite_many(edits, **CLICK, backend=backend)

    def one_by_one() -> list[Rewrite]:
        return [rewrite(layer, moment, edit, latents, **CLICK, backend=backend) for edit in edits]

    wanted = [change.coefficients for change in one_by_one()]

    def error(changes: list[Rewrite]) -> float:
        differences = (
            ((change.coefficients - own).abs().max() / own.abs().max()).item() for change, own in zip(changes, wanted)
        )
        return max(differences)

    return Problem(
        ours=Contender("rewrite_core", together),
        stock=[Contender("rc.rewrite, one by one", one_by_one)],
        shapes={"weight": list(layer.weight.shape), "edits": [count]},
        dtype="float32",
        operations=2.0 * count * layer.weight.numel(),
        traffic=4.0 * layer.weight.numel(),
        error=error,
        error_kind="largest difference of a coefficient from one call each, relative",
        tolerance=1e-6,
        made=(count, "edits"),
    )


def _drawn(side: int, moved: int = 0) -> Edit:
    """An edit of one picture pasted into another, three of context; `moved` puts its masks to other places."""
    extent = min(10, side // 2)
    places = side - extent + 1

    def mask(number: int) -> Tensor:
        place = side // 3 * places + side // 3 + number
        top, left = place // places % places, place % places
        drawn = torch.zeros(side, side)
        drawn[top : top + extent, left : left + extent] = 1
        return drawn

    context = [Selection(row, mask(moved)) for row in (2, 3, 4)]
    return Edit(copy=Selection(0, mask(moved)), paste=Selection(1, mask(7 * moved)), context=context)


class _Click:
    """From an edit to applied weights, `rewrite(edit).apply()`, with what each stage took."""

    def __init__(self, layer: BoundLayer):
        self.layer, self.original = layer, layer.weight.clone()
        self.stages: dict[str, float] = {}
        self.details: dict[str, float] = {}
        self._times: dict[str, list[float]] = {}
        self._on: Rewrite | None = None

    def contender(self, name: str, call: Callable[[], Rewrite], **how: Any) -> Contender:
        """`call()` and apply; reverted before the next one, which is not timed."""
        return Contender(name, lambda: self._run(call, name == "rewrite_core"), prepare=self._revert, **how)

    def _run(self, call: Callable[[], Rewrite], ours: bool) -> Rewrite:
        start = time.perf_counter()
        self._on = change = call()
        solved = time.perf_counter()
        change.apply()
        if ours:
            seconds = change.seconds | {"apply": time.perf_counter() - solved}
            seconds["the rest"] = time.perf_counter() - start - sum(seconds.values())
            for stage, took in seconds.items():
                self._times.setdefault(stage, []).append(took)
                self.stages[stage] = statistics.median(self._times[stage])
            passes = self.stages.get("generator", 0)
            self.details["all but the generator's passes"] = sum(self.stages.values()) - passes
        return change

    def _revert(self) -> None:
        if self._on is not None:
            self._on.revert()
            self._on = None

    def error(self, change: Rewrite | None) -> float:
        """How far the applied weight is from what it should be, relative."""
        if change is None:
            return 1.0
        wanted = self.original.double() + change.weight_delta()
        return ((self.layer.weight - wanted).abs().max() / wanted.abs().max()).item()

    def problem(self, ours: Contender, stock: list[Contender], side: int) -> Problem:
        return Problem(
            ours=ours,
            stock=stock,
            shapes={"weight": list(self.original.shape), "context": [3, side, side]},
            dtype="float32",
            operations=2.0 * self.original.numel(),
            traffic=4.0 * self.original.numel(),
            error=self.error,
            error_kind="largest error of the applied weight, relative",
            tolerance=1e-6,
            details=self.details,
            stages=self.stages,
        )


def make_click(size: int, name: str, steps: int, backend: str) -> Problem:
    """From an edit to applied weights: `rc.rewrite(...).apply()`, the moment and its factor at hand, against the same
    with the reference's loop. The bare forward passes that it needs are beside it (and do not do the job: error 1)."""
    layer, latents, moment, mask = _stylegan2(size, name)
    side = len(mask)
    edit, click = _drawn(side), _Click(layer)

    def passes() -> None:
        for selection in edit.selections:
            layer.capture(latents[selection.index][None])

    def run(name: str, rounds: int | None = None, **how: Any) -> Contender:
        return click.contender(name, lambda: rewrite(layer, moment, edit, latents, **CLICK | how), rounds=rounds)

    loop = run("reference's loop", 1, solver=Projected(steps), backend="reference")
    alone = Contender("the generator's passes alone", passes, prepare=click._revert, aside=True)
    return click.problem(run("rewrite_core", backend=backend), [loop, alone], side)


def make_warm_click(size: int, name: str, backend: str) -> Problem:
    """The click in a session that has seen its pictures, with masks that are drawn at another place each time. The same
    edit again, and the free function, which runs the generator, are contenders."""
    layer, latents, moment, mask = _stylegan2(size, name)
    side = len(mask)
    session, moved, same, click = Session(layer, moment, latents), itertools.count(1), _drawn(side), _Click(layer)
    session.rewrite(same, **CLICK, backend=backend)  # its pictures are known from here on
    ours = click.contender("rewrite_core", lambda: session.rewrite(_drawn(side, next(moved)), **CLICK, backend=backend))
    again = click.contender("the same edit again", lambda: session.rewrite(same, **CLICK, backend=backend), aside=True)
    free = click.contender(
        "rc.rewrite, no session", lambda: rewrite(layer, moment, same, latents, **CLICK, backend=backend)
    )
    return click.problem(ours, [free, again], side)


def bench_edit(measure: Callable[[], None]) -> None:
    measure()
