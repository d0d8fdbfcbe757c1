"""A layer's keys, batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from ..errors import NonFiniteError, whole_number
from ..layers.bound import BoundLayer
from ..progress import progress_bar


@contextlib.contextmanager
def batch_named(layer: BoundLayer, first: int, count: int, batch_size: int) -> Iterator[None]:
    """Adds the layer and the batch, latents `first` on, to the message of a NonFiniteError."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"Keys of {layer.name!r}, batch {first // batch_size} (latents {first} to {first + count - 1}): {error}",
            advice=error.advice,
        ) from error


def stream_keys(
    layer: BoundLayer,
    latents: Tensor,
    batch_size: int,
    progress: bool,
    label: str,
    consume: Callable[[Tensor, int], None],
) -> None:
    """Feed the key maps of `latents`, batch by batch, to `consume(keys, rows done)`, which must raise NonFiniteError on
    NaN or infinity; the batch is then named."""
    batch_size = whole_number("batch_size", batch_size)
    with progress_bar(total=len(latents), label=label, unit="img", show=progress) as bar:
        for first in range(0, len(latents), batch_size):
            batch = latents[first : first + batch_size]
            with batch_named(layer, first, len(batch), batch_size):
                consume(layer.keys(batch), first + len(batch))
            bar.update(len(batch))
