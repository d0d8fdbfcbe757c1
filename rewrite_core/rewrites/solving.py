"""From goals to changes: the one way that every call of :mod:`.calls` goes.

keys of the context -> directions D;  goals -> regions of a problem;  solver -> Lambda;  Lambda D -> a Rewrite
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import Box
from ..clock import Clock, stage
from ..edits.directions import DIRECTIONS, context_directions
from ..edits.edit import Edit
from ..edits.goals import Goal
from ..edits.protection import Protect, Room, room_beside, weight_and_protected
from ..errors import NonFiniteError, RankError, SolverError, choice, flag, number, warn
from ..layers.bound import BoundLayer
from ..ops.finite import all_finite
from ..ops.losses import LOSSES
from ..solvers.adam import Adam
from ..solvers.base import Solver
from ..solvers.choice import solver_of
from ..solvers.lbfgs import LBFGS
from ..solvers.lm import LM
from ..solvers.problem import (
    Beyond,
    LayerProblem,
    LayerSolution,
    generic_second_moment,
    warn_of_no_use,
    warn_underdetermined,
)
from ..statistics.quantiles import UnitQuantiles, collect_unit_quantiles
from ..statistics.second_moment import SecondMoment
from ..waits import sent, supposing
from . import stack as stacks
from .arithmetic import plain_arithmetic
from .change import Fit, Rewrite
from .following import OBJECTIVES, ordinary
from .trust import Bound, Limited, hold_back

_GENERIC_IMAGES = 32  # ordinary images that the preserve term is estimated from
TOGETHER = 256 << 20  # bytes of keys and goals: once so many are there they are fitted, and let go
RANK = 4  # of a paste where none is asked for
PRESERVE = 1.0  # of ordinary pictures, where pictures are compared and nothing else is asked for
_VALUE_WEIGHT = 0.1  # of the values' distance beside that of pictures or activations: these leave a null space


@dataclasses.dataclass(frozen=True)
class Settings:
    """How changes are solved for: what all calls have in common. Checked as it is made.

    Raises:
        SolverError: no such solver, or one without the preserve term is given one.
        RewriteCoreError: no such directions or loss, or preserve is no weight.
    """

    rank: int | None = 1  # None: RANK, or as many directions as the context has
    directions: str = "whitened"
    loss: str = "l1"
    preserve: Any = 0.0  # a weight, and rc.Protect; afterwards the weight
    solver: str | Solver | None = None
    progress: bool = False
    backend: str = "auto"
    objective: str = "value"
    protected: tuple[Protect, ...] = ()
    trust: float | None = None

    def __post_init__(self) -> None:
        weight, protected = weight_and_protected(self.preserve)
        object.__setattr__(self, "preserve", weight or 0.0)
        object.__setattr__(self, "protected", (*self.protected, *protected))
        choice("directions", self.directions, DIRECTIONS)
        choice("loss", self.loss, LOSSES)
        choice("objective", self.objective, OBJECTIVES)
        flag("progress", self.progress)
        if self.trust is not None:
            number("trust", self.trust, above=0)
        if self.objective != "value" and not self.chosen.beyond:
            raise SolverError(
                f"Solver {self.chosen.name!r} compares values alone; use solver='lbfgs', or objective='value'.",
                advice={"solver": "lbfgs", "objective": "value"},
            )
        if self.preserve and not self.chosen.preserves:
            raise SolverError(
                f"Solver {self.chosen.name!r} has no preserve term; use 'lm' or 'adam', or preserve=0.",
                advice={"preserve": 0},
            )

    @classmethod
    def of_a_paste(cls, objective: str | None, preserve: Any, solver: str | Solver | None, **rest: Any) -> Settings:
        """With what was left open: pictures are compared where the solver can, and ordinary ones then count as much as
        the goal does."""
        if objective is None:
            objective = "pictures" if solver is None or solver_of(solver).beyond else "value"
        weight, protected = weight_and_protected(preserve)
        if weight is None:
            weight = 0.0 if objective == "value" else PRESERVE
        return cls(objective=objective, preserve=weight, solver=solver, protected=protected, **rest)

    @property
    def chosen(self) -> Solver:
        """The solver as an object; where none was named, what suits the objective."""
        if self.solver is None:
            return LM() if self.objective == "value" else LBFGS()
        return solver_of(self.solver)


@dataclasses.dataclass(frozen=True)
class Task:
    """One change that is wanted: what it should make of which regions, and where it may act."""

    goals: Callable[[], list[Goal]]
    context: Callable[[bool], tuple[Tensor, Tensor | None]]  # keys [n, I] and weights [n]; given: inside the masks only
    edit: Edit | None = None
    latents: Tensor | None = None  # [N, ...] that the edit selects from
    beyond: Callable[[], Beyond] | None = None  # the goal in what follows the layer, where that is the objective
    meets: bool = False  # to meet its goal exactly is the point, with as many unknowns as there are

    def known_edit(self) -> Edit | None:
        """The edit, knowing its latents again. Raises MismatchError where it knows other ones."""
        return None if self.edit is None or self.latents is None else self.edit.on(self.latents)

    def warn_of_latents(self) -> None:
        """Warn where it is not known whether the latents are those of the edit."""
        if self.edit is not None and self.latents is not None:
            self.edit.check(self.latents)


_Box = Box | tuple[Box, ...] | None  # that a problem is fitted in


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A problem that is not solved yet."""

    problem: LayerProblem
    task: Task
    box: _Box


@dataclasses.dataclass(frozen=True)
class _Solved:
    """What is kept of a problem once it is solved."""

    directions: Tensor
    solution: LayerSolution
    box: _Box
    limited: Limited | None


def solve(
    layer: BoundLayer, moment: SecondMoment, tasks: Sequence[Task], settings: Settings, latents: Tensor | None = None
) -> list[Rewrite]:
    """The change of each task, all solved against the weight as it is now, as many at once as take :data:`TOGETHER`.
    `latents` [N, ...] are those that edits select from; None where there are none. On a GPU the host waits twice, where
    all is as it should be, and once more for each task but the first."""
    return supposing(lambda: _solve(layer, moment, tasks, settings, latents))


def _solve(
    layer: BoundLayer, moment: SecondMoment, tasks: Sequence[Task], settings: Settings, latents: Tensor | None
) -> list[Rewrite]:
    solver = settings.chosen
    if isinstance(solver, LM) and not layer.known:
        warn(f"What {layer.name!r} does with its weight is not known, so its change is found by 'adam', by autograd.")
        solver = Adam()
    edits = [task.known_edit() for task in tasks]  # other latents are refused
    with Clock().running() as clock, plain_arithmetic(layer):
        with stage("check"):
            moment.check(layer, latents)
            fitted_to = layer.weight_as_it_is()
        quantiles = None
        if settings.directions == "units" and solver.reduced and latents is not None:
            with stage("directions"):
                quantiles = collect_unit_quantiles(layer, latents, progress=settings.progress)
        with stage("directions"):
            room = room_beside(layer, settings.protected, stacks.protected(layer))
        _check_room(layer, room, settings, solver)
        solved: list[_Solved] = []
        waiting: list[_Waiting] = []
        for number, task in enumerate(tasks, 1):
            with stage("goal"):
                goals = task.goals()
            with stage("directions"):
                directions = _directions(layer, moment, task, settings, solver, quantiles, room)
            problem = _problem(layer, moment, goals, directions, settings, latents)
            if room is not None:
                _check_style(problem, task)
            if task.beyond is not None:
                problem = _seen_beyond(problem, task, settings)
            elif solver.preserves and not task.meets:  # the others are baselines
                warn_underdetermined(problem)
            fitted = tuple(goal.box for goal in goals if goal.box is not None)
            waiting.append(_Waiting(problem, task, fitted if len(fitted) > 1 else fitted[0] if fitted else None))
            task.warn_of_latents()
            if number == len(tasks) or sum(each.problem.nbytes for each in waiting) >= TOGETHER:
                solved += _solved(solver, waiting, settings, moment, latents)
                waiting.clear()
                del problem, goals
        with stage("check"):
            fingerprint = fitted_to()
        return [
            _change(layer, own, fingerprint, edit, dict(clock.seconds), room)
            for edit, own in zip(edits, solved, strict=True)
        ]


def _solved(
    solver: Solver,
    waiting: Sequence[_Waiting],
    settings: Settings,
    moment: SecondMoment,
    latents: Tensor | None,
) -> list[_Solved]:
    """These problems, solved together and held back where they must be: what is kept of them."""
    problems = [each.problem for each in waiting]
    limits: list[Limited | None] = [None] * len(problems)
    with stage("fit"):
        bound = None
        if settings.trust is not None and solver.preserves:  # the others are baselines
            bound = Bound(problems[0].layer, moment, settings.trust)
        solutions = _solutions(solver, problems, settings, bound)
        if bound is not None and bound.passed is not False:
            limits = hold_back(
                problems[0].layer,
                moment,
                solver,
                problems,
                solutions,
                bound.trust,
                lambda some: _solutions(solver, some, settings),
                lambda i, problem, weight: _preserving(problem, waiting[i].task, weight, settings, moment, latents),
            )
    kept = []
    for each, problem, solution, limited in zip(waiting, problems, solutions, limits, strict=True):
        warn_of_no_use(problem, solution, whole=each.box is None)
        kept.append(_Solved(problem.directions, solution, each.box, limited))
    return kept


def _solutions(
    solver: Solver, problems: Sequence[LayerProblem], settings: Settings, bound: Bound | None = None
) -> list[LayerSolution]:
    """Those of one rank together. "lm" looks at the bound itself; a class made from it with a `solve` of its own, as
    any :class:`Solver` has it, does not."""
    looks = type(solver).solve is LM.solve
    more: dict[str, Any] = {"look": bound.look} if bound is not None and looks else {}
    found: dict[int, LayerSolution] = {}
    for rank in dict.fromkeys(len(problem.directions) for problem in problems):
        own = [i for i, problem in enumerate(problems) if len(problem.directions) == rank]
        solved = solver.solve([problems[i] for i in own], progress=settings.progress, backend=settings.backend, **more)
        found |= zip(own, solved, strict=True)
    return [found[i] for i in range(len(problems))]


def _directions(
    layer: BoundLayer,
    moment: SecondMoment,
    task: Task,
    settings: Settings,
    solver: Solver,
    quantiles: UnitQuantiles | None,
    room: Room | None,
) -> Tensor:
    """D [R, I]; for a solver that goes along none, every input channel, whatever the rank and the context."""
    if not solver.reduced:
        return torch.eye(layer.in_channels, device=layer.parameter.device)
    # GAN Dissection scores whole pictures: a unit at its maximum anywhere in them counts
    keys, weights = task.context(settings.directions != "units")
    own = moment.within_groups(layer.groups)
    if room is None:
        return _found(own, keys, weights, settings, quantiles)
    own, keys = room.inside(own, keys, settings.rank)
    found = _found(own, keys, weights, settings, quantiles)
    return found @ room.free.to(found)


def _found(
    moment: SecondMoment, keys: Tensor, weights: Tensor | None, settings: Settings, quantiles: UnitQuantiles | None
) -> Tensor:
    """As many directions as are asked for; where it is left open, up to RANK."""
    if settings.rank is not None:
        return context_directions(moment, keys, weights, settings.rank, settings.directions, quantiles)
    marked = len(keys) if weights is None else int((weights > 0).sum())
    most = 1 if settings.directions == "mean" else max(1, min(RANK, marked, moment.channels))
    for rank in range(most, 1, -1):
        with contextlib.suppress(RankError):  # the context spans fewer
            return context_directions(moment, keys, weights, rank, settings.directions, quantiles)
    return context_directions(moment, keys, weights, 1, settings.directions, quantiles)


def _check_room(layer: BoundLayer, room: Room | None, settings: Settings, solver: Solver) -> None:
    """Raises SolverError where what is protected could not be."""
    if room is None:
        return
    if not solver.reduced:
        raise SolverError(
            f"Solver {solver.name!r} changes the weight along every key, so it can protect none; use solver='lm'.",
            advice={"solver": "lm"},
        )
    if settings.directions == "units":
        raise SolverError(
            "Directions that are single units cannot avoid what is protected; use directions='whitened'.",
            advice={"directions": "whitened"},
        )


def _check_style(problem: LayerProblem, task: Task) -> None:
    """Raises SolverError where the layer's output depends on its weight in other ways than through the key."""
    layer, capture = problem.layer, None
    if problem.regions:
        capture = problem.regions[0][0]
    elif problem.beyond is not None:
        capture = problem.beyond.capture
    elif task.edit is not None and task.latents is not None:
        capture = layer.capture_each(task.latents[[task.edit.where[0].index]])
    operation = None if capture is None else layer.post_operation(capture)
    if operation is not None and operation.style is not None:
        raise SolverError(
            f"{layer.name!r} demodulates: its output changes everywhere with the size of its weight, so nothing can be "
            "protected exactly; use a weight, such as preserve=0.3.",
            advice={"preserve": 0.3},
        )


def _problem(
    layer: BoundLayer,
    moment: SecondMoment,
    goals: Sequence[Goal],
    directions: Tensor,
    settings: Settings,
    latents: Tensor | None,
) -> LayerProblem:
    near = goals[0].target if goals else None
    directions = directions.to(layer.parameter.device) if near is None else sent(directions, near.device, near.dtype)
    generic = None
    if settings.preserve and settings.objective == "value":
        generic = _generic(layer, directions, moment, latents)
    regions = tuple((goal.capture, goal.target) for goal in goals)
    return LayerProblem(layer, regions, directions, settings.loss, float(settings.preserve), generic)


def _generic(layer: BoundLayer, directions: Tensor, moment: SecondMoment, latents: Tensor | None) -> Tensor:
    with stage("preserve"):
        images = torch.empty(0) if latents is None else latents[:_GENERIC_IMAGES]
        own = moment.on(layer.parameter.device).within_groups(layer.groups)
        return generic_second_moment(layer, directions, images, own.blocks())


def _preserving(
    problem: LayerProblem,
    task: Task,
    weight: float,
    settings: Settings,
    moment: SecondMoment,
    latents: Tensor | None,
) -> LayerProblem:
    """The problem with another weight of leaving ordinary keys or pictures alone."""
    layer, directions = problem.layer, problem.directions
    if problem.beyond is None:
        generic = problem.generic if problem.generic is not None else _generic(layer, directions, moment, latents)
        return dataclasses.replace(problem, preserve=weight, generic=generic)
    kept = problem.ordinary
    if kept is None:
        assert task.edit is not None and task.latents is not None
        with stage("preserve"):
            kept = ordinary(layer, task.edit, task.latents, directions, settings.objective)
    return dataclasses.replace(problem, preserve=weight, ordinary=kept)


def _seen_beyond(problem: LayerProblem, task: Task, settings: Settings) -> LayerProblem:
    """The problem with its goal in what follows the layer; the values that it has count a little beside it."""
    assert task.beyond is not None and task.edit is not None and task.latents is not None
    with stage("goal"):
        beyond = task.beyond()
    kept = None
    if settings.preserve:
        with stage("preserve"):
            kept = ordinary(problem.layer, task.edit, task.latents, problem.directions, settings.objective)
    weight = _VALUE_WEIGHT if problem.regions else 0.0
    return dataclasses.replace(problem, beyond=beyond, ordinary=kept, value_weight=weight)


def _change(
    layer: BoundLayer,
    solved: _Solved,
    fitted_to: str,
    edit: Edit | None,
    seconds: dict[str, float],
    room: Room | None,
) -> Rewrite:
    """The change that a solution is, in float32 at least."""
    solution, coefficients = solved.solution, solved.solution.coefficients
    if not solution.finite and not all_finite(coefficients):
        raise NonFiniteError(
            f"The change of {layer.name!r} holds NaN or infinity; check the generator's weights at this layer."
        )
    dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
    kept = None if room is None else room.kept.to(dtype)
    return Rewrite(
        layer=layer.name,
        directions=solved.directions.to(dtype),
        coefficients=coefficients.to(dtype),
        fitted_to=fitted_to,
        solver=solution.solver,
        fit=Fit(
            solution.losses,
            solution.final_loss,
            solution.last_loss,
            solution.status,
            seconds,
            solved.box,
            kept,
            solved.limited,
        ),
        edit=edit,
        bound=layer,
    )
