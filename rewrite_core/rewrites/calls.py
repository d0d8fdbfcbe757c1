"""The public calls: pastes, erasures, insertions and zeroings, each a maker of goals for :func:`.solving.solve`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from ..adapters.base import Capture
from ..edits.directions import marked_keys
from ..edits.edit import Edit
from ..edits.goals import BLENDS, REGIONS, Goal, erase_goals, paste_goals
from ..edits.protection import Protect
from ..errors import (
    ArgumentError,
    NonFiniteError,
    RewriteCoreError,
    SelectionError,
    SolverError,
    choice,
    number,
    quoted,
)
from ..layers.bound import BoundLayer
from ..layers.latents import check_latents
from ..ops.finite import all_finite
from ..solvers.base import Solver
from ..solvers.problem import Beyond
from ..solvers.removal import Removal
from ..statistics.checks import check_keys
from ..statistics.second_moment import SecondMoment, check_inputs
from .change import Rewrite
from .following import goal_beyond, goal_pictures
from .solving import Settings, Task, solve
from .trust import TRUST

Preserve = float | Protect | Sequence[float | Protect]

REFERENCE: dict[str, Any] = {
    "rank": 1,
    "region": "box",
    "loss": "l1",
    "objective": "value",
    "preserve": 0.0,
    "trust": None,
    "solver": "projected",
}
"""The settings of the reference implementation, for :func:`rewrite` and :func:`rewrite_many`."""


def rewrite(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    rank: int | None = None,
    directions: str = "whitened",
    region: str = "map",
    blend: str = "mask",
    loss: str = "l2",
    preserve: Preserve | None = None,
    objective: str | None = "value",
    goal: Tensor | None = None,
    trust: float | None = TRUST,
    solver: str | Solver | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Solve one edit: the rank-R change of the layer that makes the pasted region come out as the copied one.

    The generator is not changed until ``change.apply()`` (paper, section 3; algorithm in appendix D). An edit with
    several pastes has one change that is fitted to all of them: the loss is the mean over the pixels of all. The
    defaults are what did best on three generators (docs, "Results"); the reference's own settings are
    ``rc.rewrite(layer, moment, edit, latents, **rc.REFERENCE)``. Where seconds do not matter try
    ``objective="pictures"``: it changes less that is unrelated.

    Args:
        layer: from :func:`rewrite_core.bind`.
        moment: second moment of that layer's keys.
        edit: copy, paste and context; its selections index the rows of `latents`.
        latents: [N, ...], the set the edit was made on.
        rank: R, 1 to the number of key channels; None: 4, or as many directions as the context has where these are
            fewer. "unconstrained" needs neither rank nor context.
        directions: how they are found, see :func:`rewrite_core.context_directions`.
        region: "map" fits the whole map, "box" the pasted box, zero-padded at its edge, as the reference does
            (SolverError where the layer cannot be run so: other padding than zeros, or map sizes that are no
            multiples).
        blend: "mask" composites through the copy's mask, "box" through its bounding box.
        loss: "l2" or "l1" (the reference's), the mean over what is compared.
        preserve: weight of leaving ordinary pictures alone. Where pictures or activations are compared: of their mean
            change in 16 pictures of the latents that hold nothing like the context, beside the distance to the goal,
            which counts 1; None is 1. Where values are compared: of the paper's L_smooth, the mean squared change of
            the values of ordinary images before the activation, at the demodulation that the unchanged weight has, for
            "lm", "lbfgs" and "adam"; None is 0, the reference's objective. Or :class:`rewrite_core.Protect`: keys or
            pictures that must not change at all; or a list of a weight and these. What rewrites protect that are on the
            layer is protected, too; ``change.remaining`` says how many directions were left.
        objective: what is compared with the goal. "pictures": what the generator paints, with the picture that the
            pasted value renders; the values' own distance counts a tenth beside it. "activation": what the next layer
            is given. "value": the layer's value, as the reference does. None: "pictures", or "value" for a solver that
            compares nothing else.
        goal: your own pictures in the place of a copy, [n, C, H, W] in the generator's range, one for each picture that
            the edit pastes into. For objective "pictures".
        trust: how much the change may change the layer's output on ordinary keys, as a share of that output. A fit of
            "lm", "lbfgs" or "adam" that passes it is fitted again with growing `preserve`, and scaled back where that
            is not enough; a TrustWarning and ``change.limited`` tell. None: no bound.
        solver: None is "lm" for values and "lbfgs" for the other objectives. "lm", "lbfgs", "projected" (the
            reference's algorithm), "adam" or "unconstrained"; or one with options of its own:
            :class:`rewrite_core.LM`, :class:`~rewrite_core.LBFGS`, :class:`~rewrite_core.Projected`,
            :class:`~rewrite_core.Adam`, :class:`~rewrite_core.Unconstrained`.
        progress: show bars of what takes long.
        backend: of the operations, see :func:`rewrite_core.explain`.

    Raises:
        MismatchError: the moment is of another layer or model.
        SelectionError: a selection is missing, or two pastes of one picture overlap.
        RankError: a rank that the context does not span, or nothing remains beside what is protected.
        MaskError, NonFiniteError, SolverError: as their names say.
    """
    return rewrite_many(
        layer,
        moment,
        [edit],
        latents,
        rank=rank,
        directions=directions,
        region=region,
        blend=blend,
        loss=loss,
        preserve=preserve,
        objective=objective,
        goal=None if goal is None else [goal],
        trust=trust,
        solver=solver,
        progress=progress,
        backend=backend,
    )[0]


@overload
def rewrite_many(
    layer: BoundLayer,
    moment: SecondMoment,
    edits: Iterable[Edit],
    latents: Tensor,
    *,
    rank: int | None = ...,
    directions: str = ...,
    region: str = ...,
    blend: str = ...,
    loss: str = ...,
    preserve: Preserve | None = ...,
    objective: str | None = ...,
    goal: Sequence[Tensor] | None = ...,
    trust: float | None = ...,
    solver: str | Solver | None = ...,
    progress: bool = ...,
    backend: str = ...,
) -> list[Rewrite]: ...


@overload
def rewrite_many(
    layer: Sequence[BoundLayer],
    moment: Sequence[SecondMoment],
    edits: Iterable[Edit],
    latents: Tensor,
    *,
    rank: int | None = ...,
    directions: str = ...,
    region: str = ...,
    blend: str = ...,
    loss: str = ...,
    preserve: Preserve | None = ...,
    objective: str | None = ...,
    goal: Sequence[Tensor] | None = ...,
    trust: float | None = ...,
    solver: str | Solver | None = ...,
    progress: bool = ...,
    backend: str = ...,
) -> list[list[Rewrite]]: ...


def rewrite_many(
    layer: BoundLayer | Sequence[BoundLayer],
    moment: SecondMoment | Sequence[SecondMoment],
    edits: Iterable[Edit],
    latents: Tensor,
    *,
    rank: int | None = None,
    directions: str = "whitened",
    region: str = "map",
    blend: str = "mask",
    loss: str = "l2",
    preserve: Preserve | None = None,
    objective: str | None = "value",
    goal: Sequence[Tensor] | None = None,
    trust: float | None = TRUST,
    solver: str | Solver | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> list[Rewrite] | list[list[Rewrite]]:
    """Solve several edits of one layer, each against the weight as it is now; "lm" fits as many at once as have 256 MiB
    of keys and goals, which then are let go: memory does not grow with the number of edits.

    Arguments and errors are those of :func:`rewrite`. ``change.seconds`` holds the times of the whole batch. Of several
    layers, a list of them with a list of their moments, the result is a list of such lists, in the order of the layers:
    every edit at every layer. Hundreds of edits, to be resumed after an interrupt, are what ``rewrite batch`` is for.
    """
    settings = Settings.of_a_paste(
        objective,
        preserve,
        solver,
        rank=rank,
        directions=directions,
        loss=loss,
        trust=trust,
        progress=progress,
        backend=backend,
    )
    choice("region", region, REGIONS)
    choice("blend", blend, BLENDS)
    edits = _checked(edits)

    painted = _goals(goal, edits, settings.objective)

    def solved(own: BoundLayer, statistics: SecondMoment) -> list[Rewrite]:
        tasks = [
            _paste(own, edit, latents, (region, blend, settings.objective), pictures)
            for edit, pictures in zip(edits, painted, strict=True)
        ]
        return solve(own, statistics, tasks, settings, latents)

    check_latents(latents)
    several = isinstance(layer, list | tuple)
    layers: Any = layer if several else [layer]
    moments: Any = moment if several else [moment]
    if not isinstance(moments, list | tuple) or len(moments) != len(layers) or not layers:
        raise ArgumentError("For several layers the moments are a list of as many, one for each in their order.")
    for own, statistics in zip(layers, moments):
        check_inputs(own, statistics)
    changes = [solved(own, statistics) for own, statistics in zip(layers, moments)]
    return changes if several else changes[0]


def erase(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    units: int = 30,
    rank: int = 1,
    directions: str = "whitened",
    region: str = "map",
    loss: str = "l1",
    preserve: Preserve = 0.0,
    trust: float | None = TRUST,
    solver: str | Solver | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> Rewrite:
    """Solve an erasure: the pasted region should come out as if the `units` key channels most typical of the
    context were silent. Needs a paste, not a copy; otherwise like :func:`rewrite`, but for `region`: the reference
    fits an erasure on the whole map, so that is the default. ``change.edit`` has no copy."""
    settings = Settings(rank, directions, loss, preserve, solver, progress, backend, trust=trust)
    choice("region", region, REGIONS)
    check_inputs(layer, moment)
    check_latents(latents)
    _checked([edit])
    goals = partial(erase_goals, layer, moment, edit, latents, units, region)
    task = _task(layer, edit.without_copy(), latents, goals)
    return solve(layer, moment, [task], settings, latents)[0]


def zero(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    latents: Tensor,
    *,
    rank: int = 1,
    directions: str = "whitened",
    amount: float = 0.0,
) -> Rewrite:
    """The change that removes the weight's projection on the context's directions: ``Lambda = -W0 D^T``.

    `amount` adds that multiple of the projection of an all-ones weight in its place, as in the reference.
    """
    settings = Settings(rank, directions, solver=Removal(number("amount", amount)))
    check_inputs(layer, moment)
    check_latents(latents)
    _checked([edit])
    return solve(layer, moment, [_task(layer, edit.without_copy(), latents, list)], settings, latents)[0]


def insert(
    layer: BoundLayer,
    moment: SecondMoment,
    keys: Tensor,
    values: Tensor,
    *,
    context: Tensor | None = None,
    weights: Tensor | None = None,
    rank: int = 1,
    directions: str = "whitened",
    loss: str = "l2",
    preserve: Preserve = 0.0,
    solver: str | Solver | None = None,
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
        directions, loss, preserve, solver, progress, backend: those of :func:`rewrite`; "lm" is exact for "l2".
            `preserve` needs a linear or 1x1 layer's second moment and nothing else.

    Raises:
        SolverError: the layer's output at a position depends on more than the key there.
        RewriteCoreError: shapes that do not fit. MismatchError, RankError, NonFiniteError: as their names say.
    """
    settings = Settings(rank, directions, loss, preserve, solver, progress, backend)
    check_inputs(layer, moment)
    for name, rows, channels in (("keys", keys, layer.in_channels), ("values", values, layer.out_channels)):
        check_keys(rows, name)
        if rows.ndim != 2 or rows.shape[1] != channels or len(rows) != len(keys) or len(rows) == 0:
            raise RewriteCoreError(f"{name} must be rows [{len(keys)}, {channels}], not {list(rows.shape)}.")
        if not all_finite(rows):
            raise NonFiniteError(f"The {name} hold NaN or infinity.")
    if not layer.pointwise:
        raise SolverError(
            f"{layer.name!r} does not compute its value from one key vector (it has a kernel, a stride, padding or a "
            "style); use rc.rewrite with selections there, or insert at a linear or 1x1 layer."
        )

    def goals() -> list[Goal]:
        dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
        axes = [1] * (len(layer.kernel_size) - 1)  # the rows are the positions of a map
        key, value = (
            rows.detach().to(layer.parameter.device, dtype).T.reshape(1, rows.shape[1], -1, *axes)
            for rows in (keys, values)
        )
        return [Goal(Capture(key), value, None)]

    task = Task(goals, lambda inside_only: (keys if context is None else context, weights), meets=True)
    return solve(layer, moment, [task], settings)[0]


def _paste(layer: BoundLayer, edit: Edit, latents: Tensor, how: tuple[str, str, str], pictures: Tensor | None) -> Task:
    """A paste by (region, blend, objective), or where there are goal pictures, these."""
    region, blend, objective = how
    if pictures is not None:
        beyond = partial(goal_pictures, layer, edit, latents, pictures)
        return dataclasses.replace(_task(layer, edit, latents, list), beyond=beyond)
    task = _task(layer, edit, latents, partial(paste_goals, layer, edit, latents, region, blend))
    if objective == "value":
        return task

    def follows() -> Beyond:
        return goal_beyond(layer, edit, latents, paste_goals(layer, edit, latents, "map", blend), objective)

    return dataclasses.replace(task, beyond=follows)


def _goals(goal: Sequence[Tensor] | None, edits: list[Edit], objective: str) -> Sequence[Tensor | None]:
    """The goal pictures of each edit, or None for each."""
    if goal is None:
        return [None] * len(edits)
    if objective != "pictures":
        raise RewriteCoreError(
            f"goal= is pictures, and objective={objective!r} does not compare them; use objective='pictures'.",
            advice={"objective": "pictures"},
        )
    if not isinstance(goal, Sequence) or len(goal) != len(edits):
        raise ArgumentError(f"goal must be a list of {len(edits)} tensors of pictures, one for each edit.")
    return goal


def _task(layer: BoundLayer, edit: Edit, latents: Tensor, goals: Callable[[], list[Goal]]) -> Task:
    """An edit's: it acts where the edit marks context."""
    return Task(goals, lambda inside_only: marked_keys(layer, edit.where, latents, inside_only), edit, latents)


def _checked(edits: Iterable[Edit]) -> list[Edit]:
    if isinstance(edits, Edit):
        raise SelectionError("rewrite_many takes a list of edits, not one Edit; use rc.rewrite for one.")
    if not isinstance(edits, Iterable):
        raise ArgumentError(f"rewrite_many takes a list of rc.Edit, not {quoted(edits)}.")
    edits = list(edits)
    if not edits:
        raise SelectionError("There is no edit to make; give at least one.")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise SelectionError(f"An edit is an rc.Edit (rc.Edit.load reads a file), not {type(edit).__name__}.")
    return edits
