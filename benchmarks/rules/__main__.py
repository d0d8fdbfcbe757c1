"""Draw the labelled rows of every rule, to look at them again: ``python -m benchmarks.rules DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from rewrite_core import RewriteCoreError, pictures

from . import NAMES, PAINTED, rule

SHOWN = 160


def main(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in NAMES + PAINTED:
        shown = rule(name)
        generator, unseen = shown.subject.generator(), shown.subject.unseen_latents
        for kind in ("concerned", "unrelated"):
            rows = getattr(shown, kind)[:SHOWN]
            painted = pictures.paint(generator, unseen[rows], span=shown.subject.span)
            cells = [(pictures.to_image(x, 96), str(row)) for x, row in zip(painted, rows.tolist(), strict=True)]
            sheet = pictures.grid([cells[i : i + 16] for i in range(0, len(cells), 16)], f"{shown.title}: {kind}", [])
            pictures.save_png(sheet, Path(folder) / f"{name}.{kind}.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "rules_out")
    except RewriteCoreError as error:
        sys.exit(str(error))
