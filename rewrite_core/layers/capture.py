"""Forward passes to layers: what each of them is given there, in one run or in several.

A pass stops where the last of the layers has been read. A layer may run more than once in a pass: once for each part of
the batch (a decoder with slicing), for each tile of the map, in a loop, or because two places share it. So the first
time that a layer is read the generator runs to its end, on two latents, to see how often that is; and once more to see
whether the keys of one latent depend on which others are in the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..adapters.base import Capture, LayerAdapter
from ..errors import BatchDependenceWarning, RewriteCoreError, UnknownLayerError, warn
from ..modes import repeatable
from .fingerprints import Forward, Part, Remembered, Surroundings, Trace
from .latents import check_latents, for_generator
from .passes import Hooks, Stop
from .unreached import why_unreached

Size = tuple[int, ...]


@dataclasses.dataclass
class _Runs:
    """How a layer runs in passes on latents of one shape."""

    size: Size  # of the first run's key map
    count: int  # latents of the pass that was looked at
    rows: int  # of the keys of all its runs
    whole: dict[int, int] = dataclasses.field(default_factory=dict)  # latents and rows of other passes to the end

    def expected(self, count: int) -> int | None:
        """How many rows the runs of a pass on so many latents have; None where that cannot be said."""
        if count in self.whole:
            return self.whole[count]
        rows, rest = divmod(self.rows * count, self.count)
        return None if rest else rows


class Tap:
    """Where a forward pass is read: a layer of a generator, and how the generator is called."""

    def __init__(self, generator: nn.Module, adapter: LayerAdapter, forward: Forward):
        self.generator = generator
        self.name = adapter.path
        self._adapter = adapter
        self._forward = forward
        self._runs: dict[Size, _Runs] = {}  # by the shape of a latent
        self._compared = False  # whether it is known if the keys of a latent depend on other latents
        self._remembered: Remembered | None = None  # the last fingerprint


def check_together(taps: Sequence[Tap]) -> None:
    """Raise RewriteCoreError where one forward pass does not reach all of `taps`, each once."""
    if not taps:
        raise RewriteCoreError("There is no layer to run to; give at least one.")
    for tap in taps[1:]:
        if tap.generator is not taps[0].generator or tap._forward is not taps[0]._forward:
            raise RewriteCoreError(
                f"{taps[0].name!r} and {tap.name!r} are not bound to the same generator object with the same "
                "`forward`, so one pass cannot serve both; run them one by one."
            )
    names = [tap.name for tap in taps]
    if len(set(names)) < len(names):
        raise RewriteCoreError(f"A layer is given twice in {names}; give each one once.")


def run_to(taps: Sequence[Tap], latents: Tensor, consume: Callable[[int, Capture], object]) -> None:
    """Run the generator that `taps` share on latents [N, ...], until each of them has been reached as often as it is.

    ``consume(number, capture)`` is called once for ``taps[number]``. Of a layer that runs once, as it is reached: so a
    key map lives no longer than the generator itself needs it, and is seen before the generator can write to it. Of one
    that runs several times, with copies of all its runs. What `consume` raises ends the pass.

    Raises:
        UnknownLayerError: the forward pass ended before it reached them all.
        RewriteCoreError: a layer runs more often than it did when it was first read.
    """
    check_latents(latents)
    _compare(taps, latents, _look(taps, latents))
    readers = [_Reader(tap, latents) for tap in taps]

    def reach(number: int, capture: Capture) -> bool:
        whole = readers[number].take(capture)
        if whole is not None:
            consume(number, whole)
        return readers[number].done

    if _run(taps, latents, reach):
        return
    for reader in readers:
        if not reader.captures and not reader.done:
            raise unreached(reader.tap, latents)
    for number, reader in enumerate(readers):
        if not reader.done:
            consume(number, reader.finish())


def maps_of(tap: Tap, latents: Tensor) -> int | None:
    """How many key maps a layer sees in a pass on latents [N, ...], N unless it is tiled, looped or guided; None where
    that is not known before the pass."""
    check_latents(latents)
    _look([tap], latents)
    runs = tap._runs.get(tuple(latents.shape[1:]))
    return None if runs is None else runs.expected(len(latents))


def fingerprints(taps: Sequence[Tap], latents: Tensor) -> list[str]:
    """:meth:`BoundLayer.fingerprint` of several layers of one generator, in one pass; they remember what they found."""
    check_latents(latents)
    changed = []
    for tap in taps:
        last = tap._remembered
        if last is None or not last.still(tap.generator, tap._forward, latents[:1]):
            changed.append(tap)
    if changed:
        parts: dict[int, Part] = {}
        first = _look(changed, latents)
        before = Surroundings.of(changed[0].generator, changed[0]._forward, latents)
        _compare(changed, latents, first, parts)
        after = Surroundings.of(changed[0].generator, changed[0]._forward, latents)
        for number, tap in enumerate(changed):
            text = parts[number].fingerprint(tap.generator, tap._forward)
            _remember(tap, Remembered(parts[number], text, before, after))
    return [tap._remembered.fingerprint for tap in taps if tap._remembered is not None]


def _remember(tap: Tap, now: Remembered) -> None:
    """Keep a fingerprint; where the generator has changed, how often the layer runs is not known any more."""
    if tap._remembered is not None and not now.same_way(tap._remembered):
        tap._runs.clear()
    tap._remembered = now


# --- one pass


def _run(
    taps: Sequence[Tap],
    latents: Tensor,
    reach: Callable[[int, Capture], bool],
    *,
    to_end: bool = False,
    parts: dict[int, Part] | None = None,
    problems: list[Exception] | None = None,
) -> bool:
    """One forward pass. Returns whether it was stopped, so that it did not come to its end.

    ``reach(number, capture)`` is called at every run of ``taps[number]``, and says whether that was the last one that
    is asked for. What it raises ends the pass, and is in `problems` then. `parts` is filled with what each key depends
    on.
    """
    first, waiting = taps[0], set(range(len(taps)))
    problems = [] if problems is None else problems
    kind = (to_end, id(first._forward), *(tap.name for tap in taps))
    with contextlib.ExitStack() as stack:
        hooks = stack.enter_context(Hooks())
        trace = None if parts is None else stack.enter_context(Trace(first.generator, hooks))
        for number, tap in enumerate(taps):

            def run(module: nn.Module, args: tuple, kwargs: dict, number: int = number, tap: Tap = tap) -> None:
                try:
                    if not problems:
                        capture = tap._adapter.capture(args, kwargs)
                        if trace is not None and parts is not None and number not in parts:
                            parts[number] = trace.part(tap._adapter)
                        if reach(number, capture):
                            waiting.discard(number)
                except Exception as error:
                    problems.append(error)
                if problems or not (waiting or to_end):
                    raise Stop

            hooks.before(tap._adapter.site, run)
        stack.enter_context(torch.no_grad())
        stack.enter_context(repeatable(first.generator, kind))
        try:
            first._forward(first.generator, for_generator(latents, first.generator))
            stopped = False
        except Stop:  # here, so that the contexts do not take it for a failure
            stopped = True
    if problems:
        raise problems[0]
    return stopped


def unreached(tap: Tap, latents: Tensor) -> UnknownLayerError:
    """What to raise where a pass did not reach a layer."""
    return UnknownLayerError(why_unreached(tap.name, tap._adapter, tap.generator, tap._forward, latents[:2]))


# --- layers that run several times


class _Reader:
    """What one pass shows of one layer."""

    def __init__(self, tap: Tap, latents: Tensor):
        self.tap = tap
        self.captures: list[Capture] = []  # copies of the runs so far, unless the first is all there is
        self.done = False
        self._count, self._shape = len(latents), tuple(latents.shape[1:])
        self._rows = 0
        self._expected: int | None = None

    def take(self, capture: Capture) -> Capture | None:
        """The capture of all runs, once they are over."""
        if self.done:
            self.tap._runs.clear()
            raise RewriteCoreError(
                f"{self.tap.name!r} runs more often in this pass than it did when it was first read, so some of its "
                "keys "
                "would be missed: the generator was changed; try again."
            )
        size = tuple(capture.key.shape[2:])
        if not self.captures:
            runs = self.tap._runs.get(self._shape)
            known = runs is not None and runs.size == size  # else it was changed, to tiles for instance
            self._expected = runs.expected(self._count) if runs is not None and known else None
        self._rows += len(capture.key)
        self.done = self._rows == self._expected
        if self.done and not self.captures:
            return capture
        copies = {name: part.clone() for name, part in capture.extra.items()}
        self.captures.append(dataclasses.replace(capture, key=capture.key.clone(), extra=copies))
        return _joined(self.captures, self._count) if self.done else None

    def finish(self) -> Capture:
        """The capture of all runs, where the generator came to its end."""
        size = tuple(self.captures[0].key.shape[2:])
        runs = self.tap._runs.get(self._shape)
        if runs is None or runs.size != size:
            runs = self.tap._runs[self._shape] = _Runs(size, self._count, self._rows)
        runs.whole[self._count] = self._rows
        return _joined(self.captures, self._count)


def _joined(captures: Sequence[Capture], count: int) -> Capture:
    """One capture of several runs, in a pass on `count` latents."""
    if len(captures) == 1:
        return captures[0]
    keys = [capture.key for capture in captures]
    one_size = len({key.shape[2:] for key in keys}) == 1
    if one_size and sum(map(len, keys)) == count:  # each latent in one of them: slices of the batch
        extra = {name: _joined_rows(name, captures) for name in captures[0].extra}
        return Capture(torch.cat(keys), extra, captures[0].call)
    if all(len(key) == count for key in keys):  # a latent's keys in all of them: tiles, loops
        key = torch.cat([key.flatten(2) for key in keys], 2)
    elif one_size:
        key = torch.cat(keys)
    else:
        key = torch.cat([key.flatten(2).movedim(1, 0).flatten(1) for key in keys], 1)[None]
    return Capture(key, runs=len(captures))


def _joined_rows(name: str, captures: Sequence[Capture]) -> Tensor:
    parts = [capture.extra[name] for capture in captures]
    if parts[0].ndim == 0:
        return parts[0]
    return torch.cat([part.expand(len(capture.key), *part.shape[1:]) for part, capture in zip(parts, captures)])


def _look(taps: Sequence[Tap], latents: Tensor) -> dict[str, Tensor]:
    """See how often layers run that were not looked at yet. Returns the first key map of each of these."""
    shape = tuple(latents.shape[1:])
    new = [tap for tap in taps if shape not in tap._runs]
    if not new or not len(latents):
        return {}
    few = latents[:2]
    try:
        rows, first = _whole_pass(new, few)
    except Exception as error:  # of a generator for batches of one size, perhaps
        if len(few) == len(latents) or isinstance(error, RewriteCoreError):
            raise
        few = latents
        rows, first = _whole_pass(new, few)
    for tap in new:
        tap._runs[shape] = _Runs(tuple(first[tap.name].shape[2:]), len(few), rows[tap.name])
    return first


def _whole_pass(taps: Sequence[Tap], latents: Tensor) -> tuple[dict[str, int], dict[str, Tensor]]:
    """How many rows the keys of each layer have in a pass to the end, and the first of them."""
    rows, first, problems = dict[str, int](), dict[str, Tensor](), list[Exception]()

    def reach(number: int, capture: Capture) -> bool:
        name = taps[number].name
        first.setdefault(name, capture.key[:1].clone())
        rows[name] = rows.get(name, 0) + len(capture.key)
        return False

    try:
        _run(taps, latents, reach, to_end=True, problems=problems)
    except Exception as error:
        if problems or len(first) < len(taps):
            raise
        warn(
            f"The generator fails after {', '.join(first)} ({type(error).__name__}: {error}), so whether that runs "
            "once in a "
            "pass is not known; it is taken to."
        )
    for tap in taps:
        if tap.name not in first:
            raise unreached(tap, latents)
    return rows, first


# --- rows that depend on each other

_SAME = 1e-3  # a latent's keys in batches of one size differ by rounding, if at all
_SAME_ROUGHLY = 2e-2  # in float16 and bfloat16


def _compare(
    taps: Sequence[Tap], latents: Tensor, first: dict[str, Tensor], parts: dict[int, Part] | None = None
) -> None:
    """Warn where the keys of a latent depend on the other latents of the batch: compare those of the first one beside
    others (`first`, where they are at hand) and beside itself. Done once; `parts` is filled in any case."""
    new = [tap for tap in taps if not tap._compared] if len(latents) > 1 else []
    if not new and parts is None:
        return
    looked_at = [tap._runs[tuple(latents.shape[1:])].count for tap in new]
    few = latents[: max(2, *looked_at)] if new else latents[:1]
    alike = _first_maps(new if parts is None else taps, few[:1].repeat_interleave(len(few), 0), parts)
    missing = [tap for tap in new if tap.name not in first]
    if missing:
        first = first | _first_maps(missing, few)
    other = [tap for tap in new if _differ(alike[tap.name], first[tap.name])]
    again = _first_maps(other, few) if other else {}
    for tap in other:
        if not _differ(again[tap.name], first[tap.name]):  # else it is noise of a generator's own
            _warn_of_dependence(tap, _difference(alike[tap.name], first[tap.name]))
    for tap in new:
        tap._compared = True


def _warn_of_dependence(tap: Tap, share: float) -> None:
    warn(
        f"The keys of one latent at {tap.name!r} depend on the other latents of its batch (they change by "
        f"{share:.0%}), as "
        "with batch normalisation without running statistics; give the generator some, or collect with batch_size=1, "
        "as "
        "edits read one latent at a time.",
        BatchDependenceWarning,
    )


def _first_maps(taps: Sequence[Tap], latents: Tensor, parts: dict[int, Part] | None = None) -> dict[str, Tensor]:
    """The first key map of each layer."""
    found: dict[str, Tensor] = {}

    def reach(number: int, capture: Capture) -> bool:
        found.setdefault(taps[number].name, capture.key[:1].clone())
        return True

    _run(taps, latents, reach, parts=parts)
    for tap in taps:
        if tap.name not in found:
            raise unreached(tap, latents)
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative; NaN where it is not known."""
    if one.shape != other.shape or one.is_meta:
        return float("nan")
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two key maps differ by more than rounding."""
    return _difference(one, other) > (_SAME_ROUGHLY if torch.finfo(other.dtype).eps > 1e-5 else _SAME)
