"""Sessions: edits again and again on the same pictures of one generator, with nothing computed twice."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.nn.parameter import is_lazy

from .adapters.base import Capture
from .edits.edit import Edit
from .edits.matches import SearchResult, search
from .edits.selection import Selection
from .errors import RewriteCoreError, SelectionError, warn, whole_number
from .evaluation.measuring import Given, looking, measured, scene_of, several_changes
from .evaluation.report import Report
from .evaluation.steps import Steps
from .layers.bound import BoundLayer
from .layers.latents import check_latents
from .layers.replay import Record, record
from .rewrites import stack as stacks
from .rewrites.calls import erase, rewrite, rewrite_many, zero
from .rewrites.change import Rewrite
from .statistics.checks import check_layer
from .statistics.second_moment import SecondMoment, check_moment
from .turns import generator_lock


class _Kept:
    """What is kept while it fits in `memory` bytes, the least recently used going first. Not thread safe by itself."""

    def __init__(self, memory: int):
        self.memory, self.nbytes = memory, 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any | None:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: Hashable, item: Any, nbytes: int) -> None:
        self.drop(key)
        if nbytes > self.memory:
            return
        self._items[key] = item, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.memory:
            self.drop(next(iter(self._items)))

    def drop(self, key: Hashable) -> None:
        if key in self._items:
            self.nbytes -= self._items.pop(key)[1]

    def clear(self) -> None:
        self._items.clear()
        self.nbytes = 0


def _digest(*tensors: Tensor) -> bytes:
    """What tensors hold, as a key to what was made of it."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


class _Remembering(BoundLayer):
    """A bound layer that runs the generator once for each latent, looks at its weights once, and computes what its own
    weight makes of a key once. Each remembers by what it was given, so that results are what they would be, bit for
    bit."""

    def __init__(self, session: Session):
        self.__dict__.update(session.layer.__dict__)
        self._session = weakref.ref(session)
        self._adapter = copy.copy(session.layer._adapter)
        self._adapter.remember = self._of_weight

    def capture(self, latents: Tensor) -> Capture:
        session = self._session()
        if session is None or len(latents) != 1:
            return super().capture(latents)
        key = "capture", _digest(latents)
        found = session._kept.get(key)
        if found is None:
            found = super().capture(latents)
            parts = [found.key, *found.extra.values()]
            session._kept.put(key, found, sum(part.nbytes for part in parts))
        return dataclasses.replace(found, extra=dict(found.extra))

    def keys(self, latents: Tensor) -> Tensor:
        """Of batches too, as a search asks for, as long as half of the memory holds them: to forget the first ones for
        the last would only run everything again."""
        session = self._session()
        if session is None or len(latents) == 1:
            return super().keys(latents)
        key = "keys", _digest(latents)
        found = session._kept.get(key)
        if found is None:
            found = super().keys(latents)
            if session._batches + found.nbytes <= session._kept.memory // 2:
                session._batches += found.nbytes
                session._kept.put(key, found, found.nbytes)
        return found

    def linear(self, key: Tensor, weight: Tensor) -> Tensor:
        return self._made("linear", weight, (key,), lambda: super(_Remembering, self).linear(key, weight))

    def value(self, capture: Capture, weight: Tensor | None = None) -> Tensor:
        def value() -> Tensor:
            return super(_Remembering, self).value(capture, weight)

        if capture.call is not None or capture.runs > 1:
            return value()
        names = sorted(capture.extra)
        parts = capture.key, *(capture.extra[name] for name in names)
        return self._made(("value", *names), self.weight if weight is None else weight, parts, value)

    def _made(self, what: Hashable, weight: Tensor, parts: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """What the layer's own weight makes of keys on the CPU, a copy; of any other weight it is made each time."""
        return self._found(what, weight, parts, make, copied=True)

    def _of_weight(self, what: str, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What is made of the layer's own weight alone, where that is on the CPU."""
        return self._found(("weight", what), weight, (), make, copied=False)

    def _found(
        self, what: Hashable, weight: Tensor, parts: tuple[Tensor, ...], make: Callable[[], Tensor], copied: bool
    ) -> Tensor:
        session, own = self._session(), self.parameter
        if session is None or weight.data_ptr() != own.data_ptr() or weight.numel() != own.numel():
            return make()
        tensors = weight, *parts
        if any(part.device.type != "cpu" or (part.requires_grad and torch.is_grad_enabled()) for part in tensors):
            return make()
        key = what, session._weight_digest(), _digest(*parts)
        found = session._kept.get(key)
        if found is None:
            found = make()
            session._kept.put(key, found, found.nbytes)
        return found.clone() if copied else found

    def fingerprint(self, latents: Tensor) -> str:
        session = self._session()
        if session is None:
            return super().fingerprint(latents)
        if session._fingerprint is None:
            session._fingerprint = super().fingerprint(latents)
        return session._fingerprint


class Session:
    """One layer of a generator, its second moment and a set of latents, kept ready for edit after edit.

    What does not change between edits is computed once: the key maps of the pictures in use, the factor of C, and
    everything that the generator does before the layer (see :mod:`rewrite_core.layers.replay`). Results are those of
    the free functions, bit for bit. Every method may be called from any thread; they take turns at the generator.

    Args:
        layer: from :func:`rewrite_core.bind`.
        moment: second moment of that layer's keys.
        latents: [N, ...], the pictures that edits select from.
        memory: bytes to keep at most, the least recently used going first.

    Attributes:
        replays: whether pictures are replayed from the layer on. False, after a warning, where a replayed pass was not
            the full pass to the bit (modules that write, several runs, randomness of the generator's own).

    Raises:
        MismatchError: the moment is of another layer or model.
    """

    def __init__(self, layer: BoundLayer, moment: SecondMoment, latents: Tensor, *, memory: int = 2 << 30):
        check_layer(layer)
        check_moment(moment)
        check_latents(latents)
        self.layer, self.moment, self.latents = layer, moment, latents
        self.replays = True
        self._kept = _Kept(whole_number("memory", memory, 1, 2**62))
        self._lock = generator_lock(layer.generator)
        self._batches = 0  # bytes of key maps that were kept of batches
        self._fingerprint: str | None = None
        self._weight: tuple[list[tuple[int, int]], bytes] | None = None  # its state, and a digest of it
        self._proved: set[int] = set()  # batch sizes whose replay was compared with a full pass
        self._remembering = _Remembering(self)
        with self._lock:
            self._state = self._versions()
            moment.check(self._remembering, latents)

    @property
    def nbytes(self) -> int:
        """The memory that is kept now, in bytes."""
        return self._kept.nbytes

    def _versions(self) -> list[tuple[int, int]]:
        """The generator's tensors and how often each was written to, but for the layer's own weight."""
        own, state = self.layer.module, []
        for module in self.layer.generator.modules():
            for held in (module._buffers,) if module is own else (module._parameters, module._buffers):
                for tensor in held.values():
                    if tensor is not None:
                        state.append((id(tensor), 0 if tensor.is_inference() else tensor._version))
        return state

    def _weight_digest(self) -> bytes:
        """What the layer's own module holds now."""
        tensors = list(self.layer.module.parameters(recurse=False))
        state = [(id(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]
        if self._weight is None or self._weight[0] != state or len(state) < len(tensors):
            self._weight = state, _digest(*tensors)
        return self._weight[1]

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """A turn at the generator. What was kept is forgotten where somebody has changed the weights since."""
        with self._lock:
            now = self._versions()
            if now != self._state:
                self._kept.clear()
                self._batches = 0
                self._proved.clear()
                self._fingerprint, self._state = None, now
            try:
                yield
            finally:
                self._state = self._versions()

    def images(
        self, rows: int | Sequence[int], rewrites: Sequence[Rewrite] = (), strength: float | Sequence[float] = 1.0
    ) -> Tensor:
        """The images of some latents, as the generator returns them for ``latents[rows]``, bit for bit.

        Args:
            rows: numbers of latents.
            rewrites: changes that are on while the pictures are made, in this order; the generator itself is not left
                changed. Their layer need not be the session's; where it runs earlier, the whole pass is run.
            strength: one factor for all of them, or one each (see :meth:`rewrite_core.Rewrite.apply`).

        Raises:
            SelectionError: a row is not there. MismatchError: a rewrite is of another generator.
        """
        rows = [rows] if isinstance(rows, int) else [int(row) for row in rows]
        if not rows or not all(0 <= row < len(self.latents) for row in rows):
            raise SelectionError(f"rows are numbers from 0 to {len(self.latents) - 1}, at least one, not {rows[:8]}.")
        strengths = [strength] * len(rewrites) if isinstance(strength, int | float) else list(strength)
        if len(strengths) != len(rewrites):
            raise RewriteCoreError(f"There are {len(rewrites)} rewrites and {len(strengths)} strengths; give one each.")
        with self._turn():
            kept = self._record(rows)
            with self._changed(rewrites, strengths):
                if kept is None or any(kept.touches(change._bind(self.layer.generator).module) for change in rewrites):
                    return self.layer.render(self.latents[rows])
                return kept.replay()

    def _record(self, rows: list[int]) -> Record | None:
        """The record of these rows; None where they cannot be replayed."""
        if not self.replays:
            return None
        key = ("record", *rows)
        kept = self._kept.get(key)
        if kept is None:
            kept = record(self.layer, self.latents[rows])
            if len(rows) not in self._proved:
                if not torch.equal(kept.replay(), kept.images):
                    self.replays = False
                    warn(
                        f"What follows {self.layer.name!r} cannot be replayed to the bit in this generator (modules "
                        "that write, or randomness of its own), so every picture takes a whole pass."
                    )
                    return None
                self._proved.add(len(rows))
            self._kept.put(key, kept, kept.nbytes)
        return kept

    @contextlib.contextmanager
    def _changed(self, rewrites: Sequence[Rewrite], strengths: Sequence[float]) -> Iterator[None]:
        """The generator with changes on; its own bits are put back."""
        together: dict[str, tuple[Rewrite, float]] = {}  # a change that is given twice is on once, as strong as both
        for change, factor in zip(rewrites, strengths, strict=True):
            together[change._id] = change, factor + together.get(change._id, (change, 0.0))[1]
        strong = tuple((name, factor) for name, (_, factor) in together.items())
        key, known = (self._weight_digest(), strong), self._kept.get("changed")
        if known is not None and known[0] == key:
            with self._swapped(known[1]):
                yield
            return
        alone = bool(together) and self._alone([change for change, _ in together.values()])
        with contextlib.ExitStack() as stack:
            for change, factor in together.values():
                change.apply(self.layer.generator, strength=factor, force=True)
                stack.callback(change.revert, self.layer.generator, force=True)
            if alone:
                weight = self.layer.parameter.detach().clone()
                self._kept.put("changed", (key, weight), weight.nbytes)
            yield

    def _alone(self, changes: list[Rewrite]) -> bool:
        """Whether all that changes change is the layer's own weight, which is stored and which nothing else shares."""
        own, generator = self.layer.parameter, self.layer.generator
        if self.layer._adapter.computed is not None or own.is_inference() or stacks.read(self.layer) is not None:
            return False
        place, held = own.untyped_storage().data_ptr(), [*generator.parameters(), *generator.buffers()]
        held = [tensor for tensor in held if tensor.layout == torch.strided and not is_lazy(tensor)]
        sharing = [tensor for tensor in held if tensor.untyped_storage().data_ptr() == place]
        return len(sharing) == 1 and all(change._bind(generator).module is self.layer.module for change in changes)

    @contextlib.contextmanager
    def _swapped(self, weight: Tensor) -> Iterator[None]:
        """The layer with what changes have made of its weight before; nobody applies another one meanwhile."""
        own = self.layer.parameter
        with stacks.module_lock(self.layer.module), stacks.weight_lock(self.layer._adapter):
            before, own.data = own.data, weight
            try:
                yield
            finally:
                own.data = before

    def search(self, selection: Selection | Tensor, top: int = 12) -> SearchResult:
        """:func:`rewrite_core.search` among the session's latents."""
        with self._turn():
            return search(self._remembering, self.moment, selection, self.latents, top=top)

    def rewrite(self, edit: Edit, **options: Any) -> Rewrite:
        """:func:`rewrite_core.rewrite` with the session's layer, moment and latents."""
        return self._solved(rewrite, edit, options)

    def rewrite_many(self, edits: Sequence[Edit], **options: Any) -> list[Rewrite]:
        """:func:`rewrite_core.rewrite_many` with the session's layer, moment and latents."""
        with self._turn():
            changes = rewrite_many(self._remembering, self.moment, edits, self.latents, **options)
            for change in changes:
                change._made_on = self.layer
            return changes

    def erase(self, edit: Edit, **options: Any) -> Rewrite:
        """:func:`rewrite_core.erase` with the session's layer, moment and latents."""
        return self._solved(erase, edit, options)

    def zero(self, edit: Edit, **options: Any) -> Rewrite:
        """:func:`rewrite_core.zero` with the session's layer, moment and latents."""
        return self._solved(zero, edit, options)

    def measure(
        self,
        changes: Rewrite | Sequence[Rewrite],
        edit: Edit,
        unseen: Tensor | None = None,
        *,
        strength: float = 1.0,
        span: tuple[float, float] = (-1.0, 1.0),
        batch_size: int = 16,
    ) -> Report:
        """:func:`rewrite_core.measure` with the session's latents, moment and replayed pictures, to the bit. Where the
        edit's context is, is found once for each edit, as long as it is kept.

        Arguments and errors are those of :func:`rewrite_core.measure`.
        """
        several, steps = several_changes(changes), Steps(turn=self._turn)
        return self._measure(
            Given(several, edit, self.latents, unseen, None, self.moment, strength, span, batch_size, steps)
        )

    def _measure(self, given: Given) -> Report:
        """:meth:`measure`; other threads have turns between the steps."""
        whole = looking(self.layer, given)

        def look(latents: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
            if latents is not self.latents:
                return whole(latents, rows)
            strengths = [given.strength] * len(given.changes)
            return self.images(rows), self.images(rows, given.changes, strengths)

        key, own = ("scene", given.edit.to_json(), given.span, given.batch_size), given.unseen is None
        with self._turn():
            scene = self._kept.get(key) if own else None
        if scene is None:
            scene = scene_of(self.layer, given)
            with self._turn():
                if own:
                    self._kept.put(key, scene, scene.places.heat.nbytes)
        return measured(self.layer, given, look=look, scene=scene)

    def _solved(self, call: Callable[..., Rewrite], edit: Edit, options: dict[str, Any]) -> Rewrite:
        with self._turn():
            change = call(self._remembering, self.moment, edit, self.latents, **options)
            change._made_on = self.layer
            return change
