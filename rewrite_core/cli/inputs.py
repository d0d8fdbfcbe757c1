"""What ``rewrite edit`` and ``rewrite search`` both read: an edit, and a second moment."""

from __future__ import annotations

from pathlib import Path

from ..demo import load_edit
from ..demo.run import EDIT_SEED
from ..edits.edit import Edit
from ..layers.bound import BoundLayer
from ..statistics.collection import collect_second_moment
from ..statistics.second_moment import SecondMoment
from .command import UsageError
from .generator import Subject
from .options import CHAPELS, DEMO_EDITS


def edit_named(name: str, generator: str, seed: int) -> Edit:
    """The edit that a command line names: a file, or by its name one of the embedded generator's own."""
    if generator != CHAPELS or name not in DEMO_EDITS:
        if generator == CHAPELS and not Path(name).exists():
            known = ", ".join(DEMO_EDITS)
            raise UsageError(f"There is no file {name!r}; the embedded generator's own edits are {known}.")
        return Edit.load(name)
    if seed != EDIT_SEED:
        raise UsageError(f"The edit {name!r} selects from the pictures of --seed {EDIT_SEED}.")
    return load_edit(name)


def moment_for(file: str | None, layer: BoundLayer, on: Subject) -> SecondMoment:
    """The layer's second moment from a file, or collected where there is none."""
    if not file:
        return collect_second_moment(layer, on.latents, progress=on.progress, latent_seed=on.seed)
    return SecondMoment.load(file, layer)
