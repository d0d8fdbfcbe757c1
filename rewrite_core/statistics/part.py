"""One layer's part of a collection: its moment, how far it is, and its checkpoint file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileFormatError, MismatchError
from ..files import shown
from ..layers.bound import BoundLayer
from .second_moment import SecondMoment
from .standard_errors import LEAST, KeyErrors
from .sums import Keys, Note, measured


class Part:
    """A layer's moment, how many latents are in it, and its checkpoint file."""

    def __init__(
        self,
        layer: BoundLayer,
        latents: Tensor,
        batch_size: int,
        facts: dict[str, Any],
        path: str | os.PathLike | None,
        keys: Tensor | None,
    ):
        self.layer = layer
        self.batch_size = batch_size
        self.path = path
        self.done = 0
        self._total: Tensor | None = None  # on the GPU, where there is one; `moment` lags behind
        self.keys = None if keys is None else KeyErrors(keys, layer.in_channels)
        if path is not None and Path(path).exists():
            self._resume(path, latents, facts)
        else:  # the fingerprint costs nothing during the first batch
            self.moment = SecondMoment(layer.in_channels, layer.name, groups=layer.groups)
            self.moment.latents = facts

    def _resume(self, path: str | os.PathLike, latents: Tensor, facts: dict[str, Any]) -> None:
        saved, progress, state = SecondMoment._load(path)
        total = len(latents)
        same = saved.layer == self.layer.name and saved.latents.get("fingerprint") == facts["fingerprint"]
        if not same or saved.fingerprint != self.layer.fingerprint(latents):
            raise MismatchError(
                f"The checkpoint {shown(path)} belongs to another layer, model or set of latents; "
                "delete it or name another file."
            )
        if progress and progress["batch_size"] != self.batch_size:
            raise MismatchError(
                f"The checkpoint was made with batch size {progress['batch_size']}; resume with the same one."
            )
        if saved.latents.get("mask") != facts.get("mask"):
            raise MismatchError(
                f"The checkpoint {shown(path)} was made with another mask, or without one; resume with the same one."
            )
        if self.keys is not None and progress:
            self.keys.resume(state, path)
        self.moment, self.done = saved, progress["done"] if progress else saved.latents.get("used", total)
        self.moment.latents = saved.latents | {"count": total}
        if type(self.done) is not int or not 0 <= self.done <= total:
            raise FileFormatError(f"{shown(path)} says that {self.done!r} of {total} latents are in it.")

    def update(self, features: Tensor, mask: Tensor | None, count: int, skip_nonfinite: bool) -> None:
        """Add the key maps of the next `count` latents."""
        part, added = self.moment._add(features, skip_nonfinite, mask)
        if self.keys is not None:
            self.keys.count(self.keys.add(part), added)
            del part  # there is to be one matrix at a time beside the sum
            self._tell_errors(self.keys)
        self.done += count

    def launch(
        self, features: Tensor, counts: Tensor | None, count: int, skip_nonfinite: bool
    ) -> tuple[Tensor, Keys, int]:
        """:meth:`update` on a GPU, without waiting for it, of features that count as `counts` says: what :meth:`settle`
        takes, the first as numbers on the GPU."""
        if self._total is None:
            own = self.moment._sum
            with torch.inference_mode(False):
                # zeros are not worth a copy, for which the host would wait until the first pass is over
                fresh = self.moment.count == 0
                self._total = (
                    own.new_zeros(own.shape, device=features.device) if fresh else own.to(features.device, copy=True)
                )
        part, numbers = measured(features, counts, skip_nonfinite, self.moment.groups)
        self._total += part
        self.done += count
        return numbers, Keys(features.dtype, skip_nonfinite), 0 if self.keys is None else self.keys.add(part)

    def settle(self, note: Note, keys: Keys, group: int) -> None:
        """Count the keys of an update, or raise NonFiniteError."""
        self.moment._count(note, keys)
        if self.keys is not None:
            self.keys.count(group, note.count)

    def gather(self) -> None:
        """Bring `moment` up to date, where every update that was launched is settled."""
        if self._total is not None:
            self.moment._sum.copy_(self._total)
            self.moment._changed()
            if self.keys is not None:
                self._tell_errors(self.keys)

    def _tell_errors(self, keys: KeyErrors) -> None:
        """Set the errors of the moment's keys, where they are known."""
        moment = self.moment
        errors = keys.errors(moment._sum, moment.count, moment._noise)
        if errors is not None:
            moment.key_errors = errors

    @property
    def error(self) -> float:
        """The largest relative standard error, NaN where one is not known."""
        errors = [self.moment.standard_error if self.moment._updates >= LEAST else math.nan]
        if self.keys is not None:
            errors += [math.nan] if self.moment.key_errors is None else self.moment.key_errors.tolist()
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def save(self, finished: bool) -> None:
        """Write the checkpoint file, where there is to be one."""
        if self.path is not None:
            progress = {} if finished else {"done": self.done, "batch_size": self.batch_size}
            self.moment._save(self.path, progress, {} if finished or self.keys is None else self.keys.state)

    def finish(self) -> SecondMoment:
        """The moment of all latents that went in, which the checkpoint file then holds."""
        self.moment.latents.pop("used", None)
        if self.done < self.moment.latents["count"]:
            self.moment.latents["used"] = self.done
        self.save(finished=True)
        return self.moment
