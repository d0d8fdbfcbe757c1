"""Goals beyond the layer: the pictures, or the next activation, that should follow from its value."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..edits.directions import context_keys
from ..edits.edit import Edit
from ..edits.goals import Goal
from ..errors import ArgumentError, NonFiniteError, RewriteCoreError, SelectionError
from ..layers.bound import BoundLayer
from ..layers.replay import Record, record
from ..ops.finite import all_finite
from ..solvers.problem import Beyond

OBJECTIVES = ("value", "activation", "pictures")  # what is compared with the goal
ORDINARY = 16  # pictures that should stay as they are
_LOOKED_AT = 128  # of which these are chosen
_MATCHES = 0.5  # of what the context's own keys have along the directions


def pasted_rows(edit: Edit) -> list[int]:
    """The pictures that an edit pastes into, in its order, each once."""
    return list(dict.fromkeys(paste.index for paste in edit.pastes))


def goal_pictures(layer: BoundLayer, edit: Edit, latents: Tensor, goal: Tensor) -> Beyond:
    """The goal that a user painted: pictures [n, C, *size] in the generator's range, one for each picture that the edit
    pastes into.

    Raises ArgumentError for anything but a tensor, RewriteCoreError for another shape, NonFiniteError, and
    SelectionError where the edit pastes nowhere.
    """
    if not isinstance(goal, Tensor):
        raise ArgumentError(f"goal must be a tensor of pictures [n, C, H, W], not {type(goal).__name__}.")
    if not edit.pastes:
        raise SelectionError("This edit has no paste selection, which says whose picture the goal is; add one.")
    rows = pasted_rows(edit)
    kept = _recorded(layer, latents[rows])
    if goal.shape != kept.images.shape:
        raise RewriteCoreError(
            f"goal must be {list(kept.images.shape)}, a picture for each of the pictures {rows} that the edit pastes "
            f"into, not {list(goal.shape)}."
        )
    if not goal.is_floating_point() or not all_finite(goal):
        raise NonFiniteError("goal must hold finite floating-point numbers in the range of the generator's images.")
    return _beyond(layer, latents[rows], kept, "pictures", goal)


def goal_beyond(layer: BoundLayer, edit: Edit, latents: Tensor, goals: Sequence[Goal], objective: str) -> Beyond:
    """What follows from the target values of whole maps, one for each picture that the edit pastes into."""
    rows = pasted_rows(edit)
    kept = _recorded(layer, latents[rows])
    with torch.no_grad():
        target = kept.follow(torch.cat([goal.target for goal in goals]), objective)
    return _beyond(layer, latents[rows], kept, objective, target)


def _recorded(layer: BoundLayer, latents: Tensor) -> Record:
    """A record of these latents. Raises RewriteCoreError where there can be none, and names the way out."""
    try:
        return record(layer, latents)
    except RewriteCoreError as error:
        raise RewriteCoreError(
            f"Pictures cannot be compared; use objective='value'. {error}", advice={"objective": "value"}
        ) from error


def _beyond(layer: BoundLayer, latents: Tensor, kept: Record, objective: str, target: Tensor) -> Beyond:
    capture = layer.capture_each(latents)
    dtype = torch.promote_types(capture.key.dtype, torch.float32)
    return Beyond(
        capture.to_dtype(dtype),
        functools.partial(kept.follow, to=objective),
        target.detach().to(capture.key.device, torch.promote_types(target.dtype, torch.float32)),
    )


def ordinary(layer: BoundLayer, edit: Edit, latents: Tensor, directions: Tensor, objective: str) -> Beyond:
    """Pictures that should stay as they are: the first of the latents that hold nothing like the context.

    A picture matches where a key has, along the directions D, half of what the context's keys have: |D k| of at least
    half their mean.
    """
    rows = directions.to(layer.parameter.device)
    keys, weights = context_keys(layer, edit.where, latents)
    weights = weights.to(rows)
    own = ((keys.to(rows) @ rows.T).norm(dim=1) * weights).sum() / weights.sum()
    strongest = [
        torch.einsum("ri,ni...->nr...", rows, layer.keys(batch).to(rows)).norm(dim=1).flatten(1).amax(1)
        for batch in latents[:_LOOKED_AT].split(ORDINARY)
    ]
    order = torch.cat(strongest)
    free = (order < _MATCHES * own).nonzero()[:, 0]
    chosen = free[:ORDINARY] if len(free) >= ORDINARY else order.argsort(stable=True)[:ORDINARY]
    some = latents[chosen.sort().values.to(latents.device)]
    kept = _recorded(layer, some)
    with torch.no_grad():
        target = kept.images if objective == "pictures" else kept.follow(layer.values(some), objective)
    return _beyond(layer, some, kept, objective, target)
