"""Rewriting beside what one would do without it: the paper's comparisons, each measured alike (paper, section 5)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.edit import Edit
from ..edits.goals import paste_goals, preview
from ..errors import RewriteCoreError, choice
from ..layers.bound import BoundLayer
from ..rewrites.calls import erase, rewrite, zero
from ..rewrites.change import Rewrite
from ..rewrites.solving import Settings, Task, solve
from ..solvers.baselines import STOPS, FineTuned, fine_tune
from ..statistics.second_moment import SecondMoment
from .measuring import Given, measured, scene_of
from .report import Report
from .steps import Steps

_ORDINARY = 32  # pictures that fine-tuning is asked to leave alone
_STEPS = 501  # of the unconstrained layer


@dataclasses.dataclass(frozen=True)
class Compared:
    """One way and what it did. stopped: after how many steps fine-tuning did best, where it was."""

    name: str
    report: Report
    seconds: float
    stopped: int | None = None


@dataclasses.dataclass(frozen=True)
class On:
    """What all ways are given. rank: of ours, and of directions that are drawn."""

    layer: BoundLayer
    moment: SecondMoment
    edit: Edit
    z: Tensor
    rank: int

    def ours(self, rank: int, objective: str) -> Rewrite:
        options: dict[str, Any] = {"region": "map", "loss": "l2", "objective": objective}
        return rewrite(self.layer, self.moment, self.edit, self.z, rank=rank, **options)

    def single(self) -> Rewrite:
        """One place of the context alone."""
        alone = Edit(self.edit.copy, self.edit.pastes, self.edit.where[:1], latents=self.z)
        return On(self.layer, self.moment, alone, self.z, 1).ours(1, "value")

    def undirected(self) -> Rewrite:
        """Lambda along directions that are drawn, not found in the context."""
        random = torch.Generator(device="cpu").manual_seed(0)
        drawn = torch.randn(self.rank, self.moment.channels, dtype=torch.float64, generator=random, device="cpu")
        keys = drawn @ self.moment.matrix().cpu()  # whitened, they are what was drawn
        settings = Settings(rank=self.rank, loss="l2", objective="value", solver="lm", preserve=0.0)
        task = Task(
            lambda: paste_goals(self.layer, self.edit, self.z, "map"), lambda _: (keys, None), self.edit, self.z
        )
        return solve(self.layer, self.moment, [task], settings, self.z)[0]

    def unconstrained(self) -> Rewrite:
        from ..solvers.projected import Unconstrained

        given: dict[str, Any] = {"solver": Unconstrained(steps=_STEPS), "objective": "value"}
        return rewrite(self.layer, self.moment, self.edit, self.z, region="map", loss="l2", **given)

    def erased(self) -> Rewrite:
        units = min(30, self.layer.in_channels)
        options: dict[str, Any] = {"units": units, "rank": self.rank, "loss": "l2", "solver": "lm"}
        return erase(self.layer, self.moment, self.edit, self.z, **options)

    def silenced(self, units: int) -> Rewrite:
        """GAN Dissection: the units most typical of the context are zero in every picture."""
        count = min(units, self.layer.in_channels)
        return zero(self.layer, self.moment, self.edit, self.z, rank=count, directions="units")

    def tuned(
        self,
        preserve: float,
        *,
        lr: float = 0.01,
        stops: Sequence[int] = STOPS,
        ordinary: int = _ORDINARY,
        progress: bool = False,
    ) -> list[FineTuned]:
        """All weights, fine-tuned on the pictures that the pasted value renders; `preserve` weighs the change of so
        many ordinary pictures."""
        rows = list(dict.fromkeys(paste.index for paste in self.edit.pastes))
        named = {part.index for part in self.edit.selections}
        others = [row for row in range(len(self.z)) if row not in named][:ordinary]
        goals = preview(self.layer, self.edit, self.z)
        options: dict[str, Any] = {"preserve": preserve, "lr": lr, "stops": stops, "progress": progress}
        forward = self.layer.own_forward
        return fine_tune(self.layer.generator, self.z[rows], goals, ordinary=self.z[others], forward=forward, **options)


WAYS: dict[str, Callable[[On], Rewrite]] = {
    "ours, pictures, rank 1": lambda on: on.ours(1, "pictures"),
    "ours, pictures": lambda on: on.ours(on.rank, "pictures"),
    "ours, value, rank 1": lambda on: on.ours(1, "value"),
    "ours, value": lambda on: on.ours(on.rank, "value"),
    "single context": On.single,
    "Lambda without direction": On.undirected,
    "one layer unconstrained": On.unconstrained,
    "erase": On.erased,
    "30 units zeroed": lambda on: on.silenced(30),
    "60 units zeroed": lambda on: on.silenced(60),
}
"""{name: the change}; "fine-tuned" and "fine-tuned, preserved" come besides, which change no single layer."""
TUNED = {"fine-tuned": 0.0, "fine-tuned, preserved": 1.0}
REMOVE = ("erase", "30 units zeroed", "60 units zeroed")
"""Ways that take the context away and copy nothing there; measured by what they themselves make of the paste."""


def compare(
    layer: BoundLayer,
    moment: SecondMoment,
    edit: Edit,
    z: Tensor,
    unseen: Tensor | None = None,
    *,
    rank: int = 4,
    ways: Sequence[str] = (*WAYS, *TUNED),
    span: tuple[float, float] = (-1.0, 1.0),
    progress: bool = False,
) -> list[Compared]:
    """An edit made in several ways, each measured as :func:`rewrite_core.measure` does, on the same unseen pictures.

    Ways that remove, "erase" and the zeroed units, do not know the copy: reach is then the share of places that follow
    what became of the paste. The fine-tuned generators are stopped where they did best: at the highest reach, and of
    several at the lowest unrelated change.

    Args:
        layer, moment, edit, z: those of :func:`rewrite_core.rewrite`; the edit has a copy and a paste.
        unseen: [N, ...] latents to measure on; by default rows of `z` that the edit does not select.
        rank: of ours, and of the directions that are drawn.
        ways: names, by default all of "ours, pictures, rank 1", "ours, pictures", "ours, value, rank 1",
            "ours, value", "single context", "Lambda without direction", "one layer unconstrained", "erase",
            "30 units zeroed", "60 units zeroed", "fine-tuned" and "fine-tuned, preserved".
        span: what the generator's images lie in.
        progress: show bars.

    Raises:
        RewriteCoreError: there is no such way. Errors of rewrite and measure.
    """
    for way in ways:
        choice("each of ways", way, (*WAYS, *TUNED))
    on = On(layer, moment, edit.on(z), z, rank)
    steps = Steps(progress)
    scene = scene_of(layer, Given([], on.edit, z, unseen, span=span, steps=steps))
    removing = dataclasses.replace(scene, edit=on.edit.without_copy(), wanted=None)

    def report(changes: list[Rewrite], other: nn.Module | None = None, removes: bool = False) -> Report:
        given = Given(changes, on.edit, z, unseen, moment=moment, span=span, steps=steps)
        return measured(layer, given, other, scene=removing if removes else scene)

    found = []
    for way in ways:
        start = time.perf_counter()
        if way in WAYS:
            change = WAYS[way](on)
            seconds = time.perf_counter() - start
            found.append(Compared(way, report([change], removes=way in REMOVE), seconds))
        else:
            found.append(_tuned(way, on, report, progress))
    return found


def _tuned(way: str, on: On, report: Callable[[list[Rewrite], nn.Module], Report], progress: bool) -> Compared:
    """All weights on the goal pictures, stopped where it did best."""
    start = time.perf_counter()
    tuned = on.tuned(TUNED[way], progress=progress)
    seconds = time.perf_counter() - start
    reports = [(each.steps, report([], each.generator)) for each in tuned]
    stopped, best = max(reports, key=lambda pair: (pair[1].reach or 0.0, -(pair[1].unrelated or 0.0)))
    return Compared(way, best, seconds * stopped / tuned[-1].steps, stopped)


def comparison_table(rows: Sequence[Compared]) -> str:
    """The comparison as lines of text."""
    if not rows:
        raise RewriteCoreError("There is nothing to compare; name at least one way.")
    head = ("way", "verdict", "reach", "agreement", "inside", "outside", "unrelated", "size", "seconds", "stopped")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        report = row.report
        numbers = (report.reach, report.agreement)
        changes = (report.inside, report.outside, report.unrelated)
        lines.append(
            (
                row.name,
                report.verdict,
                *("-" if number is None else f"{number:.2f}" for number in numbers),
                *("-" if number is None else f"{number:.4f}" for number in changes),
                "-" if report.size is None else f"{report.size:.2f}",
                f"{row.seconds:.2f}",
                "-" if row.stopped is None else str(row.stopped),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
