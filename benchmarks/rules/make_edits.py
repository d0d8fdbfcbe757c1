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


def _corner() -> Tensor:
    """A plate above and to the right of its digit."""
    area = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    area[:5, 6:] = area[:, 26:] = True
    return area


def _edit(
    subject: str, copy: tuple[int, Box | Tensor], paste: tuple[int, Box | Tensor], *others: tuple[int, Box | Tensor]
) -> Edit:
    def marked(row: int, area: Box | Tensor) -> Selection:
        return Selection(row, area) if isinstance(area, Tensor) else Selection.box(row, area, SIDE)

    context = [marked(*paste), *(marked(*other) for other in others)]
    return Edit(marked(*copy), marked(*paste), context, latents=SUBJECTS[subject].edit_latents)


def edits() -> dict[str, Edit]:
    """{rule: its edit}"""
    faces, numbers = "faces_dcgan", "svhn_dcgan"
    eyes, mouth, brow = (13, 3, 22, 29), (23, 7, 32, 25), (1, 6, 13, 26)
    whole = torch.ones(SIDE, SIDE, dtype=torch.bool)
    strip, digit, hair = (0, 23, 32, 32), (3, 8, 30, 24), _hair()
    return {
        "faces_glasses": _edit(faces, (170, eyes), (177, eyes), *((row, eyes) for row in (218, 10, 56, 205))),
        "faces_blond": _edit(faces, (104, hair), (78, hair), *((row, hair) for row in (52, 151, 134, 76))),
        "faces_smile": _edit(faces, (52, mouth), (128, mouth), *((row, mouth) for row in (107, 215, 134, 138))),
        "faces_fringe": _edit(faces, (78, brow), (151, brow), *((row, brow) for row in (21, 8, 340, 25))),
        "svhn_red": _edit(
            numbers,
            (333, _corner()),
            (248, _corner()),
            (248, (0, 0, 32, 6)),
            (196, (0, 22, 32, 32)),
            (103, (0, 2, 20, 8)),
            (134, (0, 18, 32, 22)),
            (29, (0, 22, 32, 28)),
        ),
        "svhn_plates": _edit(numbers, (333, whole), (248, whole), *((row, whole) for row in (103, 134, 29, 94))),
        "svhn_grey": _edit(
            numbers,
            (307, (0, 22, 32, 32)),
            (115, (0, 22, 32, 32)),
            (308, (0, 0, 32, 14)),
            (318, (0, 20, 32, 32)),
            (183, (0, 20, 32, 32)),
            (207, (0, 0, 32, 9)),
        ),
        "svhn_alone": _edit(numbers, (87, strip), (15, strip), *((row, strip) for row in (136, 131, 197, 348))),
        "svhn_gold": _edit(
            numbers, (72, (2, 9, 28, 16)), (134, (2, 13, 30, 20)), *((row, digit) for row in (103, 248, 29, 94))
        ),
    }


if __name__ == "__main__":
    for name, edit in edits().items():
        edit.save(Path(__file__).parent / f"{name}.json")
