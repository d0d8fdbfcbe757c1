"""What ``rewrite edit`` and ``rewrite search`` both read: an edit, and a second moment."""

from __future__ import annotations

from pathlib import Path

from ..demo import load_edit
from ..demo.run import EDIT_SEED
from ..edits.edit import Edit
from ..errors import warn
from ..layers.binding import BoundLayer
from ..layers.fingerprints import tensor_fingerprint
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
    moment = SecondMoment.load(file, layer)
    seed, count, fingerprint = (moment.latents.get(name) for name in ("seed", "count", "fingerprint"))
    # a longer sample begins with the rows of a shorter one
    comparable = count is not None and count <= len(on.latents)
    if seed not in (None, on.seed) or (comparable and fingerprint != tensor_fingerprint(on.latents[:count])):
        warn(
            f"{file} was collected on other latents (seed {seed}) than these (seed {on.seed}); make sure that the edit "
            "selects from these."
        )
    return moment
