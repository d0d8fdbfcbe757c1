"""The embedded generator "chapels", the world it was trained on, and three edits of it."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import cast

from ..edits.edit import Edit
from .generator import ProgGANChapels, load_chapels
from .rules import INVERSES, RULES
from .world import LATENT_SIZE

WEIGHTS = "chapels.safetensors"

__all__ = ["LATENT_SIZE", "RULES", "chapels", "load_edit"]


def chapels() -> ProgGANChapels:
    """The trained generator: latents [N, 16] -> images [N, 3, 64, 64] in -1..1, in eval mode, float32."""
    with as_file(files(__name__) / WEIGHTS) as path:
        return cast("ProgGANChapels", load_chapels(path))


def load_edit(name: str) -> Edit:
    """One of the shipped edits: "spire", "watermark" or "reflection", or "glow", the last one's inverse."""
    if name not in (*RULES, *INVERSES):
        raise ValueError(f"There is no demo edit {name!r}; choose from {[*RULES, *INVERSES]}.")
    with as_file(files(__name__) / f"{name}.json") as path:
        return Edit.load(path)
