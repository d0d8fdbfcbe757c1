"""The three rules the demo changes, one of them the other way round, and how well a changed generator follows them.

The world's renderer is known, so the outcome is measured against ground truth: every unseen scene has
its true render, its counterfactual render under the new rule, and the exact region where they differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from .world import Scene, region, render, scene_from_latents


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule change: which scenes it concerns, and how they look under it."""

    name: str
    title: str
    concerns: Callable[[Scene], Tensor]  # bool [N]
    change: dict  # the factors that change, for Scene.replace


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("spire", "dome to spire", lambda scene: scene.roof == 0, {"roof": 2}),
        Rule("watermark", "remove the watermark", lambda scene: scene.watermark, {"watermark": False}),
        Rule("reflection", "lit windows no longer light the ground", lambda scene: scene.lit, {"glow": False}),
    )
}


_GLOW = Rule("glow", "dark windows light the ground", lambda scene: ~scene.lit, {"glow": True})
INVERSES: dict[str, Rule] = {_GLOW.name: _GLOW}
"""Of "reflection": windows throw light exactly where they did not. No part of the demo."""


@dataclasses.dataclass(frozen=True)
class SceneScores:
    """What :func:`score` takes the means of. followed (bool), followed_before (bool), completed, collateral: [n], of
    each scene that the rule concerns; collateral_unrelated: [m], of each other one."""

    followed: Tensor
    followed_before: Tensor
    completed: Tensor
    collateral: Tensor
    collateral_unrelated: Tensor


@dataclasses.dataclass(frozen=True)
class Score:
    """How a changed generator follows a rule on unseen scenes.

    efficacy: share of the scenes the rule concerns whose edited region is nearer, in L1, to the counterfactual
        render than to the original one.
    efficacy_before: the same for the unchanged generator: what the metric says when nothing was done.
    completed: mean of ``1 - |edited - counterfactual| / |original - counterfactual|`` in the region.
    collateral: mean absolute change outside the region, on those scenes, 0..1 scale.
    collateral_unrelated: mean absolute change of the whole image on scenes the rule does not concern.
    """

    efficacy: float
    efficacy_before: float
    completed: float
    collateral: float
    collateral_unrelated: float
    scenes: int
    scenes_unrelated: int


def score(rule: Rule, before: Tensor, after: Tensor, latents: Tensor) -> Score:
    """Judge images `after` the change against images `before` it; both [N, 3, 64, 64] of `latents`, in 0..1."""
    each = scene_scores(rule, before, after, latents)
    return Score(
        efficacy=each.followed.float().mean().item(),
        efficacy_before=each.followed_before.float().mean().item(),
        completed=each.completed.mean().item(),
        collateral=each.collateral.mean().item(),
        collateral_unrelated=each.collateral_unrelated.mean().item(),
        scenes=len(each.followed),
        scenes_unrelated=len(each.collateral_unrelated),
    )


def scene_scores(rule: Rule, before: Tensor, after: Tensor, latents: Tensor) -> SceneScores:
    """:func:`score`, scene by scene."""
    scene = scene_from_latents(latents)
    mine = rule.concerns(scene)
    target = scene[mine]
    truth, wanted = render(target), render(target.replace(**rule.change))
    mask = region(truth, wanted)[:, None]
    to_wanted = _mean_inside((after[mine] - wanted).abs(), mask)
    to_truth = _mean_inside((after[mine] - truth).abs(), mask)
    before_wanted = _mean_inside((before[mine] - wanted).abs(), mask)
    before_truth = _mean_inside((before[mine] - truth).abs(), mask)
    gap = _mean_inside((truth - wanted).abs(), mask)
    change = (after - before).abs()
    return SceneScores(
        followed=to_wanted < to_truth,
        followed_before=before_wanted < before_truth,
        completed=1 - to_wanted / gap,
        collateral=_mean_inside(change[mine], ~mask),
        collateral_unrelated=change[~mine].mean((1, 2, 3)),
    )


def _mean_inside(values: Tensor, mask: Tensor) -> Tensor:
    """Per-scene mean of values [N, 3, H, W] where mask [N, 1, H, W] holds."""
    return (values * mask).sum((1, 2, 3)) / (values.shape[1] * mask.sum((1, 2, 3)))
