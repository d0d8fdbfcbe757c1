"""The second moment of a layer's keys, C = E[k k^T] (paper, section 3.2): a sum and a count that add up."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import (
    ArgumentError,
    FileFormatError,
    LatentsWarning,
    MismatchError,
    NonFiniteError,
    RewriteCoreError,
    quoted,
    warn,
    whole_number,
)
from ..files import shown
from ..layers.bound import BoundLayer
from ..layers.fingerprints import KIND
from ..layers.latents import LatentRecipe, check_latents, recipe_of
from ..ops.finite import all_finite
from ..ops.spd_solve_op.factor import SPDFactor
from ..waits import sent
from . import blocks, moment_file
from .checks import check_layer, what_is
from .shards import joined_latents
from .standard_errors import relative_error
from .sums import Keys, Note, checked, masked, measured, positions, square, sum_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NOISE = 2**-24  # the rounding of a float32 product, relative: pivots as large were seen in sums that should have none


class _Made:
    """What was made of a moment's sum as it is. A moment that changes takes another one, so that what a thread still
    makes of the sum as it was stays with that."""

    def __init__(self) -> None:
        self.factor: SPDFactor | None = None
        self.elsewhere: dict[torch.device, SecondMoment] = {}  # copies on other devices
        self.grouped: dict[int, SecondMoment] = {}
        self.known: tuple[str, float] | None = None  # see SecondMoment.remembered


class SecondMoment:
    """The uncentred second moment of keys with `channels` coordinates, kept as a float64 sum and a count.

    ``layer`` and ``fingerprint`` say which layer of which weights the keys came from (None: unknown, and
    then nothing is checked). ``latents`` is a dict with what is known of the latents, ``skipped`` the number of
    images (or rows) left out for NaN or infinity. ``key_errors``, float64 [n], are the relative standard errors of
    ``solve(keys)`` for the n keys that the collection was given (None: no keys, or too few batches so far).

    A grouped convolution multiplies each group of its channels by weights of its own, and needs of C the blocks of
    channels of one group only: with `groups` no more is summed and kept, and the rest of C counts as zero.
    """

    def __init__(self, channels: int, layer: str | None = None, fingerprint: str | None = None, groups: int = 1):
        channels = whole_number("A second moment's number of channels", channels)
        groups = whole_number("A second moment's number of groups", groups, most=channels)
        if channels % groups:
            raise RewriteCoreError(f"{channels} channels do not fall into {groups} groups of the same size.")
        for name, text in (("layer", layer), ("fingerprint", fingerprint)):
            if not isinstance(text, str | None):
                raise ArgumentError(
                    f"A second moment's {name} is text, or None where it is not known, not {what_is(text)}."
                )
        with torch.inference_mode(False):  # or it could not be written in place outside
            self._sum = torch.zeros(blocks.empty(channels, groups), dtype=torch.float64, device="cpu")
        self.count = 0
        self.skipped = 0
        self.layer = layer
        self.fingerprint = fingerprint
        self.latents: dict[str, Any] = {}
        self.key_errors: Tensor | None = None
        self._updates = 0  # updates, and the sum over them of |S|^2 / n, S the sum over the n keys of one
        self._spread = 0.0
        self._made = _Made()
        self._wide = True  # all keys were float64
        self._parts = 1  # for `along`: groups that its coordinates mix

    @property
    def channels(self) -> int:
        return blocks.channels_of(self._sum)

    @property
    def groups(self) -> int:
        """Groups of channels, with nothing summed between them: 1, or those of a grouped convolution."""
        return blocks.groups_of(self._sum)

    def __repr__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"SecondMoment({self.channels} channels{groups}, {self.count} keys, layer={quoted(self.layer)})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": _Made()}

    def update(self, features: Tensor, skip_nonfinite: bool = False, mask: Tensor | None = None) -> None:
        """Add keys: [N, C, *map] (each position is one key) or [N, C]; float16/32/64 or bfloat16, any strides.

        `mask` [N, *map] says which positions count: booleans, or whole numbers, of which 0 means that a position does
        not. So padding stays out: ``moment.update(hidden.mT, mask=attention_mask)`` for hidden states [N, L, C] of a
        transformer and its attention mask [N, L]. What lies outside the mask is not looked at.

        With `skip_nonfinite`, images (or rows) that hold NaN or infinity are left out and counted in ``skipped``.
        Waits for the features where they are on a GPU; :func:`collect_second_moment` does not.

        Raises NonFiniteError (and leaves the moment as it was) on NaN and infinity otherwise, and on values too
        large to square; ArgumentError for a wrong type, RewriteCoreError for a wrong shape.
        Each update counts as one independent sample in :attr:`standard_error`.
        """
        self._add(features, skip_nonfinite, mask)

    def _add(self, features: Tensor, skip_nonfinite: bool, mask: Tensor | None) -> tuple[Tensor, int]:
        """:meth:`update`; returns the sum over the keys that were added, as blocks, and their number."""
        features, counts = self._readable(features, mask)
        keys = Keys(features.dtype, skip_nonfinite)
        part = sum_of(features, self.groups) if features.device.type == "cpu" else None
        size = math.nan if part is None else square(part).item()
        if part is not None and math.isfinite(size):  # a look that costs nothing on a CPU
            count = len(features) * positions(features) if counts is None else int(counts.sum())
            note = Note(True, size, 0, 0.0, count)
        else:
            del part
            part, numbers = measured(features, counts, skip_nonfinite, self.groups)
            note = Note.read(numbers)
        self._count(note, keys)
        part = part.to(self._sum.device)
        self._sum += part
        self._changed()
        return part, note.count

    def _readable(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The features of an update, and how many positions of each image count, where not all do."""
        features = checked(features, self.channels)
        if mask is None or features.layout != torch.strided:  # which the operation refuses
            return features, None
        return masked(features, mask)

    def _count(self, note: Note, keys: Keys) -> None:
        """Count the keys of an update. Raises NonFiniteError, and changes nothing, where its sum is not finite."""
        note.check(keys)
        self.count += note.count
        self.skipped += note.bad
        if note.count:
            self._updates += 1
            self._spread += note.square / note.count
            self._wide = self._wide and keys.dtype == torch.float64
        self._changed()

    def _changed(self) -> None:
        """Forget what was made of the sum as it was."""
        self._made, self.key_errors = _Made(), None

    def matrix(self) -> Tensor:
        """C = sum / count, float64 [C, C]; zero between groups, where there are several."""
        return blocks.whole(self.blocks())

    def blocks(self) -> Tensor:
        """What is known of C: :meth:`matrix`, or of several groups the block of each, float64 [G, C/G, C/G]."""
        if self.count == 0:
            if self.skipped:
                raise RewriteCoreError(
                    f"This second moment holds no keys: all {self.skipped} images were left out for NaN or infinity."
                )
            raise RewriteCoreError("This second moment holds no keys yet; update or collect it first.")
        return self._sum / self.count

    def to(self, device: torch.device | str) -> SecondMoment:
        """This moment with its sum on a device, where its factor and what :meth:`solve` returns are then, too; itself
        where it is there already. Files are the same from everywhere, and :meth:`load` gives a moment of the CPU.

        On a GPU an edit need not copy the factor, nor wait for the CPU to solve. What is solved there agrees with the
        CPU's to float64's rounding times the condition of C, not to the bit. Updates of either go on as before.

        An edit on a GPU keeps such a copy of a CPU's moment by itself: see :meth:`on`.

        Raises ArgumentError for what is no device.
        """
        if self._sum.is_meta and str(device) != "meta":
            raise ArgumentError("This second moment is on the meta device, where it has no numbers; load it again.")
        try:
            with torch.inference_mode(False):  # or it could not be written in place outside
                total = self._sum.to(device=torch.device(device))
        except (RuntimeError, TypeError, AssertionError) as error:  # torch says AssertionError where it has no CUDA
            raise ArgumentError(f"{quoted(device)} is no device of this machine: {error}") from error
        if total is self._sum:
            return self
        moved = copy.copy(self)
        moved._sum, moved._made, moved.latents = total, _Made(), dict(self.latents)
        return moved

    def on(self, device: torch.device) -> SecondMoment:
        """:meth:`to`, kept until this moment changes: to read, not to update. So a layer on a GPU finds moment and
        factor there from its second edit on. The copy and its factor take three times ``8 channels^2`` bytes of each
        GPU, and are freed with this moment or at its next update."""
        if self._sum.device == device:
            return self
        made = self._made
        if device not in made.elsewhere:
            made.elsewhere[device] = self.to(device)
        return made.elsewhere[device]

    def within_groups(self, groups: int) -> SecondMoment:
        """This moment within groups of channels alone: what bears on a grouped convolution, each of whose groups has
        keys of its own. Itself for one group, and where it has these groups. Its `standard_error` is not known.

        Raises MismatchError where it has other groups.
        """
        if groups in (1, self.groups):
            return self
        made = self._made
        if groups in made.grouped:
            return made.grouped[groups]
        if self.groups != 1:
            raise MismatchError(
                f"This second moment is of {self.groups} groups of channels and not of {groups}; collect it for the "
                "layer it is used with."
            )
        moment = SecondMoment(self.channels, self.layer, self.fingerprint, groups).to(self._sum.device)
        moment._sum.copy_(blocks.within(self._sum, groups))
        moment.count, moment.skipped, moment._wide = self.count, self.skipped, self._wide
        moment.latents, moment._spread = dict(self.latents), math.nan
        made.grouped[groups] = moment
        return moment

    def remembered(self, key: str, make: Callable[[], float]) -> float:
        """What `make` returns of this moment as it is, kept under the last `key` until the next update."""
        made = self._made
        known = made.known
        if known is None or known[0] != key:
            made.known = known = key, make()
        return known[1]

    def along(self, rows: Tensor) -> SecondMoment:
        """The second moment of the keys' coordinates along orthonormal `rows` [m, C]: what bears on a change that acts
        on these alone."""
        rows = rows.to(self._sum)
        moment = SecondMoment(len(rows), self.layer, self.fingerprint).to(self._sum.device)
        moment._sum.copy_(blocks.gram(rows, self._sum))
        moment.count, moment._wide, moment._parts = self.count, self._wide, self._parts * self.groups
        return moment

    @property
    def wide(self) -> bool:
        """Whether all its keys were float64."""
        return self._wide

    @property
    def standard_error(self) -> float:
        """The relative standard error of C, sqrt(E|C - C_true|^2) / |C| in the Frobenius norm, NaN where unknown.

        From the spread of the updates, taken as independent samples (batches of different images), by a one-way
        analysis of variance: it needs their |S|^2 / n and the total only. Merged moments count with all their updates.
        """
        if self._updates < 2:
            return math.nan
        return relative_error(self._updates, self._spread, self.count, square(self._sum).item())

    @property
    def factor(self) -> SPDFactor:
        """The Cholesky factor of C, computed once and kept until the next update; ``.shift`` is the diagonal
        shift that a rank-deficient C needed (0 otherwise), ``.condition`` an estimate. Unless all keys were float64, C
        is a sum of float32 products, and what is below their rounding counts as rank-deficient. Of several groups it is
        a batch of factors, one for each."""
        made = self._made
        if made.factor is None:
            made.factor = blocks.factor(self.blocks(), self._noise, self.count * self._parts)
        return made.factor

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
        if not all_finite(rows):
            raise NonFiniteError("The keys hold NaN or infinity.")
        return blocks.solve(self.factor, sent(rows, self._sum.device)).reshape(keys.shape)

    def check(self, layer: BoundLayer, latents: Tensor | None = None) -> None:
        """Raise MismatchError where this moment was not collected from `layer` as it is now, or from latents of another
        shape or distribution than `latents`, where that is known."""
        check_layer(layer)
        if self.channels != layer.in_channels:
            raise MismatchError(
                f"The second moment has {self.channels} channels and {layer.name!r} has {layer.in_channels}; "
                "collect it for this layer."
            )
        if self.groups not in (1, layer.groups):
            raise MismatchError(
                f"The second moment is of {self.groups} groups of channels and {layer.name!r} has {layer.groups}; "
                "collect it for this layer."
            )
        if self.layer is not None and self.layer != layer.name:
            raise MismatchError(
                f"The second moment is of layer {quoted(self.layer)}, not {layer.name!r}; collect it for this layer."
            )
        if latents is not None:
            self._check_latents(latents)
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

    def _check_latents(self, latents: Tensor) -> None:
        given = recipe_of(latents)
        for record in self.latents.get("merged", [self.latents]):
            recipe = None if record.get("recipe") is None else LatentRecipe.from_dict(record["recipe"])
            if given is not None and recipe is not None and given.kind != recipe.kind:
                raise MismatchError(
                    f"The second moment was collected from other latents ({recipe}; these are {given}); collect it "
                    "from latents of the same shape and distribution."
                )

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add the keys of `other`, in place; returns self. Raises MismatchError for another layer or model, or other
        groups of channels (of a whole moment merge its :meth:`within_groups`), and warns where both were collected from
        the same latents, whose keys then count twice."""
        if not isinstance(other, SecondMoment):
            raise ArgumentError(
                f"A second moment merges with another, not with {type(other).__name__}; update it with features."
            )
        joined = self._joined([self._facts(), other._facts()])
        self._sum += other._sum.to(self._sum.device)
        vars(self).update(joined)
        return self

    def all_reduce(self, group: ProcessGroup | None = None) -> SecondMoment:
        """Sum over the processes of a ``torch.distributed`` group, in place; returns self. Raises and warns on every
        process as :meth:`merge` does.

        What one process makes of all latents is met to 1e-12 where every process has whole batches of them; else to
        1e-8 in float32, as a batch's sum rounds by where the batch begins.
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

    def _facts(self) -> dict[str, Any]:
        """All there is to a moment but its sum; ``latents`` is a list of what is known of each set of them."""
        return {
            "channels": self.channels,
            "groups of channels": self.groups,
            "layer": self.layer,
            "fingerprint": self.fingerprint,
            "latents": self.latents.get("merged", [self.latents] if self.count or self.latents else []),
            "count": self.count,
            "skipped": self.skipped,
            "groups": self._updates,
            "spread": self._spread,
            "wide": self._wide,
        }

    @staticmethod
    def _joined(facts: list[dict[str, Any]]) -> dict[str, Any]:
        """The attributes, but for the sum itself, of the sum of the moments that `facts` tell of."""
        joined: dict[str, Any] = {"_made": _Made(), "key_errors": None, "_wide": all(fact["wide"] for fact in facts)}
        for name in ("channels", "groups of channels", "layer", "fingerprint"):
            values = list(dict.fromkeys(fact[name] for fact in facts if fact[name] is not None))
            if len(values) > 1:
                raise MismatchError(
                    f"These second moments differ in {name} ({quoted(values[0])}, {quoted(values[1])}) and do not "
                    "add up."
                )
            if name in ("layer", "fingerprint"):
                joined[name] = values[0] if values else None
        known = [{part.get("fingerprint") for part in fact["latents"]} - {None} for fact in facts]
        if sum(map(len, known)) > len(set().union(*known)):
            warn(
                "These second moments were collected from the same latents, whose keys now count twice; "
                "merge moments of different latents.",
                LatentsWarning,
            )
        sets = [part for fact in facts for part in fact["latents"]]
        joined["latents"] = joined_latents(sets)
        sums = {name: sum(fact[name] for fact in facts) for name in ("count", "skipped", "groups", "spread")}
        return joined | {
            "count": sums["count"],
            "skipped": sums["skipped"],
            "_updates": sums["groups"],
            "_spread": sums["spread"],
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write ``sum`` and its metadata as safetensors, all or nothing."""
        self._save(path, {}, {})

    def _save(self, path: str | os.PathLike, progress: dict[str, int], state: dict[str, Tensor]) -> None:
        """Write a checkpoint: the moment, how far it is, and the state of the errors of its keys."""
        facts = {name: value for name, value in self._facts().items() if name not in ("channels", "groups of channels")}
        errors = self.key_errors
        if errors is not None and not errors.isfinite().all():
            errors = None
        facts |= {
            "latents": self.latents,
            "key_errors": None if errors is None else errors.tolist(),
            "progress": progress,
        }
        moment_file.write(path, self._sum, facts, state)

    @classmethod
    def load(cls, path: str | os.PathLike, layer: BoundLayer | None = None) -> SecondMoment:
        """Read a saved second moment, the reference implementation's ``r2m.npz``, or the ``mom2`` statistics of ROME,
        MEMIT and EasyEdit (told apart by their content).

        With `layer`, its name and channels are checked at once; the weights are checked when it is used. Files of
        others say neither, so of them only the channels are.
        Raises FileFormatError on a truncated or foreign file.
        """
        moment, progress, _ = cls._load(path)
        if progress:
            raise FileFormatError(
                f"{shown(path)} is a checkpoint of an unfinished collection; "
                "resume it with collect_second_moment(checkpoint=...).",
                advice={"collect_second_moment(checkpoint=...)": None},
            )
        if layer is not None:
            moment.check(layer)
        return moment

    @classmethod
    def _load(cls, path: str | os.PathLike) -> tuple[SecondMoment, dict[str, int], dict[str, Tensor]]:
        """A moment, and of a checkpoint how far it is and the state of the errors of its keys."""
        with torch.inference_mode(False):  # or the sum could not be written in place outside
            stored = moment_file.read(path)
        moment = cls(1, stored.layer, stored.fingerprint)
        moment._sum = stored.sum
        moment.count, moment.skipped, moment.latents = stored.count, stored.skipped, stored.latents
        moment._updates, moment._spread, moment._wide = stored.updates, stored.spread, stored.wide
        if stored.key_errors is not None:
            moment.key_errors = torch.tensor(stored.key_errors, dtype=torch.float64, device="cpu")
        return moment, stored.progress, stored.state


def check_moment(moment: SecondMoment) -> None:
    """Raises ArgumentError for anything but a second moment."""
    if not isinstance(moment, SecondMoment):
        raise ArgumentError(
            f"moment is what rc.collect_second_moment(layer, latents) returns, or rc.SecondMoment.load(path), not "
            f"{what_is(moment)}."
        )


def check_inputs(layer: BoundLayer, moment: SecondMoment, latents: Tensor | None = None) -> None:
    """Checks the first arguments that the functions of an edit have in common; no latents, no check of them."""
    check_layer(layer)
    check_moment(moment)
    if latents is not None:
        check_latents(latents)
