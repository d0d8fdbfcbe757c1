"""Baselines to compare a rewrite with: not one layer's rank-R change, but the whole generator, fine-tuned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, NonFiniteError, RewriteCoreError, number, whole_number
from ..layers.fingerprints import Forward, plain_call
from ..layers.latents import check_latents, for_generator
from ..modes import repeatable
from ..progress import progress_bar

STOPS = (10, 25, 50, 100, 200)  # steps that a copy is kept of


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """A copy of a generator after so many steps. losses: of each step before it, the distance to the goal pictures."""

    generator: nn.Module
    steps: int
    losses: list[float]


def fine_tune(
    generator: nn.Module,
    latents: Tensor,
    goals: Tensor,
    *,
    ordinary: Tensor | None = None,
    preserve: float = 1.0,
    stops: Sequence[int] = STOPS,
    lr: float = 0.01,
    forward: Forward | None = None,
    progress: bool = False,
) -> list[FineTuned]:
    """All weights of a generator fine-tuned on goal pictures: what one would do without rewriting (paper, section 5).

    Adam on ``mean |G(latents) - goals| + preserve * mean |G(ordinary) - its pictures now|``, in eval mode; the steps of
    each parameter are in parts of its own root mean square. The generator itself is only read.

    Args:
        latents: [n, ...], those of the goal pictures.
        goals: pictures [n, C, *size] in the generator's own range, such as :func:`rewrite_core.preview` renders.
        ordinary: latents [m, ...] whose pictures should stay; None: there are none.
        preserve: their weight, at least 0.
        stops: numbers of steps; a copy is returned for each, so that the best can be chosen (early stopping).
        lr: Adam's learning rate in parts of a parameter's root mean square, above 0.
        forward: how the generator is called, as in :func:`rewrite_core.bind`.
        progress: show a bar.

    Raises:
        RewriteCoreError: goals of another shape than the pictures, or no parameters.
        NonFiniteError: the loss became NaN or infinite.
    """
    check_latents(latents)
    number("preserve", preserve, least=0)
    lr = number("lr", lr, above=0)
    ends = sorted({whole_number("each of stops", stop) for stop in stops})
    if not ends:
        raise ArgumentError("stops is a list of numbers of steps, at least one.")
    call, tuned = forward or plain_call, copy.deepcopy(generator).eval()

    def pictures(rows: Tensor) -> Tensor:
        with repeatable(tuned, ("fine_tune", id(call))):
            return call(tuned, for_generator(rows, tuned))

    with torch.no_grad():
        now = pictures(latents)
        if goals.shape != now.shape:
            raise RewriteCoreError(f"goals must be {list(now.shape)}, as the pictures are, not {list(goals.shape)}.")
        kept = None if ordinary is None or not preserve else pictures(ordinary)
    goals = goals.to(now)
    trained = [each for each in tuned.parameters() if each.is_floating_point() and each.numel()]
    if not trained:
        raise RewriteCoreError("The generator has no parameters to fine-tune.")
    for parameter in trained:
        parameter.requires_grad_(True)
    scales = [parameter.detach().double().square().mean().sqrt().item() for parameter in trained]
    groups = [{"params": [each], "lr": lr * (scale or 1.0)} for each, scale in zip(trained, scales)]
    optimiser, losses, found = torch.optim.Adam(groups), [], []
    with torch.enable_grad(), progress_bar(total=ends[-1], label="fine-tune", unit="step", show=progress) as bar:
        for step in range(1, ends[-1] + 1):
            distance = F.l1_loss(pictures(latents), goals)
            total = distance
            if kept is not None:
                assert ordinary is not None
                total = total + preserve * F.l1_loss(pictures(ordinary), kept)
            losses.append(distance.item())
            if not torch.isfinite(total):
                raise NonFiniteError("The loss of fine-tuning became NaN or infinite; lower lr.")
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            bar.update(1)
            if step in ends:
                found.append(FineTuned(_plain_copy(tuned), step, list(losses)))
    return found


def _plain_copy(tuned: nn.Module) -> nn.Module:
    for parameter in tuned.parameters():
        parameter.grad = None
    return copy.deepcopy(tuned).requires_grad_(False)
