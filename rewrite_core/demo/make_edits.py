"""Make the demo edits: ``python -m rewrite_core.demo.make_edits DIR``.

What a user of the interface does, written down: leaf through the generated pictures, pass over those that came out
unclear, find two that differ in little but the rule, lasso the patch in one, paste it in the other, and lasso the same
thing in a few more pictures for context. Only pictures and masks go into the JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..demo import chapels
from ..edits.edit import Edit
from ..edits.selection import Selection
from ..layers.latents import sample_latents
from ..pictures import paint
from .rules import INVERSES, RULES, Rule
from .run import EDIT_LATENTS, EDIT_SEED
from .world import LATENT_SIZE, Scene, region, render, scene_from_latents

# pixels by which the hand stays outside the shape: generous where the edited map is coarse, so that every feature
# that belongs to the roof is copied with it
_LASSO = {"spire": 6, "watermark": 2, "reflection": 2, "glow": 2}
_CONTEXTS = 5

# what the copied picture shows in place of what the rule changes
_SOURCES: dict[str, tuple[Callable[[Scene], Tensor], dict[str, Any]]] = {
    "spire": (lambda scene: scene.roof == 2, {"roof": 0}),
    "watermark": (lambda scene: ~scene.watermark, {"watermark": True}),
    "reflection": (lambda scene: ~scene.lit, {"glow": True}),
    "glow": (lambda scene: scene.lit, {"glow": False}),
}


def _difference(a: Scene, b: Scene) -> Tensor:
    """How unlike scene a [1] is to each of scenes b [N] in all that surrounds the edit."""
    total = torch.zeros(len(b))
    for name in ("tower_x", "tower_top", "nave_end", "tree_size"):
        total += (getattr(a, name) - getattr(b, name)).abs() / 3
    for name in ("wall", "sky_top", "sky_low", "ground", "roof_colour"):
        total += (getattr(a, name) - getattr(b, name)).norm(dim=1) * 4
    for name in ("lit", "watermark", "tree"):
        total += 0.5 * (getattr(a, name) != getattr(b, name))
    return total


def _lasso(scene: Scene, change: dict, margin: int) -> Tensor:
    """A mask drawn around what `change` would change in one scene, `margin` pixels outside it."""
    shape = region(render(scene), render(scene.replace(**change))).float()
    return F.max_pool2d(shape[None], 2 * margin + 1, 1, margin)[0, 0]


def _clear(scenes: Scene, painted: Tensor, change: dict) -> Tensor:
    """Rows of the scenes whose painting of what `change` would change is among the better half: int64."""
    truth = render(scenes)
    mask = region(truth, render(scenes.replace(**change)))[:, None]
    error = ((painted - truth).abs() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)
    return (error <= error.median()).nonzero()[:, 0]


def make_edit(rule: Rule, scenes: Scene, painted: Tensor, latents: Tensor) -> Edit:
    """The edit of `rule` on a set of scenes, those of `latents`, as the generator painted them."""
    is_source, undo = _SOURCES[rule.name]
    concerned = rule.concerns(scenes).nonzero()[:, 0]
    targets = concerned[_clear(scenes[concerned], painted[concerned], rule.change)].tolist()
    sources = is_source(scenes).nonzero()[:, 0]
    sources = sources[_clear(scenes[sources], painted[sources], undo)]
    # the most alike pair among the pictures one would leaf through
    pairs = []
    for target in targets[:120]:
        unlike = _difference(scenes[target : target + 1], scenes[sources])
        best = int(unlike.argmin())
        pairs.append((unlike[best].item(), target, int(sources[best])))
    _, target, source = min(pairs)
    margin = _LASSO[rule.name]
    others = [i for i in targets if i != target][: _CONTEXTS - 1]
    return Edit(
        copy=Selection(source, _lasso(scenes[source : source + 1], undo, margin)),
        paste=Selection(target, _lasso(scenes[target : target + 1], rule.change, margin)),
        context=[Selection(i, _lasso(scenes[i : i + 1], rule.change, margin)) for i in [target, *others]],
        latents=latents,
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    latents = sample_latents(LATENT_SIZE, EDIT_LATENTS, seed=EDIT_SEED)
    scenes, painted = scene_from_latents(latents), paint(chapels(), latents)
    for rule in (*RULES.values(), *INVERSES.values()):
        edit = make_edit(rule, scenes, painted, latents)
        edit.save(folder / f"{rule.name}.json")
        print(rule.name, edit)


if __name__ == "__main__":
    main()
