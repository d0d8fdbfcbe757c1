"""The second moment of a layer's keys, C = E[k k^T], collected by streaming (paper, section 3.2)."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..adapters.base import Capture
from ..errors import (
    ArgumentError,
    DiagonalShiftWarning,
    FileFormatError,
    LatentsWarning,
    MismatchError,
    NonFiniteError,
    RewriteCoreError,
    warn,
    whole_number,
)
from ..files import is_npz, load_record, save_record, writable_path
from ..layers.binding import BoundLayer, check_together, run_to
from ..layers.fingerprints import KIND, Trace, tensor_fingerprint
from ..layers.latents import check_latents
from ..ops.spd_solve import SPDFactor, spd_factor
from ..progress import progress_bar
from .streams import SideStream, held_elsewhere, side_stream

_VERSION = 1
_LEAST = 8  # batches before their spread is believed
_NOISE = 2**-24  # the rounding of a float32 product, relative: pivots as large were seen in sums that should have none


def _square(matrix: Tensor) -> Tensor:
    """The squared Frobenius norm, without a matrix of squares."""
    return torch.dot(matrix.flatten(), matrix.flatten())


@dataclass(frozen=True)
class _Keys:
    """What is known of an update's features [images, C, *map] before anything is computed."""

    images: int
    positions: int
    dtype: torch.dtype
    skip_nonfinite: bool


def _measured(features: Tensor, skip_nonfinite: bool) -> tuple[Tensor, Tensor]:
    """The sum over an update's keys, float64 [C, C], and a note, float64 [4]: whether that is finite (1 or 0), its
    squared norm, how many images hold NaN or infinity, the largest magnitude of a feature that was summed.

    All on the features' device, whose results are not waited for: so images are not left out but set to zero.
    """
    with torch.autocast(features.device.type, enabled=False):  # it would widen 16-bit features
        axes = tuple(range(1, features.ndim))
        if features.numel():
            largest = torch.linalg.vector_norm(features, math.inf, axes)  # one read; NaN stays
        else:
            largest = features.new_zeros(len(features))
        bad = largest.isfinite().logical_not()
        if skip_nonfinite:
            features = features.masked_fill(bad.view(-1, *[1 for _ in axes]), 0)
            largest = largest.masked_fill(bad, 0)
        part = ops.second_moment(features)
        finite = part.diagonal().isfinite().all()  # every channel's sum of squares: finite exactly when they are
        largest = largest.max() if len(largest) else finite
        return part, torch.stack([number.double() for number in (finite, _square(part), bad.sum(), largest)])


class SecondMoment:
    """The uncentred second moment of keys with `channels` coordinates, kept as a float64 sum and a count.

    ``layer`` and ``fingerprint`` say which layer of which weights the keys came from (None: unknown, and
    then nothing is checked). ``latents`` is a dict with what is known of the latents, ``skipped`` the number of
    images (or rows) left out for NaN or infinity. ``key_errors``, float64 [n], are the relative standard errors of
    ``solve(keys)`` for the n keys that the collection was given (None: no keys, or too few batches so far).
    """

    def __init__(self, channels: int, layer: str | None = None, fingerprint: str | None = None):
        channels = whole_number("A second moment's number of channels", channels)
        with torch.inference_mode(False):  # or it could not be written in place outside
            self._sum = torch.zeros(channels, channels, dtype=torch.float64, device="cpu")
        self.count = 0
        self.skipped = 0
        self.layer = layer
        self.fingerprint = fingerprint
        self.latents: dict = {}
        self.key_errors: Tensor | None = None
        self._groups = 0  # updates, and the sum over them of |S|^2 / n, S the sum over the n keys of one
        self._spread = 0.0
        self._factor: SPDFactor | None = None
        self._wide = True  # all keys were float64
        self._blocks = 1  # of channels, with zeros between them: see within_groups

    @property
    def channels(self) -> int:
        return len(self._sum)

    def __repr__(self) -> str:
        return f"SecondMoment({self.channels} channels, {self.count} keys, layer={self.layer!r})"

    def update(self, features: Tensor, skip_nonfinite: bool = False) -> None:
        """Add keys: [N, C, *map] (each position is one key) or [N, C]; float16/32/64 or bfloat16, any strides.

        With `skip_nonfinite`, images (or rows) that hold NaN or infinity are left out and counted in ``skipped``.
        Waits for the features where they are on a GPU; :func:`collect_second_moment` does not.
        Raises NonFiniteError (and leaves the moment as it was) on NaN and infinity otherwise, and on values too
        large to square. Each update counts as one independent sample in :attr:`standard_error`.
        """
        self._add(features, skip_nonfinite)

    def _add(self, features: Tensor, skip_nonfinite: bool) -> tuple[Tensor, int]:
        """:meth:`update`; returns the sum over the keys that were added, float64 [C, C], and their number."""
        features, about = self._readable(features, skip_nonfinite)
        part = ops.second_moment(features) if features.device.type == "cpu" else None
        if part is not None and part.diagonal().isfinite().all():  # a look that costs nothing on a CPU
            count = self._count([1, _square(part).item(), 0, 0], about)
        else:
            del part
            part, note = _measured(features, skip_nonfinite)
            count = self._count(note.tolist(), about)
            part = part.to(self._sum.device)
        self._sum += part
        return part, count

    def _readable(self, features: Tensor, skip_nonfinite: bool) -> tuple[Tensor, _Keys]:
        """The features as the operation reads them, which takes rows and images."""
        if not isinstance(features, Tensor):
            raise ArgumentError(f"Features must be a torch tensor, not {type(features).__name__}; use torch.as_tensor.")
        if features.is_nested:
            raise ArgumentError(
                "Features must be a plain tensor, not a nested one; update with its parts, one at a time."
            )
        if features.ndim < 2 or features.shape[1] != self.channels:
            raise RewriteCoreError(
                f"This second moment takes features [N, {self.channels}, *map] or [N, {self.channels}], "
                f"not {list(features.shape)}."
            )
        features = features.detach()
        about = _Keys(len(features), math.prod(features.shape[2:]), features.dtype, skip_nonfinite)
        return features.flatten(2)[..., None] if features.ndim == 3 or features.ndim > 4 else features, about

    def _count(self, note: Sequence[float], about: _Keys) -> int:
        """Count the keys of an update that :func:`_measured` has left a note of; returns their number."""
        finite, square, bad, largest = note
        if not finite:
            if math.isfinite(largest):
                raise NonFiniteError(
                    f"The features are as large as {largest:.0e} and their squares overflow {about.dtype}; "
                    "scale them down or pass them as float64."
                )
            raise NonFiniteError(
                "The features hold NaN or infinity; leave those images out with skip_nonfinite=True.",
                advice={"skip_nonfinite": True},
            )
        count = (about.images - int(bad)) * about.positions
        self.count += count
        self.skipped += int(bad)
        if count:
            self._groups += 1
            self._spread += square / count
            self._wide = self._wide and about.dtype == torch.float64
        self._factor = self.key_errors = None
        return count

    def matrix(self) -> Tensor:
        """C = sum / count, float64 [C, C]."""
        if self.count == 0:
            if self.skipped:
                raise RewriteCoreError(
                    f"This second moment holds no keys: all {self.skipped} images were left out for NaN or infinity."
                )
            raise RewriteCoreError("This second moment holds no keys yet; update or collect it first.")
        return self._sum / self.count

    def within_groups(self, groups: int) -> SecondMoment:
        """This moment with zeros between groups of channels: what bears on a grouped convolution, each of whose groups
        has keys of its own. Itself for one group."""
        if groups == 1:
            return self
        moment = SecondMoment(self.channels, self.layer, self.fingerprint)
        blocks = (rows.chunk(groups, 1)[j] for j, rows in enumerate(self._sum.chunk(groups)))
        moment._sum.copy_(torch.block_diag(*blocks))
        moment.count, moment._wide, moment._blocks = self.count, self._wide, groups
        return moment

    @property
    def standard_error(self) -> float:
        """The relative standard error of C, sqrt(E|C - C_true|^2) / |C| in the Frobenius norm, NaN where unknown.

        From the spread of the updates, taken as independent samples (batches of different images), by a one-way
        analysis of variance: it needs their |S|^2 / n and the total only. Merged moments count with all their updates.
        """
        if self._groups < 2 or self.count == 0:
            return math.nan
        square = _square(self._sum).item()
        # of one key's worth; a difference that rounding can make negative
        variance = max(self._spread - square / self.count, 0.0) / (self._groups - 1)
        return math.sqrt(variance * self.count / square) if square else 0.0

    @property
    def factor(self) -> SPDFactor:
        """The Cholesky factor of C, computed once and kept until the next update; ``.shift`` is the diagonal
        shift that a rank-deficient C needed (0 otherwise), ``.condition`` an estimate. Unless all keys were float64, C is
        a sum of float32 products, and what is below their rounding counts as rank-deficient."""
        if self._factor is None:
            self._factor = spd_factor(self.matrix(), noise=self._noise, rank=self.count * self._blocks)
        return self._factor

    @property
    def _noise(self) -> float:
        """How exact an entry C_ij is, relative to sqrt(C_ii C_jj)."""
        return 0.0 if self._wide else _NOISE

    def solve(self, keys: Tensor) -> Tensor:
        """C^-1 k for each row of `keys` [n, C] (or one key [C]); float64, same shape (paper, eq. 14)."""
        if not isinstance(keys, Tensor) or keys.is_nested:
            what = "a nested one" if isinstance(keys, Tensor) else type(keys).__name__
            raise ArgumentError(f"Keys must be a plain torch tensor, not {what}; use torch.as_tensor, or torch.stack.")
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
            if not self.fingerprint.startswith(KIND):
                raise MismatchError(
                    "The second moment is from an earlier version of rewrite_core, which knew weights by another kind "
                    "of fingerprint; collect it again."
                )
            if self.fingerprint != layer.fingerprint(latents):
                raise MismatchError(
                    f"The second moment was collected with other weights before {layer.name!r} (another model, "
                    "another truncation, or an edit to an earlier layer); collect it again."
                )

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add the keys of `other`, in place; returns self. Raises MismatchError for another layer or model, and
        warns where both were collected from the same latents, whose keys then count twice."""
        if not isinstance(other, SecondMoment):
            raise ArgumentError(
                f"A second moment merges with another, not with {type(other).__name__}; update it with features."
            )
        joined = self._joined([self._facts(), other._facts()])
        self._sum += other._sum.to(self._sum.device)
        vars(self).update(joined)
        return self

    def all_reduce(self, group=None) -> SecondMoment:
        """Sum over the processes of a ``torch.distributed`` group, in place; returns self. Raises and warns on every
        process as :meth:`merge` does.

        What one process makes of all latents is met to 1e-12 where every process has whole batches of them; else to 1e-8
        in float32, as a batch's sum rounds by where the batch begins.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RewriteCoreError("all_reduce needs torch.distributed; call init_process_group first.")
        facts: list[dict] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(facts, self._facts(), group=group)
        joined = self._joined(facts)
        total = self._sum.to("cuda" if dist.get_backend(group) == "nccl" else "cpu", copy=True)
        dist.all_reduce(total, group=group)
        self._sum.copy_(total)
        vars(self).update(joined)
        return self

    def _facts(self) -> dict:
        """All there is to a moment but its sum; ``latents`` is a list of what is known of each set of them."""
        return {
            "channels": self.channels,
            "layer": self.layer,
            "fingerprint": self.fingerprint,
            "latents": self.latents.get("merged", [self.latents] if self.count else []),
            "count": self.count,
            "skipped": self.skipped,
            "groups": self._groups,
            "spread": self._spread,
            "wide": self._wide,
        }

    @staticmethod
    def _joined(facts: list[dict]) -> dict:
        """The attributes, but for the sum itself, of the sum of the moments that `facts` tell of."""
        joined = {"_factor": None, "key_errors": None, "_wide": all(fact["wide"] for fact in facts)}
        for name in ("channels", "layer", "fingerprint"):
            values = list(dict.fromkeys(fact[name] for fact in facts if fact[name] is not None))
            if len(values) > 1:
                raise MismatchError(
                    f"These second moments differ in {name} ({values[0]!r}, {values[1]!r}) and do not add up."
                )
            if name != "channels":
                joined[name] = values[0] if values else None
        known = [{part.get("fingerprint") for part in fact["latents"]} - {None} for fact in facts]
        if sum(map(len, known)) > len(set().union(*known)):
            warn(
                "These second moments were collected from the same latents, whose keys now count twice; "
                "merge moments of different latents.",
                LatentsWarning,
            )
        sets = [part for fact in facts for part in fact["latents"]]
        joined["latents"] = sets[0] if len(sets) == 1 else {"merged": sets}
        sums = {name: sum(fact[name] for fact in facts) for name in ("count", "skipped", "groups", "spread")}
        return joined | {
            "count": sums["count"],
            "skipped": sums["skipped"],
            "_groups": sums["groups"],
            "_spread": sums["spread"],
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write ``sum`` and its metadata as safetensors, all or nothing."""
        self._save(path, {}, {})

    def _save(self, path: str | os.PathLike, progress: dict, state: dict[str, Tensor]) -> None:
        metadata = {
            "count": self.count,
            "skipped": self.skipped,
            "layer": self.layer,
            "fingerprint": self.fingerprint,
            "latents": self.latents,
            "groups": self._groups,
            "spread": None if math.isnan(self._spread) else self._spread,
            "wide": self._wide,
            "key_errors": None if self.key_errors is None else self.key_errors.tolist(),
            "progress": progress,
        }
        save_record(path, "second_moment", _VERSION, {"sum": self._sum.cpu(), **state}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, layer: BoundLayer | None = None) -> SecondMoment:
        """Read a saved second moment, or the reference implementation's ``r2m.npz`` (told apart by their content).

        With `layer`, its name and channels are checked at once; the weights are checked when it is used.
        Raises FileFormatError on a truncated or foreign file.
        """
        moment, progress, _ = cls._load(path)
        if progress:
            raise FileFormatError(
                f"{os.fspath(path)} is a checkpoint of an unfinished collection; "
                "resume it with collect_second_moment(checkpoint=...).",
                advice={"collect_second_moment(checkpoint=...)": None},
            )
        if layer is not None:
            moment.check(layer)
        return moment

    @classmethod
    def _load(cls, path: str | os.PathLike) -> tuple[SecondMoment, dict, dict[str, Tensor]]:
        """A moment, and of a checkpoint how far it is and the state of the errors of its keys."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        if is_npz(path):
            return cls._load_npz(path), {}, {}
        with torch.inference_mode(False):  # or it could not be written in place outside
            tensors, metadata = load_record(path, "second_moment", _VERSION)
        total = tensors.pop("sum", None)
        count, skipped, groups = metadata.get("count"), metadata.get("skipped", 0), metadata.get("groups", 0)
        if total is None or total.ndim != 2 or not 0 < len(total) == total.shape[1] or total.dtype != torch.float64:
            raise FileFormatError(f"{path} holds no float64 [C, C] tensor 'sum'.")
        if (
            any(type(number) is not int or number < 0 for number in (count, skipped, groups))
            or not torch.isfinite(total).all()
        ):
            raise FileFormatError(f"{path} holds no finite sum with its counts.")
        layer, fingerprint = metadata.get("layer"), metadata.get("fingerprint")
        latents, progress = metadata.get("latents") or {}, metadata.get("progress") or {}
        spread, errors, wide = metadata.get("spread"), metadata.get("key_errors"), metadata.get("wide", False)
        if not (
            all(isinstance(text, str | None) for text in (layer, fingerprint))
            and all(isinstance(record, dict) for record in (latents, progress))
            and isinstance(spread, float | None)
            and isinstance(wide, bool)
            and (errors is None or (isinstance(errors, list) and all(isinstance(error, float) for error in errors)))
            and sorted((name, type(value)) for name, value in progress.items())
            in ([], [("batch_size", int), ("done", int)])
        ):
            raise FileFormatError(f"{path} has metadata of the wrong types.")
        moment = cls(1, layer, fingerprint)
        moment._sum = total.clone()  # what was read may be the file itself, mapped into memory
        moment.count, moment.skipped, moment.latents = count, skipped, latents
        moment._groups, moment._spread, moment._wide = groups, math.nan if spread is None else spread, wide
        moment.key_errors = None if errors is None else torch.tensor(errors, dtype=torch.float64, device="cpu")
        return moment, progress, tensors

    @classmethod
    def _load_npz(cls, path: Path) -> SecondMoment:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                # same_kind: no numbers made of strings or complex numbers
                total, count = arrays["mom2"].astype(np.float64, casting="same_kind"), int(arrays["count"])
        except Exception as error:  # numpy raises anything from BadZipFile to KeyError here
            raise FileFormatError(
                f"{path} is not the reference's r2m.npz ({type(error).__name__}: {error})."
            ) from error
        if total.ndim != 2 or not 0 < len(total) == total.shape[1] or count < 1 or not np.isfinite(total).all():
            raise FileFormatError(f"{path} does not hold a finite [C, C] 'mom2' with its count.")
        moment = cls(len(total))
        moment._sum.copy_(torch.from_numpy((total + total.T) / 2))  # a float32 sum's triangles differ
        moment.count, moment._spread, moment._wide = count, math.nan, False
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


def stream_keys(
    layer: BoundLayer,
    latents: Tensor,
    batch_size: int,
    start: int,
    progress: bool,
    label: str,
    consume: Callable[[Tensor, int], None],
) -> None:
    """Feed the key maps of latents[start:], batch by batch, to `consume(keys, rows done)`, which must raise
    NonFiniteError on NaN or infinity; the batch is then named."""
    with progress_bar(total=len(latents), start=start, label=label, unit="img", show=progress) as bar:
        for first in range(start, len(latents), batch_size):
            batch = latents[first : first + batch_size]
            with _batch_named(layer, first, len(batch), batch_size):
                consume(layer.keys(batch), first + len(batch))
            bar.update(len(batch))


class _KeyErrors:
    """The relative standard errors of d = C^-1 k for a few keys k, in n x C numbers for each of ``GROUPS`` groups.

    Where C changes by E, d changes by -C^-1 E d. So whenever the number of batches has doubled, d is solved for, and
    from then on S d is summed over the batches (S: a batch's sum of k k^T), in groups. At the next doubling the
    spread of the groups, sent through C^-1, is the variance that one key's worth of data leaves in d; the error is that
    over the number of keys, and its root taken. First order in E: too low while d itself is off by tens of percent.
    """

    GROUPS = 32

    def __init__(self, keys: Tensor, channels: int):
        keys = torch.atleast_2d(keys).detach().to(device="cpu", dtype=torch.float64)
        if keys.ndim != 2 or keys.shape[1] != channels or len(keys) == 0:
            raise RewriteCoreError(f"Keys are rows [n, {channels}], not {list(keys.shape)}.")
        if not torch.isfinite(keys).all() or not keys.any(1).all():
            raise NonFiniteError("The keys hold NaN or infinity, or only zeros, whose error is relative to nothing.")
        self._keys = keys
        self._device = keys.device  # where the batches are, and so these two
        self._directions = torch.zeros_like(keys)
        self._products = torch.zeros(self.GROUPS, *keys.shape, dtype=torch.float64, device="cpu")
        self._counts = [0] * self.GROUPS
        self._batches = 0
        self._variances = torch.full((len(keys),), torch.nan, dtype=torch.float64, device="cpu")
        self._solved = False
        self._evaluated = 0  # after so many batches, last

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, on the CPU."""
        return {
            "keys": self._keys,
            "directions": self._directions.cpu(),
            "products": self._products.cpu(),
            "counts": torch.tensor(self._counts, device="cpu"),
            "batches": torch.tensor(self._batches, device="cpu"),
            "variances": self._variances,
        }

    def resume(self, state: dict[str, Tensor], path: str | os.PathLike) -> None:
        """Go on from a checkpoint's state."""
        if not torch.equal(state.get("keys", torch.empty(0)), self._keys):
            raise MismatchError(
                f"The checkpoint {os.fspath(path)} was made with other keys; resume with the same ones."
            )
        for name, tensor in self.state.items():
            saved = state.get(name)
            if saved is None or (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                raise FileFormatError(f"{os.fspath(path)} holds no whole state of its keys' errors.")
        self._directions, self._products = state["directions"].clone(), state["products"].clone()
        self._variances = state["variances"].clone()
        self._counts, self._batches = state["counts"].tolist(), int(state["batches"])
        self._solved = bool(self._directions.any())

    @property
    def due(self) -> bool:
        """Whether :meth:`tell` has to be called before the next batch."""
        batches = self._batches
        return batches >= _LEAST and batches & (batches - 1) == 0 and batches != self._evaluated

    def add(self, part: Tensor) -> int:
        """Take in a batch: its sum [C, C]. Returns its group, to :meth:`count` its keys in. Waits for a GPU the
        first time at most."""
        group = self._batches % self.GROUPS
        self._batches += 1
        if self._device != part.device:
            self._device = part.device
            self._directions, self._products = self._directions.to(part.device), self._products.to(part.device)
        if self._solved:
            self._products[group] += self._directions @ part
        return group

    def count(self, group: int, count: int) -> None:
        """Count the keys of a batch that was added."""
        if self._solved:
            self._counts[group] += count

    def tell(self, moment: SecondMoment) -> None:
        """Set the errors of `moment`, which holds all batches that were taken in, where they are known."""
        if self.due and moment.count >= moment.channels:
            self._evaluate(moment)
        if not self._variances.isnan().any():
            moment.key_errors = (self._variances / moment.count).sqrt()

    def _evaluate(self, moment: SecondMoment) -> None:
        with warnings.catch_warnings():  # whoever solves with the result is told
            warnings.simplefilter("ignore", DiagonalShiftWarning)
            factor = spd_factor(
                moment._sum, noise=moment._noise
            )  # N C, as a copy to divide by N would be one matrix more

        def solve(rhs: Tensor) -> Tensor:
            return factor.solve(rhs).mul_(moment.count)

        counts = torch.tensor(self._counts, dtype=torch.float64, device="cpu")
        used = counts > 0
        if used.any():
            counts, products = counts[used], self._products.cpu()[used]
            spread = solve(products.flatten(0, 1).T).T.reshape(products.shape)
            total = spread.sum(0).square().sum(1) / counts.sum()
            between = (spread.square().sum(2) / counts[:, None]).sum(0) - total
            variances = between.clamp(min=0) / (len(counts) - 1)
            self._variances = variances / self._directions.cpu().square().sum(1)
        self._directions = solve(self._keys.T).T.to(self._device, memory_format=torch.contiguous_format)
        self._products.zero_()
        self._counts = [0] * self.GROUPS
        self._solved, self._evaluated = True, self._batches


class _Collection:
    """One layer's part of a collection: its moment, how many latents are in it, and its checkpoint file."""

    def __init__(
        self,
        layer: BoundLayer,
        latents: Tensor,
        batch_size: int,
        seed: int | None,
        path: str | os.PathLike | None,
        keys: Tensor | None,
    ):
        self.layer = layer
        self.batch_size = batch_size
        self.path = path
        self.done = 0
        self._total: Tensor | None = None  # on the GPU, where there is one; `moment` lags behind
        self.keys = None if keys is None else _KeyErrors(keys, layer.in_channels)
        facts = {"count": len(latents), "seed": seed, "fingerprint": tensor_fingerprint(latents)}
        if path is not None and Path(path).exists():
            self._resume(latents, facts)
        else:  # the fingerprint costs nothing during the first batch
            self.moment = SecondMoment(layer.in_channels, layer.name)
            self.moment.latents = facts

    def _resume(self, latents: Tensor, facts: dict) -> None:
        saved, progress, state = SecondMoment._load(self.path)
        total = len(latents)
        same = saved.layer == self.layer.name and saved.latents.get("fingerprint") == facts["fingerprint"]
        if not same or saved.fingerprint != self.layer.fingerprint(latents):
            raise MismatchError(
                f"The checkpoint {os.fspath(self.path)} belongs to another layer, model or set of latents; "
                "delete it or name another file."
            )
        if progress and progress["batch_size"] != self.batch_size:
            raise MismatchError(
                f"The checkpoint was made with batch size {progress['batch_size']}; resume with the same one."
            )
        if self.keys is not None and progress:
            self.keys.resume(state, self.path)
        self.moment, self.done = saved, progress["done"] if progress else saved.latents.get("used", total)
        if type(self.done) is not int or not 0 <= self.done <= total:
            raise FileFormatError(f"{os.fspath(self.path)} says that {self.done!r} of {total} latents are in it.")

    def update(self, keys: Tensor, count: int, skip_nonfinite: bool) -> None:
        """Add the key maps of the next `count` latents."""
        part, added = self.moment._add(keys, skip_nonfinite)
        if self.keys is not None:
            self.keys.count(self.keys.add(part), added)
            del part  # there is to be one matrix at a time beside the sum
            self.keys.tell(self.moment)
        self.done += count

    def launch(self, keys: Tensor, count: int, skip_nonfinite: bool) -> tuple[Tensor, _Keys, int]:
        """:meth:`update` on a GPU, without waiting for it: what :meth:`settle` takes, the first on the GPU."""
        features, about = self.moment._readable(keys, skip_nonfinite)
        if self._total is None:
            with torch.inference_mode(False):
                self._total = self.moment._sum.to(keys.device, copy=True)
        part, note = _measured(features, skip_nonfinite)
        self._total += part
        self.done += count
        return note, about, 0 if self.keys is None else self.keys.add(part)

    def settle(self, note: Sequence[float], about: _Keys, group: int) -> None:
        """Count the keys of an update, or raise NonFiniteError."""
        count = self.moment._count(note, about)
        if self.keys is not None:
            self.keys.count(group, count)

    def gather(self) -> None:
        """Bring `moment` up to date, where every update that was launched is settled."""
        if self._total is not None:
            self.moment._sum.copy_(self._total)
            if self.keys is not None:
                self.keys.tell(self.moment)

    @property
    def error(self) -> float:
        """The largest relative standard error, NaN where one is not known."""
        errors = [self.moment.standard_error if self.moment._groups >= _LEAST else math.nan]
        if self.keys is not None:
            errors += [math.nan] if self.moment.key_errors is None else self.moment.key_errors.tolist()
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def save(self, finished: bool) -> None:
        if self.path is not None:
            progress = {} if finished else {"done": self.done, "batch_size": int(self.batch_size)}
            self.moment._save(self.path, progress, {} if finished or self.keys is None else self.keys.state)

    def finish(self) -> SecondMoment:
        self.moment.latents.pop("used", None)
        if self.done < self.moment.latents["count"]:
            self.moment.latents["used"] = self.done
        self.save(finished=True)
        return self.moment


@dataclass(frozen=True)
class _Launched:
    """An update that runs on a GPU: `note` is there once `mark` has happened."""

    part: _Collection
    note: Tensor
    about: _Keys
    group: int
    first: int
    count: int
    mark: torch.cuda.Event


class _Ahead:
    """The updates of a collection on a GPU, which run on a stream of their own beside the next forward pass, and of
    which the host learns afterwards whether they were finite. It does not wait for them, unless it has to save.

    *Memory.* The maps of a pass's last layer are kept until the next pass has come as far, and its stream then waits for
    their update: so there is one of them beside the pass's own, however far the host is ahead. (``record_stream`` would
    let it run ahead of what can be used again, and allocate more and more.) Into the maps of earlier layers, and into
    any that it holds on to, the generator may write: its stream waits for these before it goes on.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._launched: deque[_Launched] = deque()
        self._kept: tuple[Tensor, SideStream, torch.cuda.Stream, torch.cuda.Event] | None = None

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.release()
        if isinstance(error, Exception):  # which an earlier batch may have to do with
            self.wait()

    def launch(
        self,
        side: SideStream,
        part: _Collection,
        keys: Tensor,
        first: int,
        count: int,
        skip_nonfinite: bool,
        last: bool,
    ) -> None:
        """Update `part` with the key maps of `count` latents from `first` on; `last`: the pass ends with them."""
        self.release()
        origin = side.current()
        with side.after(origin):
            note, about, group = part.launch(keys, count, skip_nonfinite)
            note = side.fetch(note)
        mark = side.mark()
        self._launched.append(_Launched(part, note, about, group, first, count, mark))
        self._kept = keys.detach(), side, origin, mark  # detached: without what it is a view of
        if not last:
            self.release()

    def passed(self) -> None:
        """To be called after each pass."""
        if self._kept is not None and held_elsewhere(self._kept[0]):
            self.release()
        while self._launched and self._launched[0].mark.query():
            self._settle()

    def release(self) -> None:
        """Let go of the maps that are kept, whose memory is written to after their update only."""
        if self._kept is not None:
            _, side, origin, mark = self._kept
            side.hold(origin, mark)
            side.hold(side.current(), mark)
            self._kept = None

    def wait(self) -> None:
        """Wait for all updates. Raises NonFiniteError for the first that was not finite."""
        while self._launched:
            self._launched[0].mark.synchronize()
            self._settle()

    def _settle(self) -> None:
        one = self._launched.popleft()
        try:
            with _batch_named(one.part.layer, one.first, one.count, self._batch_size):
                one.part.settle(one.note.tolist(), one.about, one.group)
        except NonFiniteError:
            self._launched.clear()  # nobody asks for them any more
            raise


def _looked_at(batches: int) -> bool:
    """Whether `until` is looked at after so many batches on a GPU, which then has to be waited for: after every one of
    the first 32, then at every 16th part of what there is. By their number alone, for resumed collections to agree."""
    return batches % max(1, batches // 16) == 0


def _one_each(name: str, given: object, layers: Sequence[BoundLayer]) -> Sequence:
    """`given`, an argument that has an item for each of ``layers=[...]``; None stands for as many times None."""
    if given is None:
        return [None] * len(layers)
    if not isinstance(given, list | tuple) or len(given) != len(layers):
        raise RewriteCoreError(f"For {len(layers)} layers `{name}` is a list of as many items, or None.")
    return given


@overload
def collect_second_moment(
    layer: BoundLayer,
    latents: Tensor,
    batch_size: int = ...,
    checkpoint: str | os.PathLike | None = ...,
    progress: bool = ...,
    latent_seed: int | None = ...,
    skip_nonfinite: bool = ...,
    until: float | None = ...,
    keys: Tensor | None = ...,
    layers: None = ...,
) -> SecondMoment: ...


@overload
def collect_second_moment(
    *,
    layers: Sequence[BoundLayer],
    latents: Tensor,
    batch_size: int = ...,
    checkpoint: Sequence[str | os.PathLike] | None = ...,
    progress: bool = ...,
    latent_seed: int | None = ...,
    skip_nonfinite: bool = ...,
    until: float | None = ...,
    keys: Sequence[Tensor | None] | None = ...,
) -> list[SecondMoment]: ...


def collect_second_moment(
    layer: BoundLayer | None = None,
    latents: Tensor | None = None,
    batch_size: int = 16,
    checkpoint: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    progress: bool = True,
    latent_seed: int | None = None,
    skip_nonfinite: bool = False,
    until: float | None = None,
    keys: Tensor | Sequence[Tensor | None] | None = None,
    layers: Sequence[BoundLayer] | None = None,
) -> SecondMoment | list[SecondMoment]:
    """Collect the second moment of a layer's keys over the images of `latents` [N, ...].

    ``collect_second_moment(layer, latents)`` for one layer; ``collect_second_moment(layers=[a, b], latents=latents)``
    for several of one generator, in one pass.

    The forward pass stops at the layer; keys are streamed and read where they lie, so memory does not grow with N:
    beside the sum [C, C] in float64 there is one more such matrix at a time (with `keys` up to four where C is
    rank-deficient), and the activations of one batch.

    On a GPU the updates run on a stream of their own beside the next forward pass, while one batch's key maps of the
    last layer are kept, and `skip_nonfinite` takes a copy of a batch's keys. The host waits for none of it, but for a
    checkpoint, what `until` and `keys` ask for, and the end: so an error may name a batch some batches ago.

    Args:
        layer: a bound layer.
        latents: [N, ...] on any device; batches of them are moved to the generator's.
        batch_size: images at a time.
        checkpoint: a file to save the state in every few seconds; if it exists, the collection resumes there and
            ends with the same bits as an uninterrupted one on as many threads. It holds the finished moment at the
            end. For `layers`, a list of files, one each.
        progress: show a bar with the rate, the time left and the error so far, where stderr is a terminal.
        latent_seed: recorded in the moment's metadata.
        skip_nonfinite: leave out images whose keys hold NaN or infinity, and count them in ``moment.skipped``.
        until: stop when the relative standard error of C, and of C^-1 k for each of `keys`, is this or less (0.01:
            one percent); after 8 batches at the earliest, and 16 with `keys`. The latents must be in random order.
            ``moment.standard_error`` and ``moment.key_errors`` say what was reached, and ``moment.latents["used"]``
            how many latents went in where not all did. On a GPU it is looked at after each of the first 32 batches, then
            each time there are a 16th more. A checkpoint that stopped before what `until` asks for goes on.
        keys: rows [n, C] (or one key [C]) to give the error of C^-1 k for; for `layers`, a list, one each.
        layers: in place of `layer`, a list of layers of one generator: the pass stops at the last of them that the
            generator reaches, and the result is a list in the same order.

    Raises:
        NonFiniteError: NaN or infinity in the keys, or keys too large to square; names the batch.
        MismatchError: the checkpoint belongs to another layer, model, batch size, set of latents or set of `keys`.
        OSError: the checkpoint cannot be written there; found before anything runs.
    """
    single = isinstance(layer, BoundLayer) and layers is None
    several = layer is None and isinstance(layers, list | tuple) and all(isinstance(one, BoundLayer) for one in layers)
    if not single and not several:
        raise RewriteCoreError(
            "Give one bound layer, collect_second_moment(layer, latents), or a list of them by name, "
            "collect_second_moment(layers=[a, b], latents=latents)."
        )
    check_latents(latents)
    if len(latents) == 0 or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise RewriteCoreError("Collecting a second moment needs at least one latent and a batch size of at least 1.")
    if until is not None and not until > 0:
        raise RewriteCoreError(f"`until` is the relative error to stop at, such as 0.01, and not {until}.")
    layers, paths, targets = [layer] if single else layers, [checkpoint], [keys]
    check_together(layers)
    if several:
        paths, targets = _one_each("checkpoint", checkpoint, layers), _one_each("keys", keys, layers)
    files = [writable_path(path) for path in paths if path is not None]
    if len(set(files)) < len(files):
        raise RewriteCoreError("Two of the layers have the same checkpoint file: give each its own.")
    parts = [
        _Collection(one, latents, batch_size, latent_seed, path, few)
        for one, path, few in zip(layers, paths, targets, strict=True)
    ]
    beside = side_stream(layers[0].parameter.device) is not None
    ahead = _Ahead(batch_size)

    def gather() -> None:
        ahead.wait()
        for part in parts:
            part.gather()

    saved_at = time.monotonic()
    start = min(part.done for part in parts)
    label = f"second moment of {', '.join(one.name for one in layers)}"
    with (
        progress_bar(total=len(latents), start=start, label=label, unit="img", show=progress) as bar,
        ahead,
    ):
        first = start
        while first < len(latents):
            # each part has a file of its own, which a crash or `until` may have left further than others: the batch ends
            # where the next of them goes on
            behind = [part for part in parts if part.done <= first]
            end = min([first + batch_size, *(part.done for part in parts if part.done > first)])
            if until is not None and len(behind) == len(parts) and (not beside or _looked_at(first // batch_size)):
                gather()
                if all(part.error <= until for part in parts):
                    break
            batch = latents[first:end]
            left = len(behind)

            def consume(number: int, capture: Capture) -> None:
                nonlocal left
                left -= 1
                part, key = behind[number], capture.key
                side = side_stream(key.device)
                with _batch_named(part.layer, first, len(batch), batch_size):
                    if side is None:
                        part.update(key, len(batch), skip_nonfinite)
                    else:
                        ahead.launch(side, part, key, first, len(batch), skip_nonfinite, last=left == 0)

            reached = [part.layer for part in behind]
            if all(part.moment.fingerprint is not None for part in behind):
                run_to(reached, batch, consume)
            else:
                with Trace(reached, batch) as trace:
                    run_to(reached, batch, consume, trace)
                for number, part in enumerate(behind):
                    part.moment.fingerprint = trace.fingerprint(number)
            ahead.passed()
            if beside and any(part.keys is not None and part.keys.due for part in behind):
                gather()
            due = first + len(batch) < len(latents) and time.monotonic() - saved_at > 5
            if due:
                if not bar.disable or any(part.path is not None for part in behind):
                    gather()
                for part in behind:
                    part.save(finished=False)
                saved_at = time.monotonic()
            if progress and (due or not beside) and not math.isnan(error := max(part.error for part in parts)):
                bar.set_postfix_str(f"error {error:.2%}", refresh=False)
            bar.update(len(batch))
            first += len(batch)
        gather()
    moments = [part.finish() for part in parts]
    return moments[0] if single else moments
