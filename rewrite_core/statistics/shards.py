"""Shards: a collection in parts, each of whole batches, that jobs of their own work on and that add up to the whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, MismatchError, RewriteCoreError, quoted, whole_number


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `of` parts of a collection."""

    number: int
    of: int

    def __post_init__(self) -> None:
        whole_number("The number of shards", self.of)
        whole_number("A shard's number", self.number, most=self.of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "3/8" -> Shard(3, 8). Raises RewriteCoreError for anything else."""
        found = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", text)
        if found is None or int(found[1]) > int(found[2]):
            raise RewriteCoreError(f"{quoted(text)} is no shard: give its number, from 1, and how many, such as 3/8.")
        return cls(int(found[1]), int(found[2]))

    def rows(self, count: int, batch_size: int) -> slice:
        """The shard's rows of `count` latents: whole batches of those that one process would have, so that each sums
        to the same bits there and here. Raises RewriteCoreError where there are fewer batches than shards."""
        batches = -(-count // batch_size)
        if batches < self.of:
            raise RewriteCoreError(
                f"{count} latents are {batches} batches of {batch_size}, too few for {self.of} shards; use fewer "
                "shards, or smaller batches."
            )
        first, last = ((self.number - back) * batches // self.of * batch_size for back in (1, 0))
        return slice(first, min(last, count))

    def facts(self, batch_size: int, whole: dict[str, Any]) -> dict[str, Any]:
        """What a shard's moment says of the collection that it is a part of, whose latents `whole` describes."""
        return {"number": self.number, "of": self.of, "batch_size": batch_size, "latents": whole}


def are_shard_facts(record: Any) -> bool:
    """Whether a record, from a file, is what :meth:`Shard.facts` makes, but for its ``latents``."""
    if not isinstance(record, dict) or record.keys() != {"number", "of", "batch_size", "latents"}:
        return False
    numbers = [record["number"], record["of"], record["batch_size"]]
    return all(type(each) is int and 0 < each < 2**31 for each in numbers) and numbers[0] <= numbers[1]


def joined_latents(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of the latents of several moments together: of all shards of a collection, what one process would
    have said."""
    shards = [each["shard"] for each in sets if each.get("shard") is not None]
    if shards and len(shards) == len(sets):
        numbers = sorted(shard["number"] for shard in shards)
        same = all(_collection(shard) == _collection(shards[0]) for shard in shards)
        if same and numbers == [*range(1, shards[0]["of"] + 1)]:
            return dict(shards[0]["latents"])
    return sets[0] if len(sets) == 1 else {"merged": sets}


def _collection(shard: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shard.items() if name != "number"}


def order_of(names: Sequence[str], latents: Sequence[dict[str, Any]]) -> list[int]:
    """In which order moments are added up, of which `latents` say what each was collected from.

    Raises MismatchError where they do not add up to a whole: shards that overlap, are missing or belong to other
    collections, or moments of the same latents; it names them by `names`.
    """
    if not names:
        raise ArgumentError("There is nothing to merge; name the files of at least one second moment.")
    shards: list[dict[str, Any]] = [each["shard"] for each in latents if each.get("shard") is not None]
    if not shards:
        _check_different(names, latents)
        return [*range(len(names))]
    for name, record in zip(names, latents):
        if record.get("shard") is None:
            raise MismatchError(f"{name} is no shard of a collection, as others are; merge shards by themselves.")
    places: dict[int, int] = {}
    for place, shard in enumerate(shards):
        if _collection(shard) != _collection(shards[0]):
            raise MismatchError(
                f"{names[place]} and {names[0]} are shards of different collections "
                f"({_told(shard)}; {_told(shards[0])}); merge the shards of one."
            )
        other = places.setdefault(shard["number"], place)
        if other != place:
            raise MismatchError(
                f"{names[other]} and {names[place]} overlap: both hold shard {shard['number']} of {shard['of']}; give "
                "each shard once."
            )
    missing = [number for number in range(1, shards[0]["of"] + 1) if number not in places]
    if missing:
        few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise MismatchError(
            f"Of {shards[0]['of']} shards {len(missing)} {'is' if len(missing) == 1 else 'are'} missing ({few}); "
            "collect and name them too."
        )
    return [places[number] for number in sorted(places)]


def _told(shard: dict[str, Any]) -> str:
    whole = shard["latents"]
    seed = "" if whole.get("seed") is None else f", seed {quoted(whole['seed'])}"
    return f"{shard['of']} shards of {whole.get('count')} latents{seed}, batches of {shard['batch_size']}"


def _check_different(names: Sequence[str], latents: Sequence[dict[str, Any]]) -> None:
    seen: dict[str, int] = {}
    for place, record in enumerate(latents):
        for part in record.get("merged", [record]):
            fingerprint = part.get("fingerprint")
            if fingerprint is not None and seen.setdefault(fingerprint, place) != place:
                raise MismatchError(
                    f"{names[seen[fingerprint]]} and {names[place]} overlap: they were collected from the same "
                    "latents; give each once."
                )
