"""Collecting in several processes: shards that independent jobs work on, and the processes of ``torchrun``."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import MismatchError, RewriteCoreError, quoted
from ..files import shown
from ..layers.binding import BoundLayer
from .collection import Asked, check_asked, collect_parts, facts_of
from .second_moment import SecondMoment
from .shards import Shard, order_of

if TYPE_CHECKING:
    from torch.distributed import Store

Value = TypeVar("Value")
_PATIENCE = datetime.timedelta(days=7)  # with processes that are slower; of those that died torchrun tells
_STARTING = datetime.timedelta(minutes=5)  # with a store that is not there yet
_SOON = datetime.timedelta(seconds=5)


def collect_shard(
    layers: Sequence[BoundLayer],
    latents: Tensor,
    shard: Shard,
    asked: Asked,
    seed: object = None,
    checkpoints: Sequence[str | os.PathLike | None] | None = None,
) -> list[SecondMoment]:
    """One shard of what ``collect_second_moments`` collects of all of `latents`, to be merged with the others.

    Each moment says which shard it is, and of what. Raises RewriteCoreError for ``until``, which only the whole knows.
    """
    asked = check_asked(latents, asked)
    if asked.until is not None:
        raise RewriteCoreError(
            "`until` looks at all latents so far, and a shard has its own alone: leave it out, and give as many "
            "latents as it takes.",
            advice={"`until`": None},
        )
    rows = shard.rows(len(latents), asked.batch_size)
    mask = asked.mask[rows] if isinstance(asked.mask, Tensor) else asked.mask
    facts = facts_of(latents[rows], seed, mask)
    facts.pop("recipe", None)  # those of its first rows alone would have one
    facts["shard"] = shard.facts(asked.batch_size, facts_of(latents, seed, asked.mask))
    own = Asked(asked.batch_size, None, asked.skip_nonfinite, mask, asked.progress, first=rows.start)
    paths = [None] * len(layers) if checkpoints is None else checkpoints
    return collect_parts(layers, latents[rows], own, facts, paths, [None] * len(layers))


def merge_files(paths: Sequence[str | os.PathLike]) -> SecondMoment:
    """The sum of the second moments in files: all shards of a collection, or moments of different latents.

    They are added in the order of their shards, whatever that of `paths`, and read one at a time.
    Raises MismatchError where they overlap, where one is missing, or where they belong to other layers, weights or
    collections; FileFormatError for a checkpoint that is not finished.
    """
    names = [shown(path) for path in paths]
    facts = [_facts_in(path) for path in paths]
    order = order_of(names, [each["latents"] for each in facts])
    _check_same(names, facts)
    total = SecondMoment.load(paths[order[0]])
    for place in order[1:]:
        total.merge(SecondMoment.load(paths[place]))
    return total


def _facts_in(path: str | os.PathLike) -> dict[str, Any]:
    moment = SecondMoment.load(path)
    return {
        "latents": moment.latents,
        "layer": moment.layer,
        "weights": moment.fingerprint,
        "channels": moment.channels,
        "groups of channels": moment.groups,
    }


def _check_same(names: Sequence[str], facts: Sequence[dict[str, Any]]) -> None:
    properties = {
        "channels": "layer",
        "groups of channels": "layer",
        "layer": "layer",
        "weights": "generator with the same weights",
    }
    for name, fact in zip(names, facts):
        for what, advice in properties.items():
            plural = "layers" if what == "layer" else what
            if fact[what] != facts[0][what]:
                raise MismatchError(
                    f"{name} and {names[0]} are of different {plural}, so they do not add up; collect all from one "
                    f"{advice}."
                )


# --- torchrun -------------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun started this process, as one of several."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_torchelastic_launched() and os.environ.get("WORLD_SIZE", "1") != "1"


def _number(name: str) -> int:
    """One of the variables that torchrun sets. Raises RewriteCoreError where it did not."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise RewriteCoreError(
            f"{name} is {quoted(text)} in the environment, and torchrun sets a number; use torchrun."
        )
    return int(text)


def own_device(name: str) -> str:
    """The device of this process, of those that torchrun started on this machine: "cuda" is one GPU for each."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


@contextlib.contextmanager
def told_once() -> Iterator[bool]:
    """Around what a process says as it fails: whether it is to say it, for no other of torchrun's processes has said
    anything since they were started. One that is not waits until the first has spoken, for torchrun ends all of them
    when one has ended."""
    import torch.distributed as dist

    if not launched():
        yield True
        return
    key = f"rewrite_core/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=_SOON, wait_for_workers=False)
        first = store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):  # nobody can be asked
        yield True
        return
    yield first
    with contextlib.suppress(RuntimeError):
        if first:
            store.set(f"{key}/said", "")
        else:
            store.wait([f"{key}/said"], _SOON)


@contextlib.contextmanager
def together() -> Iterator[Shard]:
    """Inside, the processes that torchrun started know each other; yields this one's shard of their work."""
    import torch.distributed as dist

    rank, size = _number("RANK"), _number("WORLD_SIZE")
    with _others_may_end():
        dist.init_process_group(
            "gloo", store=_store_of_this_start(rank, size), rank=rank, world_size=size, timeout=_PATIENCE
        )
    yield Shard(rank + 1, size)
    # Not where something was raised: the others would say that this process ended, before it says why. It does end.
    dist.destroy_process_group()


@contextlib.contextmanager
def _others_may_end() -> Iterator[None]:
    """Says so in one sentence where torch.distributed fails, as it does when another process has ended."""
    try:
        yield
    except RewriteCoreError:
        raise
    except RuntimeError as error:
        raise RewriteCoreError(
            f"Another of torchrun's processes ended ({str(error).splitlines()[0][:200]}): see what it said. With "
            "--max-restarts torchrun starts all of them again, which go on from their checkpoints."
        ) from error


def _store_of_this_start(rank: int, size: int) -> Store:
    """A store that no earlier start of these processes has written to.

    torchrun keeps one store for all its starts, in which processes would find the addresses of those that were killed.
    So the first process makes up a name, under which each of the others leaves one of its own; when it has found all of
    them it says whose they are. Who finds an earlier start's name is not among these, and looks again.
    """
    import torch.distributed as dist

    host, port = os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT")
    master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(host, port, is_master=master, timeout=_STARTING, wait_for_workers=False)
    store.set_timeout(_PATIENCE)
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        members = [store.get(f"{own}/{other}").decode() for other in range(1, size)]
        store.set(f"{own}/members", " ".join(members))
        return dist.PrefixStore(own, store)
    asked = None
    while True:
        start = store.get("start").decode()
        if start != asked:
            store.set(f"{start}/{rank}", own)
            asked = start
        if store.check([f"{start}/members"]) and own in store.get(f"{start}/members").decode().split():
            return dist.PrefixStore(start, store)
        time.sleep(0.02)


def collect_together(
    layers: Sequence[BoundLayer],
    latents: Tensor,
    shard: Shard,
    asked: Asked,
    seed: object,
    checkpoints: Sequence[str | os.PathLike],
    save: Callable[[list[SecondMoment]], object],
) -> None:
    """Collect in all processes of :func:`together`, a shard each, and ``save(moments)`` of the whole in the first.

    Each process keeps checkpoints of its own, ``FILE.3-of-8`` beside each of `checkpoints`, from which it goes on to
    the same bits when torchrun starts it again; they are removed when the whole is saved.
    """
    import torch.distributed as dist

    own = [Path(f"{os.fspath(path)}.{shard.number}-of-{shard.of}") for path in checkpoints]
    moments = collect_shard(layers, latents, shard, asked, seed, own)
    for moment in moments:
        _gather(moment, shard)
    if shard.number == 1:
        save(moments)
    with _others_may_end():
        dist.barrier()  # a process that dies before the whole is saved finds its checkpoint again
    for path in own:
        path.unlink(missing_ok=True)


def _gather(moment: SecondMoment, shard: Shard) -> None:
    """Add the moments of all processes to the first's, in the order of their shards, one at a time."""
    import torch.distributed as dist

    facts: list[dict[str, Any] | None] | None = [None] * shard.of if shard.number == 1 else None
    with _others_may_end():
        dist.gather_object(moment._facts(), facts)
        if facts is None:
            dist.send(moment._sum, 0)
            return
    joined = SecondMoment._joined([fact for fact in facts if fact is not None])
    part = torch.empty_like(moment._sum)
    for other in range(1, shard.of):
        with _others_may_end():
            dist.recv(part, other)
        moment._sum += part
    vars(moment).update(joined)


def own_part(count: int, shard: Shard) -> slice:
    """Which of `count` pieces of work are this process's: a stretch as long as that of the others, or one shorter."""
    return slice(*((shard.number - back) * count // shard.of for back in (1, 0)))


def everybodys(value: Value, shard: Shard, stage: str, first_only: bool = False) -> list[Value]:
    """The values of all processes of :func:`together`, in their order; tensors of others are on the CPU.

    first_only  the first process gets them, the others their own alone
    stage       what they are, the same in all processes. Raises MismatchError where it is not.
    """
    import torch.distributed as dist

    packed = io.BytesIO()
    torch.save(value, packed)
    sent = (stage, packed.getvalue())
    found: list[Any] | None = None if first_only and shard.number > 1 else [None] * shard.of
    with _others_may_end():
        if first_only:
            dist.gather_object(sent, found)
        else:
            dist.all_gather_object(found, sent)
    if found is None:
        return [value]
    if any(other != stage for other, _ in found):
        raise MismatchError(
            "torchrun's processes found different things to do, as machines or GPUs of different kinds may; run on one "
            "kind, or in one process."
        )
    own = shard.number - 1
    return [
        value if rank == own else torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        for rank, (_, data) in enumerate(found)
    ]


def rows_together(rows: Tensor, shard: Shard, batch_size: int, work: Callable[[Tensor], Tensor]) -> Tensor:
    """``work(rows)``, a CPU tensor with a row for each of `rows`, of which each process of :func:`together` does whole
    batches. All of them get all of it, to the bits that one process makes."""
    import torch.distributed as dist

    batches = rows.split(batch_size)
    made = [work(batch) for batch in batches[own_part(len(batches), shard)]]
    own = torch.cat(made) if made else torch.empty(0)
    shapes: list[Any] = [None] * shard.of
    parts = []
    with _others_may_end():
        dist.all_gather_object(shapes, (tuple(own.shape), own.dtype))
        for rank, (shape, dtype) in enumerate(shapes):
            part = own.contiguous() if rank + 1 == shard.number else torch.empty(shape, dtype=dtype)
            if len(part):
                dist.broadcast(part, rank)
                parts.append(part)
    return torch.cat(parts)
