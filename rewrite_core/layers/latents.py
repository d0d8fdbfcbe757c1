"""The standard set of latents that selections, collections and edits index, and how it is known again."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ArgumentError, FileFormatError, MismatchError, RewriteCoreError, SelectionError, whole_number

DISTRIBUTIONS = ("normal", "uniform")
_LARGEST_SEED = 2**32 - 1  # of numpy.random.RandomState
_MOST_NUMBERS = 2**40  # of one sample: four terabytes


def check_latents(latents: Tensor) -> None:
    """Raises ArgumentError for anything but a tensor, RewriteCoreError for one without rows."""
    if not isinstance(latents, Tensor):
        raise ArgumentError(
            f"latents must be a torch tensor [N, ...], not {type(latents).__name__}: use torch.as_tensor, or "
            "torch.stack for several tensors."
        )
    if latents.ndim == 0 or (latents.ndim == 1 and latents.is_floating_point()):  # whole numbers may be classes
        raise RewriteCoreError(
            f"latents must be [N, ...], a row for each picture, not {list(latents.shape)}; give a single latent as "
            "latents[None]."
        )


def for_generator(latents: Tensor, generator: nn.Module) -> Tensor:
    """A copy of the latents, which the generator may write to, on the device and, where they are no integers, in the
    precision of its first weight that computes (not offloaded, not stored in 8 bits)."""
    check_latents(latents)
    weights = (weight for weight in generator.parameters() if weight.is_floating_point() and weight.dtype.itemsize > 1)
    first = next((weight for weight in weights if not weight.is_meta), None)
    if first is None:
        return latents.clone()
    dtype = first.dtype if latents.is_floating_point() else latents.dtype
    if first.device.type == "cuda" and latents.device.type == "cpu":
        pinned = latents.to(dtype).pin_memory()  # without waiting for what the GPU is at
        return pinned.to(first.device, non_blocking=True)
    return latents.to(first.device, dtype, copy=True)


@dataclasses.dataclass(frozen=True)
class LatentRecipe:
    """How a set of latents is drawn again: the arguments of :func:`sample_latents`."""

    shape: tuple[int, ...]  # of one latent
    distribution: str
    seed: int
    count: int

    def __str__(self) -> str:
        return f"{self.kind}, seed {self.seed}, {self.count} rows"

    @property
    def kind(self) -> str:
        """What the latents are like whatever the seed: "normal 512"."""
        return f"{self.distribution} {'x'.join(map(str, self.shape))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, record: object) -> LatentRecipe:
        """The inverse of :meth:`to_dict`. Raises FileFormatError for anything that is not its output."""

        def whole(value: object, least: int, most: int) -> bool:
            return type(value) is int and least <= value <= most

        if isinstance(record, dict) and record.keys() == {field.name for field in dataclasses.fields(cls)}:
            shape, seed, count = record["shape"], record["seed"], record["count"]
            if (
                isinstance(shape, list)
                and 1 <= len(shape) <= 8
                and all(whole(size, 1, 2**31 - 1) for size in shape)
                and record["distribution"] in DISTRIBUTIONS
                and whole(seed, 0, _LARGEST_SEED)
                and whole(count, 1, 2**31 - 1)
            ):
                return cls(tuple(shape), record["distribution"], seed, count)
        raise FileFormatError(
            "A recipe of latents should hold a shape, a distribution, a seed and a count; this one does not, so the "
            "file "
            "is damaged or foreign."
        )


# By object, so that a copy or what was loaded is not taken for it; with a digest of its numbers, which tells of writes
# through NumPy too.
_sampled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _digest_of_all(latents: Tensor) -> bytes:
    return xxhash.xxh3_128(latents.numpy().data).digest()


def _sizes(shape: object) -> tuple[int, ...]:
    """The shape of one latent. Raises RewriteCoreError for anything but whole numbers of at least 1."""
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    try:
        whole = tuple(operator.index(size) for size in sizes if not isinstance(size, bool))
    except TypeError:
        whole = ()
    if not 1 <= len(whole) == len(sizes) <= 8 or min(whole) < 1:
        raise RewriteCoreError(
            f"The shape of a latent is a whole number of at least 1, such as 512, or up to eight of them, such as "
            f"(100, 1, 1), not {shape!r}."
        )
    return whole


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool | np.bool_):
        raise RewriteCoreError(f"{name} must be an integer of at least {least}, and at most {most}, not {value!r}.")
    return whole_number(name, value, least, most)


def sample_latents(shape: int | tuple[int, ...], count: int, seed: int = 1, distribution: str = "normal") -> Tensor:
    """`count` latents of `shape`, numbers drawn one by one: float32 [count, *shape].

    The rows are those of ``numpy.random.RandomState(seed)``, drawn row by row in float64, so a longer sample begins
    with the rows of a shorter one and selections made elsewhere with the same seed point at the same pictures.

    Args:
        shape: of one latent, such as 512 or (100, 1, 1).
        count: how many.
        seed: 0 to 2**32 - 1.
        distribution: "normal" (standard normal) or "uniform" (-1 to 1).

    Raises:
        RewriteCoreError: a number is not whole or out of range, or the distribution is another.
    """
    sizes = _sizes(shape)
    count, seed = _whole("count", count, 1, 2**31 - 1), _whole("seed", seed, 0, _LARGEST_SEED)
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:
        raise RewriteCoreError(f"distribution must be one of {list(DISTRIBUTIONS)}, not {distribution!r}.")
    numbers = count * math.prod(sizes)
    if numbers > _MOST_NUMBERS:
        raise RewriteCoreError(
            f"{count} latents of {'x'.join(map(str, sizes))} are {numbers} numbers, more than a machine holds; ask "
            "for fewer."
        )
    source = np.random.RandomState(seed)
    rows = source.standard_normal(numbers) if distribution == "normal" else source.uniform(-1, 1, numbers)
    with torch.inference_mode(False):  # so that it can be used outside, too
        latents = torch.from_numpy(rows.astype(np.float32).reshape(count, *sizes))
    _sampled[latents] = LatentRecipe(sizes, distribution, seed, count), _digest_of_all(latents)
    return latents


def recipe_of(latents: Tensor) -> LatentRecipe | None:
    """The recipe of latents that :func:`sample_latents` made, or of their first rows (``latents[:100]``).

    None where it is not known: for copies and other tensors, and where numbers were written to it since.
    """
    if not isinstance(latents, Tensor):
        return None
    whole = latents if latents in _sampled else latents._base
    if whole is None or whole not in _sampled:
        return None
    recipe, digest = _sampled[whole]
    same_rows = (latents.shape[1:], latents.stride(), latents.dtype) == (whole.shape[1:], whole.stride(), whole.dtype)
    if not len(latents) or not same_rows or latents.data_ptr() != whole.data_ptr() or _digest_of_all(whole) != digest:
        return None
    return dataclasses.replace(recipe, count=len(latents))


_names: dict[tuple[tuple[int, ...], bytes], str] = {}  # of rows that were named before, by shape and contents
_MOST_NAMES = 4096


def row_digest(row: Tensor) -> str:
    """A short name of one latent, 16 hexadecimal digits: of its shape and its numbers as float32 (zero has one
    sign)."""
    numbers = row.detach().to("cpu", torch.float32).contiguous()
    shape = tuple(numbers.shape)
    seen = shape, xxhash.xxh3_128(numbers.numpy().data).digest()  # at the speed of memory, a tenth of the time
    if seen not in _names:
        if len(_names) >= _MOST_NAMES:
            _names.clear()
        digest = hashlib.blake2b(f"{shape}|".encode(), digest_size=8)
        digest.update((numbers + 0.0).numpy().data)  # -0.0 + 0.0 is 0.0
        _names[seen] = digest.hexdigest()
    return _names[seen]


def row_digests(latents: Tensor, indices: Iterable[int]) -> dict[int, str]:
    """:func:`row_digest` of the rows of `latents` [N, ...] at `indices`, in rising order.

    Raises:
        SelectionError: an index points at a row that does not exist.
    """
    check_latents(latents)
    rows = sorted(set(indices))
    for index in rows:
        if not 0 <= index < len(latents):
            raise SelectionError(f"Latent {index} does not exist: there are {len(latents)}, numbered from 0.")
    if not rows:
        return {}
    if latents.device.type == "cpu":
        picked: Iterable[Tensor] = map(latents.detach().__getitem__, rows)  # views
    else:
        picked = latents.detach()[torch.tensor(rows, device=latents.device)].cpu()  # one wait
    return {index: row_digest(row) for index, row in zip(rows, picked, strict=True)}


def check_rows(recorded: Mapping[int, str], recipe: LatentRecipe | None, latents: Tensor, what: str) -> None:
    """Check that `latents` hold the rows that something was made on.

    Args:
        recorded: digests of the rows that it names, by index, as :func:`row_digests` gave them.
        recipe: of the latents that it was made on, where that is known.
        latents: [N, ...], the present ones.
        what: it, for the message: "The edit".

    Raises:
        MismatchError: a row is another one; it names both recipes.
        SelectionError: a row does not exist.
    """
    found = row_digests(latents, recorded)
    other = [index for index in found if found[index] != recorded[index]]
    if other and recipe is not None and _rounds_to(recipe, latents, other):
        return
    if not other:
        return
    present = recipe_of(latents)
    made, now = "" if recipe is None else f" ({recipe})", "" if present is None else f" ({present})"
    kind = ""
    if recipe is not None and present is not None and recipe.distribution != present.distribution:
        kind = f"; their distribution is {present.distribution}, not {recipe.distribution}"
    raise MismatchError(
        f"{what} was made on other latents{made} than these{now}: row {other[0]} differs{kind}; give the latents that "
        "it was "
        "made on."
    )


def _rounds_to(recipe: LatentRecipe, latents: Tensor, indices: list[int]) -> bool:
    """Whether rows of a lower precision are those of the recipe, rounded."""
    lower = latents.is_floating_point() and torch.finfo(latents.dtype).eps > torch.finfo(torch.float32).eps
    if not lower or latents.shape[1:] != recipe.shape or max(indices) >= recipe.count:
        return False
    rows = sample_latents(recipe.shape, max(indices) + 1, recipe.seed, recipe.distribution)[indices]
    return torch.equal(rows.to(latents.dtype), latents[torch.tensor(indices, device=latents.device)].cpu())
