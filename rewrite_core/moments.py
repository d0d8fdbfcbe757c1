"""The second moment of a layer's keys, C = E[k k^T], collected by streaming (paper, section 3.2)."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import ops
from .binding import BoundLayer, check_together, run_to, tensor_fingerprint
from .errors import FileFormatError, MismatchError, NonFiniteError, RewriteCoreError
from .families import Capture
from .files import is_npz, load_record, save_record
from .latents import check_latents
from .ops.spd_solve import SPDFactor, spd_factor

_VERSION = 1


class SecondMoment:
    """The uncentred second moment of keys with `channels` coordinates, kept as a float64 sum and a count.

    ``layer`` and ``fingerprint`` say which layer of which weights the keys came from (None: unknown, and
    then nothing is checked). ``latents`` is a dict with what is known of the latents, ``skipped`` the number of
    images (or rows) left out for NaN or infinity.
    """

    def __init__(self, channels: int, layer: str | None = None, fingerprint: str | None = None):
        if channels < 1:
            raise RewriteCoreError(f"A second moment needs at least one channel, not {channels}.")
        with torch.inference_mode(False):  # or it could not be written in place outside
            self._sum = torch.zeros(channels, channels, dtype=torch.float64, device="cpu")
        self.count = 0
        self.skipped = 0
        self.layer = layer
        self.fingerprint = fingerprint
        self.latents: dict = {}
        self._factor: SPDFactor | None = None

    @property
    def channels(self) -> int:
        return len(self._sum)

    def __repr__(self) -> str:
        return f"SecondMoment({self.channels} channels, {self.count} keys, layer={self.layer!r})"

    def update(self, features: Tensor, skip_nonfinite: bool = False) -> None:
        """Add keys: [N, C, H, W] (each position is one key) or [N, C]; float16/32/64 or bfloat16, any strides.

        With `skip_nonfinite`, images (or rows) that hold NaN or infinity are left out and counted in ``skipped``.
        Raises NonFiniteError (and leaves the moment as it was) on NaN and infinity otherwise, and on values too
        large to square.
        """
        if features.ndim not in (2, 4) or features.shape[1] != self.channels:
            raise RewriteCoreError(
                f"This second moment takes features [N, {self.channels}, H, W] or [N, {self.channels}], "
                f"not {list(features.shape)}."
            )
        features, skipped = features.detach(), 0
        part = ops.second_moment(features)
        # the diagonal holds every channel's sum of squares: finite exactly when they are
        if skip_nonfinite and not torch.isfinite(part.diagonal()).all():
            finite = torch.isfinite(features).flatten(1).all(1)
            skipped = len(features) - int(finite.sum())
            features = features[finite]
            part = ops.second_moment(features)
        if not torch.isfinite(part.diagonal()).all():
            if torch.isfinite(features).all():
                largest = features.abs().max().item()
                raise NonFiniteError(
                    f"The features are as large as {largest:.0e} and their squares overflow {features.dtype}; "
                    "scale them down or pass them as float64."
                )
            raise NonFiniteError("The features hold NaN or infinity; leave those images out with skip_nonfinite=True.")
        self._sum += part.to(self._sum.device)
        self.count += features.numel() // self.channels
        self.skipped += skipped
        self._factor = None

    def matrix(self) -> Tensor:
        """C = sum / count, float64 [C, C]."""
        if self.count == 0:
            raise RewriteCoreError("This second moment holds no keys yet; update or collect it first.")
        return self._sum / self.count

    @property
    def factor(self) -> SPDFactor:
        """The Cholesky factor of C, computed once and kept until the next update; ``.shift`` is the diagonal
        shift that a rank-deficient C needed (0 otherwise), ``.condition`` an estimate."""
        if self._factor is None:
            self._factor = spd_factor(self.matrix())
        return self._factor

    def solve(self, keys: Tensor) -> Tensor:
        """C^-1 k for each row of `keys` [n, C] (or one key [C]); float64, same shape (paper, eq. 14)."""
        rows = torch.atleast_2d(keys).to(torch.float64)
        if rows.ndim != 2 or rows.shape[1] != self.channels:
            raise RewriteCoreError(f"Keys are rows [n, {self.channels}], not {list(keys.shape)}.")
        if not torch.isfinite(rows).all():
            raise NonFiniteError("The keys hold NaN or infinity.")
        return self.factor.solve(rows.T.to(self._sum.device)).T.reshape(keys.shape)

    def check(self, layer: BoundLayer, latents: Tensor | None = None) -> None:
        """Raise MismatchError where this moment was not collected from `layer` as it is now."""
        if self.channels != layer.in_channels:
            raise MismatchError(
                f"The second moment has {self.channels} channels and {layer.name!r} has {layer.in_channels}; "
                "collect it for this layer."
            )
        if self.layer is not None and self.layer != layer.name:
            raise MismatchError(
                f"The second moment is of layer {self.layer!r}, not {layer.name!r}; collect it for this layer."
            )
        if self.fingerprint is not None and latents is not None:
            if self.fingerprint != layer.fingerprint(latents):
                raise MismatchError(
                    f"The second moment was collected with other weights before {layer.name!r} (another model, "
                    "another truncation, or an edit to an earlier layer); collect it again."
                )

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add the keys of `other`, in place; returns self. Raises MismatchError for another layer or model, and
        warns where both were collected from the same latents, whose keys then count twice."""
        for name in ("channels", "layer", "fingerprint"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs and None not in (mine, theirs):
                raise MismatchError(f"These second moments differ in {name} ({mine!r}, {theirs!r}) and do not add up.")
        sets, more = self._latent_sets(), other._latent_sets()
        if {part.get("fingerprint") for part in sets} & {part.get("fingerprint") for part in more} - {None}:
            warnings.warn(
                "These second moments were collected from the same latents, whose keys now count twice; "
                "merge moments of different latents.",
                stacklevel=2,
            )
        self._sum += other._sum.to(self._sum.device)
        self.count += other.count
        self.skipped += other.skipped
        self.layer = self.layer or other.layer
        self.fingerprint = self.fingerprint or other.fingerprint
        self.latents = {"merged": sets + more}
        self._factor = None
        return self

    def _latent_sets(self) -> list[dict]:
        """What is known of each set of latents that the keys came from."""
        return self.latents.get("merged", [self.latents] if self.count else [])

    def all_reduce(self, group=None) -> SecondMoment:
        """Sum over the processes of a ``torch.distributed`` group, in place; returns self."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RewriteCoreError("all_reduce needs torch.distributed; call init_process_group first.")
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        total = self._sum.to(device, copy=True)
        counts = torch.tensor([self.count, self.skipped], dtype=torch.int64, device=device)
        dist.all_reduce(total, group=group)
        dist.all_reduce(counts, group=group)
        self._sum.copy_(total)
        self.count, self.skipped = counts.tolist()
        self._factor = None
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write ``sum`` and its metadata as safetensors, all or nothing."""
        self._save(path, {})

    def _save(self, path: str | os.PathLike, progress: dict) -> None:
        metadata = {
            "count": self.count,
            "skipped": self.skipped,
            "layer": self.layer,
            "fingerprint": self.fingerprint,
            "latents": self.latents,
            "progress": progress,
        }
        save_record(path, "second_moment", _VERSION, {"sum": self._sum.cpu()}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, layer: BoundLayer | None = None) -> SecondMoment:
        """Read a saved second moment, or the reference implementation's ``r2m.npz`` (told apart by their content).

        With `layer`, its name and channels are checked at once; the weights are checked when it is used.
        Raises FileFormatError on a truncated or foreign file.
        """
        moment, progress = cls._load(path)
        if progress:
            raise FileFormatError(
                f"{os.fspath(path)} is a checkpoint of an unfinished collection; "
                "resume it with collect_second_moment(checkpoint=...)."
            )
        if layer is not None:
            moment.check(layer)
        return moment

    @classmethod
    def _load(cls, path: str | os.PathLike) -> tuple[SecondMoment, dict]:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        if is_npz(path):
            return cls._load_npz(path), {}
        tensors, metadata = load_record(path, "second_moment", _VERSION)
        total = tensors.get("sum")
        count, skipped = metadata.get("count"), metadata.get("skipped", 0)
        if total is None or total.ndim != 2 or not 0 < len(total) == total.shape[1] or total.dtype != torch.float64:
            raise FileFormatError(f"{path} holds no float64 [C, C] tensor 'sum'.")
        if any(type(number) is not int or number < 0 for number in (count, skipped)) or not torch.isfinite(total).all():
            raise FileFormatError(f"{path} holds no finite sum with its counts.")
        layer, fingerprint = metadata.get("layer"), metadata.get("fingerprint")
        latents, progress = metadata.get("latents") or {}, metadata.get("progress") or {}
        if not (
            all(isinstance(text, str | None) for text in (layer, fingerprint))
            and all(isinstance(record, dict) for record in (latents, progress))
            and sorted((name, type(value)) for name, value in progress.items())
            in ([], [("batch_size", int), ("done", int)])
        ):
            raise FileFormatError(f"{path} has metadata of the wrong types.")
        moment = cls(len(total), layer, fingerprint)
        moment._sum.copy_(total)
        moment.count, moment.skipped, moment.latents = count, skipped, latents
        return moment, progress

    @classmethod
    def _load_npz(cls, path: Path) -> SecondMoment:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                # same_kind: no numbers made of strings or complex numbers
                total, count = arrays["mom2"].astype(np.float64, casting="same_kind"), int(arrays["count"])
        except Exception as error:  # numpy raises anything from BadZipFile to KeyError here
            raise FileFormatError(f"{path} is not the reference's r2m.npz ({type(error).__name__}: {error}).") from error
        if total.ndim != 2 or not 0 < len(total) == total.shape[1] or count < 1 or not np.isfinite(total).all():
            raise FileFormatError(f"{path} does not hold a finite [C, C] 'mom2' with its count.")
        moment = cls(len(total))
        moment._sum.copy_(torch.from_numpy((total + total.T) / 2))  # a float32 sum's triangles differ
        moment.count = count
        return moment


@contextlib.contextmanager
def _batch_named(layer: BoundLayer, first: int, count: int, batch_size: int) -> Iterator[None]:
    """Adds the layer and the batch, latents `first` on, to the message of a NonFiniteError."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"Keys of {layer.name!r}, batch {first // batch_size} (latents {first} to {first + count - 1}): {error}"
        ) from error


def _stream(
    layer: BoundLayer, latents: Tensor, batch_size: int, start: int, progress: bool, label: str,
    consume: Callable[[Tensor, int], None],
) -> None:  # fmt: skip
    """Feed the key maps of latents[start:], batch by batch, to `consume(keys, rows done)`, which must raise
    NonFiniteError on NaN or infinity; the batch is then named."""
    with tqdm(total=len(latents), initial=start, desc=label, unit="img", disable=not progress) as bar:
        for first in range(start, len(latents), batch_size):
            batch = latents[first : first + batch_size]
            with _batch_named(layer, first, len(batch), batch_size):
                consume(layer.keys(batch), first + len(batch))
            bar.update(len(batch))


class _Collection:
    """One layer's part of a collection: its moment, how many latents are in it, and its checkpoint file."""

    def __init__(self, layer: BoundLayer, latents: Tensor, batch_size: int, seed: int | None, path: str | os.PathLike | None):
        self.layer = layer
        self.batch_size = batch_size
        self.path = path
        self.done = 0
        self.moment = SecondMoment(layer.in_channels, layer.name, layer.fingerprint(latents))
        self.moment.latents = {"count": len(latents), "seed": seed, "fingerprint": tensor_fingerprint(latents)}
        if path is not None and Path(path).exists():
            self._resume(len(latents))

    def _resume(self, total: int) -> None:
        saved, progress = SecondMoment._load(self.path)
        same = saved.layer == self.moment.layer and saved.fingerprint == self.moment.fingerprint
        if not same or saved.latents.get("fingerprint") != self.moment.latents["fingerprint"]:
            raise MismatchError(
                f"The checkpoint {os.fspath(self.path)} belongs to another layer, model or set of latents; "
                "delete it or name another file."
            )
        if progress and progress["batch_size"] != self.batch_size:
            raise MismatchError(
                f"The checkpoint was made with batch size {progress['batch_size']}; resume with the same one."
            )
        self.moment, self.done = saved, progress["done"] if progress else total

    def save(self, finished: bool) -> None:
        if self.path is not None:
            self.moment._save(self.path, {} if finished else {"done": self.done, "batch_size": self.batch_size})


def _one_each(name: str, given: object, layers: Sequence[BoundLayer]) -> Sequence:
    """`given`, an argument that has an item for each layer; None stands for as many times None."""
    if given is None:
        return [None] * len(layers)
    if not isinstance(given, list | tuple) or len(given) != len(layers):
        raise RewriteCoreError(f"For {len(layers)} layers `{name}` is a list of as many items, or None.")
    return given


@overload
def collect_second_moment(
    layer: BoundLayer, latents: Tensor, batch_size: int = ..., checkpoint: str | os.PathLike | None = ...,
    progress: bool = ..., latent_seed: int | None = ..., skip_nonfinite: bool = ...,
) -> SecondMoment: ...  # fmt: skip


@overload
def collect_second_moment(
    layer: Sequence[BoundLayer], latents: Tensor, batch_size: int = ...,
    checkpoint: Sequence[str | os.PathLike] | None = ..., progress: bool = ..., latent_seed: int | None = ...,
    skip_nonfinite: bool = ...,
) -> list[SecondMoment]: ...  # fmt: skip


def collect_second_moment(
    layer, latents, batch_size=16, checkpoint=None, progress=True, latent_seed=None, skip_nonfinite=False
):
    """Collect the second moment of a layer's keys over the images of `latents` [N, ...].

    The forward pass stops at the layer; keys are streamed, so memory does not grow with N.

    Args:
        layer: a bound layer, or a list of layers of one generator: they are then collected in one pass, which stops
            at the last of them that the generator reaches, and the result is a list in the same order.
        checkpoint: a file to save the state in every few seconds; if it exists, the collection resumes there and
            ends with the same bits as an uninterrupted one. It holds the finished moment at the end. For a list of
            layers, a list of files, one each.
        latent_seed: recorded in the moment's metadata.
        skip_nonfinite: leave out images whose keys hold NaN or infinity, and count them in ``moment.skipped``.

    Raises:
        NonFiniteError: NaN or infinity in the keys, or keys too large to square; names the batch.
        MismatchError: the checkpoint belongs to another layer, model, batch size or set of latents.
    """
    check_latents(latents)
    if len(latents) == 0 or batch_size < 1:
        raise RewriteCoreError("Collecting a second moment needs at least one latent and a batch size of at least 1.")
    single = isinstance(layer, BoundLayer)
    layers, paths = ([layer], [checkpoint]) if single else (layer, _one_each("checkpoint", checkpoint, layer))
    check_together(layers)
    parts = [_Collection(one, latents, batch_size, latent_seed, path) for one, path in zip(layers, paths)]
    saved_at = time.monotonic()
    start = min(part.done for part in parts)
    label = f"second moment of {', '.join(one.name for one in layers)}"
    with tqdm(total=len(latents), initial=start, desc=label, unit="img", disable=not progress) as bar:
        for first in range(start, len(latents), batch_size):
            batch = latents[first : first + batch_size]
            # each part has a file of its own: a crash may have left some of them further than others
            behind = [part for part in parts if part.done <= first]

            def consume(number: int, capture: Capture) -> None:
                with _batch_named(behind[number].layer, first, len(batch), batch_size):
                    behind[number].moment.update(capture.key, skip_nonfinite)
                behind[number].done = first + len(batch)

            run_to([part.layer for part in behind], batch, consume)
            bar.update(len(batch))
            if first + len(batch) < len(latents) and time.monotonic() - saved_at > 5:
                for part in behind:
                    part.save(finished=False)
                saved_at = time.monotonic()
    for part in parts:
        part.save(finished=True)
    return parts[0].moment if single else [part.moment for part in parts]
