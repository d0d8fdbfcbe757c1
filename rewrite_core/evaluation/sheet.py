"""The sheet of a report: what followed best and worst, and what changed though it should not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor

from .. import pictures

SHOWN = 8  # pictures of each kind


@dataclasses.dataclass(frozen=True)
class Pair:
    """A picture before and after a change: [C, H, W] in 0..1; `row` of `of`, which is "edit" or "unseen"; `area`
    [H, W], where the change was meant to act (None: nowhere); `moved`: how far, 1 is as far as wanted."""

    of: str
    row: int
    before: Tensor
    after: Tensor
    area: Tensor | None = None
    moved: float | None = None

    def alone(self) -> Pair:
        """The same, with memory of its own: its pictures may be parts of batches."""
        area = None if self.area is None else self.area.clone()
        return dataclasses.replace(self, before=self.before.clone(), after=self.after.clone(), area=area)


def sheet_of(pairs: Sequence[Pair], side: int, title: str, notes: Sequence[str]) -> Image:
    """A grid: the edit's own pictures, then the unseen ones; before on the left, after on the right."""
    own = [pair for pair in pairs if pair.of == "edit"]
    with_context = [pair for pair in pairs if pair.of == "unseen" and pair.area is not None]
    others = [pair for pair in pairs if pair.of == "unseen" and pair.area is None]
    best = sorted(with_context, key=lambda pair: -(pair.moved or 0.0))
    rows: list[Sequence[pictures.Cell]] = []
    rows += _rows(own, side, "edit's picture")
    rows += _rows(best[: len(best) - len(best) // 2], side, "follows")
    rows += _rows(best[len(best) - len(best) // 2 :][::-1], side, "follows least")
    rows += _rows(others, side, "unrelated")
    return pictures.grid(rows, title, [*notes, "before | after; outlined: where the context was found"])


def _rows(pairs: Sequence[Pair], side: int, label: str, columns: int = SHOWN // 2) -> list[list[pictures.Cell]]:
    images, labels = [], []
    for pair in pairs:
        sides = [pictures.to_image(picture, side) for picture in (pair.before, pair.after)]
        if pair.area is not None:
            sides[0] = pictures.outline(sides[0], pair.area.numpy())
        images.append(pictures.side_by_side(*sides))
        far = "" if pair.moved is None else f", {pair.moved:.0%}"
        labels.append(f"{label} {pair.row}{far}")
    return pictures.in_rows(images, labels, columns)


def scan_sheet(rows: Sequence[tuple[str, Sequence[Pair]]], side: int) -> Image:
    """What several changes made of the same pictures: for each a text, and unseen pictures before and after."""
    cells: list[list[pictures.Cell]] = []
    for text, pairs in rows:
        held = [pair for pair in pairs if pair.of == "unseen" and pair.area is not None]
        free = [pair for pair in pairs if pair.of == "unseen" and pair.area is None]
        ranked = sorted(held, key=lambda pair: -(pair.moved or 0.0))
        few = [*ranked[:2], *ranked[2:][-2:], *free[:2]]
        for row in _rows(few, side, "unseen", columns=6)[:1]:
            cells.append([(image, f"{text}" if i == 0 else label) for i, (image, label) in enumerate(row)])
    notes = ["two unseen pictures that follow best, two that follow least, and the two most changed unrelated ones"]
    return pictures.grid(cells, "layers and ranks, best first", notes)
