"""Collecting second moments: the keys of one or several layers of a generator, streamed over many latents."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..adapters.base import Capture
from ..errors import ArgumentError, RewriteCoreError, number, whole_number
from ..files import plain, writable_path
from ..layers.bound import BoundLayer
from ..layers.capture import check_together, fingerprints, run_to
from ..layers.fingerprints import tensor_fingerprint
from ..layers.latents import check_latents, recipe_of
from ..progress import progress_bar
from .checks import check_layer
from .cuda_streams import side_stream
from .key_stream import batch_named
from .launches import Launches
from .masks import Mask, batch_mask, check_mask
from .part import Part
from .second_moment import SecondMoment

if TYPE_CHECKING:
    from tqdm import tqdm

CHECKPOINT_SECONDS = 5.0  # between two checkpoints


@dataclass(frozen=True)
class Asked:
    """What a collection is asked for; see :func:`collect_second_moment`. `first`: the number of its first latent."""

    batch_size: int = 16
    until: float | None = None
    skip_nonfinite: bool = False
    mask: Mask | None = None
    progress: bool = True
    first: int = 0


def looked_at(batches: int) -> bool:
    """Whether `until` is looked at after so many batches on a GPU, which then has to be waited for: after every one of
    the first 32, then at every 16th part of what there is. By their number alone, for resumed collections to agree."""
    return batches % max(1, batches // 16) == 0


class Collection:
    """One way through the latents, for all parts of a collection."""

    def __init__(self, parts: list[Part], latents: Tensor, asked: Asked):
        self._parts, self._latents, self._asked = parts, latents, asked
        self._beside = side_stream(parts[0].layer.parameter.device) is not None
        self._launches = Launches(asked.batch_size)
        self._saved_at = time.monotonic()

    def run(self) -> list[SecondMoment]:
        """The moments, finished."""
        parts, latents, asked = self._parts, self._latents, self._asked
        first = min(part.done for part in parts)
        label = f"second moment of {', '.join(part.layer.name for part in parts)}"
        with (
            progress_bar(total=len(latents), start=first, label=label, unit="img", show=asked.progress) as bar,
            self._launches,
        ):
            while first < len(latents):
                # each part has a file of its own, which a crash or `until` may have left further than others: the batch
                # ends where the next of them goes on
                behind = [part for part in parts if part.done <= first]
                end = min([len(latents), first + asked.batch_size, *(part.done for part in parts if part.done > first)])
                if len(behind) == len(parts) and self._enough(first):
                    break
                self._feed(behind, first, latents[first:end])
                self._after(behind, end, bar)
                bar.update(end - first)
                first = end
            self._gather()
        return [part.finish() for part in parts]

    def _gather(self) -> None:
        self._launches.wait()
        for part in self._parts:
            part.gather()

    def _enough(self, done: int) -> bool:
        """Whether the errors are as small as `until` asks for, after so many latents in every part."""
        until = self._asked.until
        if until is None or (self._beside and not looked_at(done // self._asked.batch_size)):
            return False
        self._gather()
        return all(part.error <= until for part in self._parts)

    def _feed(self, behind: list[Part], first: int, batch: Tensor) -> None:
        """Run the generator on a batch, the latents from `first` on, and add its keys to the parts that lack them."""
        mask = batch_mask(self._asked.mask, first, batch)
        left = len(behind)

        def consume(which: int, capture: Capture) -> None:
            nonlocal left
            left -= 1
            with batch_named(behind[which].layer, self._asked.first + first, len(batch), self._asked.batch_size):
                self._add(behind[which], capture.key, mask, (first, len(batch)), last=left == 0)

        fresh = [part for part in behind if part.moment.fingerprint is None]
        for part, text in zip(fresh, fingerprints([part.layer for part in fresh], batch), strict=True):
            part.moment.fingerprint = text
        run_to([part.layer for part in behind], batch, consume)
        self._launches.passed()

    def _add(self, part: Part, key: Tensor, mask: Tensor | None, latents: tuple[int, int], last: bool) -> None:
        skip_nonfinite, side = self._asked.skip_nonfinite, side_stream(key.device)
        if side is None:
            part.update(key, mask, latents[1], skip_nonfinite)
            return
        features = part.moment._readable(key, mask)
        first = latents[0] + self._asked.first
        self._launches.launch(side, part, features, (first, latents[1]), skip_nonfinite, last)

    def _after(self, behind: list[Part], done: int, bar: tqdm) -> None:
        """What falls due between two batches: errors of keys, a checkpoint, the error that the bar shows."""
        if self._beside and any(part.keys is not None and part.keys.due for part in behind):
            self._gather()
        due = done < len(self._latents) and time.monotonic() - self._saved_at > CHECKPOINT_SECONDS
        if due:
            if not bar.disable or any(part.path is not None for part in behind):
                self._gather()
            for part in behind:
                part.save(finished=False)
            self._saved_at = time.monotonic()
        if not bar.disable and (due or not self._beside):
            error = max(part.error for part in self._parts)
            if not math.isnan(error):
                bar.set_postfix_str(f"error {error:.2%}", refresh=False)


def facts_of(latents: Tensor, seed: object, mask: Mask | None) -> dict[str, Any]:
    """What a moment's file says of the latents that it is collected from."""
    facts: dict[str, Any] = {"count": len(latents), "seed": seed, "fingerprint": tensor_fingerprint(latents)}
    recipe = recipe_of(latents)
    if recipe is not None:
        facts["recipe"] = recipe.to_dict()
    if mask is not None:
        facts["mask"] = tensor_fingerprint(mask) if isinstance(mask, Tensor) else "a function"
    return plain(facts, "latents")


def check_asked(latents: Tensor, asked: Asked) -> Asked:
    """`asked` with plain numbers in it. Raises RewriteCoreError for what is not possible."""
    check_latents(latents)
    if latents.ndim == 0 or len(latents) == 0:
        raise RewriteCoreError("Collecting a second moment needs at least one latent, a row of a tensor [N, ...].")
    check_mask(asked.mask, latents)
    return Asked(
        batch_size=whole_number("batch_size", asked.batch_size),
        until=None if asked.until is None else number("`until`, the relative error to stop at,", asked.until, above=0),
        skip_nonfinite=bool(asked.skip_nonfinite),
        mask=asked.mask,
        progress=bool(asked.progress),
        first=asked.first,
    )


def collect_parts(
    layers: Sequence[BoundLayer],
    latents: Tensor,
    asked: Asked,
    facts: dict[str, Any],
    paths: Sequence[str | os.PathLike | None],
    targets: Sequence[Tensor | None],
) -> list[SecondMoment]:
    """The moments of `layers` of one generator, in one pass, each with its checkpoint file and its keys to know errors
    of.

    `asked` has been checked, and `facts` tell of the latents.
    """
    check_together(layers)
    files = [writable_path(path) for path in paths if path is not None]
    if len(set(files)) < len(files):
        raise RewriteCoreError("Two of the layers have the same checkpoint file: give each its own.")
    parts = [
        Part(layer, latents, asked.batch_size, dict(facts), path, keys)
        for layer, path, keys in zip(layers, paths, targets, strict=True)
    ]
    return Collection(parts, latents, asked).run()


def collect_second_moment(
    layer: BoundLayer,
    latents: Tensor,
    *,
    batch_size: int = 16,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
    latent_seed: int | None = None,
    skip_nonfinite: bool = False,
    until: float | None = None,
    keys: Tensor | None = None,
    mask: Mask | None = None,
) -> SecondMoment:
    """Collect the second moment of a layer's keys over the images of `latents` [N, ...].

    The forward pass stops at the layer; keys are streamed and read where they lie, so memory does not grow with N:
    beside the sum [C, C] in float64 there is one more such matrix at a time (with `keys` up to four where C is
    rank-deficient), and the activations of one batch. Of a grouped convolution only the blocks of channels of one group
    are summed and kept.

    On a GPU the updates run on a stream of their own beside the next forward pass, while one batch's key maps of the
    last layer are kept, and `skip_nonfinite` and `mask` take a copy of a batch's keys. The host waits for none of it,
    but for a checkpoint, what `until` and `keys` ask for, and the end: so an error may name a batch some batches ago.

    Args:
        layer: a bound layer.
        latents: [N, ...] on any device; batches of them are moved to the generator's.
        batch_size: images at a time.
        checkpoint: a file to save the state in every few seconds; if it exists, the collection resumes there and
            ends with the same bits as an uninterrupted one on as many threads. It holds the finished moment at the
            end.
        progress: show a bar with the rate, the time left and the error so far, on a terminal or in Jupyter.
        latent_seed: recorded in the moment's metadata.
        skip_nonfinite: leave out images whose keys hold NaN or infinity, and count them in ``moment.skipped``.
        until: stop when the relative standard error of C, and of C^-1 k for each of `keys`, is this or less (0.01:
            one percent); after 8 batches at the earliest, and 16 with `keys`. The latents must be in random order.
            ``moment.standard_error`` and ``moment.key_errors`` say what was reached, and ``moment.latents["used"]``
            how many latents went in where not all did. On a GPU it is looked at after each of the first 32 batches,
            then each time there are a 16th more. A checkpoint that stopped before what `until` asks for goes on.
        keys: rows [n, C] (or one key [C]) to give the error of C^-1 k for.
        mask: which positions of the key maps count: a tensor [N, *map] of booleans, or of whole numbers of which 0 does
            not count; or a function that makes such a tensor [n, *map] of a batch of latents [n, ...]. So the padding
            of a transformer's input stays out of C: with token ids as latents, ``mask=lambda ids: ids !=
            tokenizer.pad_token_id``, or the tokenizer's own ``attention_mask``.

    Raises:
        NonFiniteError: NaN or infinity in the keys, or keys too large to square; names the batch.
        MismatchError: the checkpoint belongs to another layer, model, batch size, set of latents, mask or keys.
        ArgumentError: an argument of a wrong type; found before anything runs.
        RewriteCoreError: an argument of a wrong value; found before anything runs.
        OSError: the checkpoint cannot be written there; found before anything runs.
    """
    check_layer(layer)
    asked = check_asked(latents, Asked(batch_size, until, skip_nonfinite, mask, progress))
    facts = facts_of(latents, latent_seed, mask)
    return collect_parts([layer], latents, asked, facts, [checkpoint], [keys])[0]


def collect_second_moments(
    layers: Sequence[BoundLayer],
    latents: Tensor,
    *,
    batch_size: int = 16,
    checkpoints: Sequence[str | os.PathLike | None] | None = None,
    progress: bool = True,
    latent_seed: int | None = None,
    skip_nonfinite: bool = False,
    until: float | None = None,
    keys: Sequence[Tensor | None] | None = None,
    mask: Mask | None = None,
) -> list[SecondMoment]:
    """Collect the second moments of several layers of one generator in one pass, which stops at the last of them that
    the generator reaches: a list in the order of `layers`. The arguments, and what is raised, are those of
    :func:`collect_second_moment`, but for these.

    Args:
        layers: bound layers of the same generator object, with the same ``forward``.
        checkpoints: a list with a file for each layer, or None for one that has none.
        until: is reached when every layer's errors are that small.
        keys: a list with the keys of each layer, or None for one that has none.
        mask: applies to every layer, whose maps must have its shape.
    """
    if not isinstance(layers, list | tuple):
        raise ArgumentError(
            f"layers is a list of what rc.bind(generator, name) returns, not {type(layers).__name__}; for one "
            "layer there is collect_second_moment."
        )
    for layer in layers:
        check_layer(layer)
    asked = check_asked(latents, Asked(batch_size, until, skip_nonfinite, mask, progress))
    paths, targets = one_each("checkpoints", checkpoints, layers), one_each("keys", keys, layers)
    return collect_parts(layers, latents, asked, facts_of(latents, latent_seed, mask), paths, targets)


def one_each(name: str, given: Sequence | None, layers: Sequence[BoundLayer]) -> Sequence:
    """`given`, an argument that has an item for each of several layers; None stands for as many times None."""
    if given is None:
        return [None] * len(layers)
    if not isinstance(given, list | tuple) or len(given) != len(layers):
        raise RewriteCoreError(f"For {len(layers)} layers `{name}` is a list of as many items, or None.")
    return given
