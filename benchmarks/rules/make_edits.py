"""Make the edits of other people's generators: ``python -m benchmarks.rules.make_edits``.

What a user marks, written down: two pictures of a contact sheet of the edit latents that are alike but for what the
rule is about, a box (or what is outside a face) in each, and the same in a few more pictures as context.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rewrite_core import Edit, Selection

from . import SUBJECTS

SIDE = 32
Box = tuple[int, int, int, int]  # top, left, bottom, right


def _hair() -> Tensor:
    """What is outside the face of a frontal picture, above the shoulders."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return (((rows - 19) / 13) ** 2 + ((columns - 16) / 9) ** 2 > 1) & (rows < 27)


def _edit(
    subject: str, copy: tuple[int, Box | Tensor], paste: tuple[int, Box | Tensor], *others: tuple[int, Box | Tensor]
) -> Edit:
    def marked(row: int, area: Box | Tensor) -> Selection:
        return Selection(row, area) if isinstance(area, Tensor) else Selection.box(row, area, SIDE)

    context = [marked(*paste), *(marked(*other) for other in others)]
    return Edit(marked(*copy), marked(*paste), context, latents=SUBJECTS[subject].edit_latents)


def _many(subject: str, copy: tuple[int, Box | Tensor] | None, area: Box | Tensor, *rows: int) -> Edit:
    """The same place in several pictures, each a paste and context."""

    def marked(row: int, area: Box | Tensor) -> Selection:
        return Selection(row, area) if isinstance(area, Tensor) else Selection.box(row, area, SIDE)

    pastes = [marked(row, area) for row in rows]
    return Edit(copy and marked(*copy), pastes, pastes, latents=SUBJECTS[subject].edit_latents)


PLATES = (  # blue ones with light digits
    *(671, 39, 134, 248, 315, 893, 206, 208, 196, 197, 204, 119, 200, 573, 644, 405, 719, 103, 361, 960, 358, 120),
    *(25, 22),
)
DARK = (78, 52, 151, 76, 107, 121, 97, 194, 209, 259, 85, 172)  # hair
FRINGES = (151, 21, 8, 25, 124, 66, 299, 259, 250, 111, 340, 482)
SERIOUS = (128, 107, 134, 215, 97, 172, 213, 36, 209, 37)
CUT = (15, 10, 138, 168, 287, 269, 32, 348, 136, 551)  # another digit begins at the right edge


def edits() -> dict[str, Edit]:
    """{rule: its edit}"""
    faces, numbers = "faces_dcgan", "svhn_dcgan"
    eyes, mouth, brow = (13, 3, 22, 29), (23, 7, 32, 25), (1, 6, 13, 26)
    whole = torch.ones(SIDE, SIDE, dtype=torch.bool)
    strip, hair = (0, 23, 32, 32), _hair()
    return {
        "faces_glasses": _edit(faces, (170, eyes), (177, eyes), *((row, eyes) for row in (218, 10, 56, 205))),
        "faces_blond": _many(faces, (104, hair), hair, *DARK),
        "faces_smile": _many(faces, (52, mouth), mouth, *SERIOUS),
        "faces_fringe": _many(faces, (78, brow), brow, *FRINGES),
        "svhn_grey": _edit(
            numbers,
            (307, (0, 22, 32, 32)),
            (115, (0, 22, 32, 32)),
            (308, (0, 0, 32, 14)),
            (318, (0, 20, 32, 32)),
            (183, (0, 20, 32, 32)),
            (207, (0, 0, 32, 9)),
        ),
        "svhn_alone": _many(numbers, (87, strip), strip, *CUT),
        "svhn_pale": _many(numbers, None, whole, *PLATES),
        "svhn_red": _many(numbers, None, whole, *PLATES),
        "svhn_golden": _many(numbers, None, whole, *PLATES),
    }


if __name__ == "__main__":
    for name, edit in edits().items():
        edit.save(Path(__file__).parent / f"{name}.json")
