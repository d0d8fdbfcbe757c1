"""Rewriting: turn an edit into a rank-R change of one layer's weight."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..adapters.base import Capture
from ..edits.directions import context_directions, context_keys
from ..edits.edit import Edit
from ..edits.goals import erase_goals, paste_goals
from ..errors import NonFiniteError, RewriteCoreError, SelectionError, SolverError, UnderdeterminedWarning, warn
from ..layers.binding import BoundLayer
from ..solvers.lm import solve_lm
from ..solvers.problem import LOSSES, SOLVERS, Problem, generic_second_moment
from ..solvers.stepwise import solve_adam, solve_projected, solve_unconstrained
from ..statistics.checks import check_inputs, check_keys
from ..statistics.moments import SecondMoment
from ..statistics.quantiles import UnitQuantiles, collect_unit_quantiles
from .change import Rewrite

_GENERIC_IMAGES = 32  # ordinary images that the preserve term is estimated from


class _Clock:
    """Wall time by stage; a stage within a stage counts for itself alone."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inner = 0.0  # what the open stage spent in others

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner
            self._inner = outer + took

    def watch(self, layer: BoundLayer) -> BoundLayer:
        """The same layer, whose forward passes of the generator are a stage of their own."""
        watched = copy.copy(layer)

        def capture(latents: Tensor) -> Capture:
            with self.stage("generator"):
                return layer.capture(latents)

        watched.capture = capture
        return watched


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    """Float32 products on a GPU are of whole numbers, not of their first ten bits, which would move coefficients by 3e-3.

    By the older names, which every torch has and generators' own code reads: these, but not the newer ones, can be read
    whichever were set. Only where the caller's own newer settings have no older name are the newer used."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    old, new = [(matmul, "allow_tf32"), (cudnn, "allow_tf32")], []
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and newer
        new = [(matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")]

    def read(places: list) -> list:
        return [getattr(*place) for place in places]

    def write(places: list, values: list) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.9 finds the older names old
            for place, value in zip(places, values, strict=True):
                setattr(*place, value)

    precise = read(new)
    try:
        allowed = read(old)
    except RuntimeError:
        old, allowed = [], []
    try:
        write(old or new, [False, False] if old else ["ieee", "ieee"])
        yield
    finally:
        write(old, allowed)
        write(new, precise)  # the older names cannot say "none", what was never set


@contextlib.contextmanager
def _plain_arithmetic(layer: BoundLayer) -> Iterator[None]:
    """Whatever modes the caller is in: no autocast and no TF32, which would round what is solved for, and no inference
    mode, whose tensors autograd refuses. The generator's own forward function may still set its own."""
    with contextlib.ExitStack() as modes:
        if layer.parameter.device.type == "cuda":
            modes.enter_context(_no_tf32())
        for kind in {"cpu", layer.parameter.device.type}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        yield


def _checked(edits: Iterable[Edit]) -> list[Edit]:
    if isinstance(edits, Edit):
        raise SelectionError("rewrite_many takes a list of edits, not one Edit; use rc.rewrite for one.")
    edits = list(edits)
    if not edits:
        raise SelectionError("There is no edit to make; give at least one.")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise SelectionError(f"An edit is an rc.Edit (rc.Edit.load reads a file), not {type(edit).__name__}.")
    return edits


def _directions(layer, moment, edit, latents, rank, method, quantiles: UnitQuantiles | None) -> Tensor:
    # GAN Dissection scores whole pictures: a unit at its maximum anywhere in them counts
    keys, weights = context_keys(layer, edit.keys, latents, inside_only=method != "units")
    moment = moment.within_groups(layer.groups)
    return context_directions(moment, keys, weights, rank=rank, method=method, quantiles=quantiles)


def _quantiles(layer, latents, method, progress) -> UnitQuantiles | None:
    return collect_unit_quantiles(layer, latents, progress=progress) if method == "units" else None


def _change(
    layer: BoundLayer, edit: Edit | None, directions: Tensor, coefficients: Tensor, fitted_to: str, **details
) -> Rewrite:
    """The change of `layer`, in float32 at least."""
    if not torch.isfinite(coefficients).all():
        raise NonFiniteError(
            f"The change of {layer.name!r} holds NaN or infinity; check the generator's weights at this layer."
        )
    dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
    return Rewrite(
        layer=layer.name,
        directions=directions.to(dtype),
        coefficients=coefficients.to(dtype),
        fitted_to=fitted_to,
        edit=edit,
        bound=layer,
        **details,
    )


def _solve_goals(
    layer,
    moment,
    edits,
    latents,
    make_goals,
    *,
    rank,
    solver,
    loss,
    method,
    preserve,
    steps,
    lr,
    project_every,
    project_gradient,
    progress,
    backend,
) -> list[Rewrite]:
    if solver not in SOLVERS:
        raise SolverError(f"There is no solver {solver!r}; choose from {list(SOLVERS)}.")
    if loss not in LOSSES:
        raise SolverError(f"There is no loss {loss!r}; choose from {list(LOSSES)}.")
    if not isinstance(preserve, (int, float)) or not 0 <= preserve < float("inf"):
        raise RewriteCoreError(f"preserve is a finite weight of 0 or more, not {preserve!r}.")
    check_inputs(layer, moment, latents)
    edits = _checked(edits)
    if solver == "lm" and not layer.known:
        warn(
            f"What {layer.name!r} does with its weight is not known, so its change is found by 'adam', through autograd."
        )
        solver = "adam"
    clock = _Clock()
    problems, boxes = [], []
    bound, layer = layer, clock.watch(layer)
    with _plain_arithmetic(layer):
        with clock.stage("check"):
            moment.check(bound, latents)
        if solver == "unconstrained":  # no directions: all input channels, whatever the rank and the context
            rows = torch.eye(layer.in_channels, device=layer.parameter.device)
        else:
            with clock.stage("directions"):
                quantiles = _quantiles(layer, latents, method, progress)
        for edit in edits:
            with clock.stage("goal"):
                goal, *more = make_goals(layer, edit)
            if solver != "unconstrained":
                with clock.stage("directions"):
                    rows = _directions(layer, moment, edit, latents, rank, method, quantiles)
            directions, generic = rows.to(goal.target), None
            if preserve and solver in ("lm", "adam"):  # the others refuse it
                with clock.stage("preserve"):
                    sample = latents[:_GENERIC_IMAGES]
                    generic = generic_second_moment(layer, directions, sample, moment.matrix())
            boxes.append(tuple(each.box for each in (goal, *more)) if more and goal.box else goal.box)
            problems.append(
                Problem(
                    layer,
                    goal.capture,
                    goal.target,
                    directions,
                    loss,
                    float(preserve),
                    generic,
                    tuple((each.capture, each.target) for each in more),
                )
            )
        with clock.stage("fit"):
            if solver == "lm":
                solutions = solve_lm(problems, backend)
            elif solver == "adam":
                solutions = [solve_adam(problem, steps, lr, progress) for problem in problems]
            elif solver == "projected":
                solutions = [
                    solve_projected(problem, steps, lr, project_every, project_gradient, progress, backend)
                    for problem in problems
                ]
            else:
                solutions = [solve_unconstrained(problem, steps, lr, progress, backend) for problem in problems]
        with clock.stage("check"):
            fitted_to = bound.weight_fingerprint(bound.weight)
        return [
            _change(
                bound,
                edit,
                problem.directions,
                solution.coefficients,
                fitted_to,
                solver=solution.solver,
                losses=solution.losses,
                final_loss=solution.final_loss,
                status=solution.status,
                seconds=dict(clock.seconds),
                box=box,
            )
            for edit, box, problem, solution in zip(edits, boxes, problems, solutions, strict=True)
        ]


def rewrite_many(
    layer: BoundLayer,
    moment: SecondMoment,
    edits: Sequence[Edit],
    latents: Tensor,
    *,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l1",
    method: str = "whitened",
    preserve: float = 0.0,
    tight: bool = True,
    alpha: bool = True,
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: bool = False,
    backend: str = "auto",
) -> list[Rewrite]:
    """Solve several edits of one layer, each against the weight as it is now; "lm" fits them in one batch.

    Arguments and errors are those of :func:`rewrite`. ``change.seconds`` holds the times of the whole batch.
    """
    return _solve_goals(
        layer,
        moment,
        edits,
        latents,
        lambda layer, edit: paste_goals(layer, edit, latents, tight, alpha),
        rank=rank,
        solver=solver,
        loss=loss,
        method=method,
        preserve=preserve,
        steps=steps,
        lr=lr,
        project_every=project_every,
        project_gradient=project_gradient,
        progress=progress,
        backend=backend,
    )


def rewrite(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l1",
    method: str = "whitened",
    preserve: float = 0.0,
    tight: bool = True,
    alpha: bool = True,
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Solve one edit: the rank-R change of the layer that makes the pasted region come out as the copied one.

    The generator is not changed until ``change.apply()`` (paper, section 3; algorithm in appendix D). An edit with
    several pastes has one change that is fitted to all of them: the loss is the mean over the pixels of all.

    Args:
        layer: from :func:`rewrite_core.bind`.
        moment: second moment of that layer's keys.
        edit: copy, paste and context; its selections index the rows of `latents`.
        latents: [N, ...], the set the edit was made on.
        rank: R, 1 to the number of key channels. "unconstrained" needs neither rank nor context.
        solver: "lm" (default), "projected" (the reference's algorithm), "adam", or "unconstrained".
        loss: "l1" (the reference's) or "l2", the mean over the region.
        method: how directions are found, see :func:`rewrite_core.context_directions`.
        preserve: weight of the paper's L_smooth, the mean squared change that the rewrite makes to the values of
            ordinary images before the activation, at the demodulation that the unchanged weight has; 0 is the
            reference's objective. For "lm" and "adam".
        tight: fit the pasted box, zero-padded at its edge, as the reference does; else the whole map. SolverError
            where the layer cannot be run so: other padding than zeros, or map sizes that are no multiples.
        alpha: composite through the copy's mask; else its bounding box.
        steps, lr, project_every, project_gradient: for the stepwise solvers.

    Raises:
        MismatchError: the moment is of another layer or model.
        SelectionError: a selection is missing, or two pastes of one picture overlap.
        MaskError, RankError, NonFiniteError, SolverError: as their names say.
    """
    return rewrite_many(
        layer,
        moment,
        [edit],
        latents,
        rank=rank,
        solver=solver,
        loss=loss,
        method=method,
        preserve=preserve,
        tight=tight,
        alpha=alpha,
        steps=steps,
        lr=lr,
        project_every=project_every,
        project_gradient=project_gradient,
        progress=progress,
        backend=backend,
    )[0]


def erase(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    units: int = 30,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l1",
    method: str = "whitened",
    preserve: float = 0.0,
    tight: bool = False,
    steps: int = 2001,
    lr: float = 0.05,
    project_every: int = 10,
    project_gradient: bool = False,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Solve an erasure: the pasted region should come out as if the `units` key channels most typical of the
    context were silent. Needs a paste, not a copy; otherwise like :func:`rewrite`, but for `tight`: the reference
    fits an erasure on the whole map, so that is the default."""
    return _solve_goals(
        layer,
        moment,
        [edit],
        latents,
        lambda layer, edit: erase_goals(layer, moment, edit, latents, units, tight),
        rank=rank,
        solver=solver,
        loss=loss,
        method=method,
        preserve=preserve,
        steps=steps,
        lr=lr,
        project_every=project_every,
        project_gradient=project_gradient,
        progress=progress,
        backend=backend,
    )[0]


def insert(
    layer: BoundLayer,
    moment: SecondMoment,
    keys: Tensor,
    values: Tensor,
    *,
    context: Tensor | None = None,
    weights: Tensor | None = None,
    rank: int = 1,
    solver: str = "lm",
    loss: str = "l2",
    method: str = "whitened",
    preserve: float = 0.0,
    steps: int = 2001,
    lr: float = 0.05,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Insert key -> value pairs directly (paper, eq. 6 to 9), without pictures: the rank-R change of a linear or 1x1
    layer that makes its output at `keys` come out as `values`. The language-model case: keys and values are vectors at
    tokens.

    Args:
        keys: rows [n, I], such as ``layer.keys(z)[0].T[positions]``.
        values: rows [n, O], what the layer should put out there, bias included.
        context: rows [m, I] that say where the rule applies, reduced to `rank` directions; by default `keys`.
        weights: of the rows that directions are made of, [m]; default 1.
        rank: R. With rank n, or with n = 1, and independent keys the values are met exactly.
        solver: "lm" (exact for "l2") or "adam". The others are those of :func:`rewrite`; preserve needs a linear or 1x1
            layer's second moment and nothing else.

    Raises:
        SolverError: the layer's output at a position depends on more than the key there.
        RewriteCoreError: shapes that do not fit. MismatchError, RankError, NonFiniteError: as their names say.
    """
    if solver not in ("lm", "adam"):
        raise SolverError(f"insert has the solvers 'lm' and 'adam', not {solver!r}.")
    if loss not in LOSSES:
        raise SolverError(f"There is no loss {loss!r}; choose from {list(LOSSES)}.")
    check_inputs(layer, moment)
    for name, rows in (("keys", keys), ("values", values)):
        check_keys(rows, name)
    if not layer._layer.pointwise:
        raise SolverError(
            f"{layer.name!r} does not compute its value from one key vector (it has a kernel, a stride, padding or a "
            "style); use rc.rewrite with selections there, or insert at a linear or 1x1 layer."
        )
    clock = _Clock()
    with _plain_arithmetic(layer):
        moment.check(layer)
        for name, rows, channels in (("keys", keys, layer.in_channels), ("values", values, layer.out_channels)):
            if rows.ndim != 2 or rows.shape[1] != channels or len(rows) != len(keys) or len(rows) == 0:
                raise RewriteCoreError(f"{name} must be rows [{len(keys)}, {channels}], not {list(rows.shape)}.")
            if not torch.isfinite(rows).all():
                raise NonFiniteError(f"The {name} hold NaN or infinity.")
        with clock.stage("directions"):
            own = moment.within_groups(layer.groups)
            rows = context_directions(own, keys if context is None else context, weights, rank=rank, method=method)
        dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
        place = {"device": layer.parameter.device, "dtype": dtype}
        axes = [1] * (len(layer.kernel_size) - 1)
        maps = [part.detach().to(**place).T.reshape(1, part.shape[1], -1, *axes) for part in (keys, values)]
        directions, generic = rows.to(**place), None
        if preserve:
            generic = generic_second_moment(layer, directions, keys[:0], moment.matrix())
        problem = Problem(layer, Capture(maps[0]), maps[1], directions, loss, float(preserve), generic)
        with clock.stage("fit"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnderdeterminedWarning)  # to meet the values is the point here
            solution = solve_lm([problem], backend)[0] if solver == "lm" else solve_adam(problem, steps, lr, progress)
        with clock.stage("check"):
            fitted_to = layer.weight_fingerprint(layer.weight)
        return _change(
            layer,
            None,
            directions,
            solution.coefficients,
            fitted_to,
            solver=solution.solver,
            losses=solution.losses,
            final_loss=solution.final_loss,
            status=solution.status,
            seconds=dict(clock.seconds),
        )


def zero(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    rank: int = 1,
    amount: float = 0.0,
    method: str = "whitened",
) -> Rewrite:
    """The change that removes the weight's projection on the context's directions: ``Lambda = -W0 D^T``.

    `amount` adds that multiple of the projection of an all-ones weight in its place, as in the reference.
    """
    check_inputs(layer, moment, latents)
    _checked([edit])
    if not math.isfinite(amount):
        raise RewriteCoreError(f"amount is a finite multiple of the projection, not {amount}.")
    clock = _Clock()
    with _plain_arithmetic(layer):
        with clock.stage("check"):
            moment.check(layer, latents)
            fitted_to = layer.weight_fingerprint(layer.weight)
        with clock.stage("directions"):
            watched = clock.watch(layer)
            quantiles = _quantiles(watched, latents, method, progress=False)
            rows = _directions(watched, moment, edit, latents, rank, method, quantiles)
        weight = layer.weight.double()
        change = amount * torch.ones_like(weight) - weight
        rows = rows.to(weight.device)
        parts = zip(change.chunk(layer.groups), rows.chunk(layer.groups, 1))
        coefficients = torch.cat(
            [  # a group has its own part of the directions, orthonormal where it is all of them
                torch.einsum("oi...,ir->or...", part.unflatten(1, (layer.groups, -1))[:, j], torch.linalg.pinv(own))
                for j, (part, own) in enumerate(parts)
            ]
        )
        return _change(layer, edit, rows, coefficients, fitted_to, solver="zero", seconds=clock.seconds)
