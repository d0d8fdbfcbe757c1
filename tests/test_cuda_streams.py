"""Collection on a GPU, without one: a machine that runs a second stream late, or at random, and whose freed memory is
used again at once. What is read too early or too late there comes out wrong."""

import contextlib
import itertools
import math
import random
import weakref

import numpy as np
import pytest
import torch
from conftest import DATA
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import rewrite_core as rc
from rewrite_core.statistics import collection, cuda_streams, launches

WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")


class Event:
    def __init__(self, machine, stream, place):
        self.machine, self.stream, self.place = machine, stream, place

    def query(self):
        self.machine.maybe()
        return self.stream is self.machine.main or self.machine.ran >= self.place

    def synchronize(self):
        self.machine.waits.append("synchronize")
        self.machine.run(self.place if self.stream is self.machine.side else 0)


class Stream:
    def __init__(self, machine):
        self.machine = machine

    def record_event(self):
        machine = self.machine
        return Event(machine, self, machine.time if self is machine.main else machine.ran + len(machine.queue))

    def wait_event(self, event):
        machine = self.machine
        if self is machine.main and event.stream is machine.side:
            machine.run(event.place)
        elif self is machine.side and event.stream is machine.main:
            machine.seen = max(machine.seen, event.place)


class Memory:
    """Blocks that are given out again as soon as nobody has them, and are full of NaN then."""

    def __init__(self):
        self.blocks, self.free = [], []

    def take(self, like):
        fitting = [number for number, block in enumerate(self.free) if block.size == like.numel()]
        if not fitting:
            self.blocks.append(np.empty(like.numel(), np.float32))
        block = self.free.pop(fitting[0]) if fitting else self.blocks[-1]
        block.fill(np.nan)
        handed = block[:]
        weakref.finalize(handed, self.free.append, block)
        return torch.from_numpy(handed).view(like.shape)

    def unowned(self, value):
        """The same memory, not kept by it."""
        if isinstance(value, torch.Tensor):
            for block in self.blocks:
                if 0 <= value.data_ptr() - block.ctypes.data < block.nbytes:
                    offset = (value.data_ptr() - block.ctypes.data) // 4
                    return torch.from_numpy(block).as_strided(value.shape, value.stride(), offset)
        return value


class Machine(TorchDispatchMode):
    """Runs every operation of the main stream at once, and those of the side stream when something waits for them, or,
    with a `seed`, earlier, at random. Until then their results are NaN (or whatever integers they are not)."""

    def __init__(self, seed=None):
        super().__init__()
        self.random = None if seed is None else random.Random(seed)
        self.main, self.side = Stream(self), Stream(self)
        self.current = self.main
        self.memory = Memory()
        self.queue, self.ran, self.busy, self.most = [], 0, False, 0
        self.time, self.seen, self.written = 0, 0, {}  # of the main stream; how much of it the side stream waited for
        self.waits = []

    # what stands for torch.cuda in rewrite_core.statistics.cuda_streams
    def Stream(self, device):
        return self.side

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, place):
        self.busy = True
        while self.ran < place:
            self.queue.pop(0)()
            self.ran += 1
        self.busy = False

    def maybe(self):
        if self.random is not None and self.queue and self.random.random() < 0.3:
            self.run(self.ran + self.random.randrange(1, len(self.queue) + 1))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.busy:
            return operation(*args, **kwargs)
        name = operation._schema.name.split("::")[1]
        if name in WAITING:
            self.waits.append(name)
        if self.current is self.main:
            self.maybe()
            result = operation(*args, **kwargs)
            self.time += 1
            changed = [value for value, _ in written(operation, args, kwargs)]
            for tensor in [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)] + changed:
                self.written[tensor.untyped_storage().data_ptr()] = self.time
            return result
        return self.later(operation, args, kwargs)

    def later(self, operation, args, kwargs):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                at = self.written.get(leaf.untyped_storage().data_ptr(), 0)
                assert at <= self.seen, f"{operation} on the side stream reads what the main one has yet to write"
        returned = operation._schema.returns
        if any(one.alias_info is not None and not one.alias_info.is_write for one in returned):  # a view
            return operation(*args, **kwargs)
        args, kwargs = tree_map(self.memory.unowned, (args, kwargs))
        changed = written(operation, args, kwargs)
        if changed:
            self.queue.append(lambda: operation(*args, **kwargs))
            result = changed[0][0] if returned else None
        else:
            shapes = operation(*args, **kwargs)
            result = tree_map(spoilt, shapes)

            def fill():
                for to, value in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
                    to.copy_(value)

            self.queue.append(fill)
            for leaf in tree_leaves(result):
                self.written.pop(leaf.untyped_storage().data_ptr(), None)
        self.most = max(self.most, len(self.queue))
        return result


def written(operation, args, kwargs):
    """The tensors among an operation's arguments that it writes to."""
    found = []
    for number, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                found.append((value, argument.name))
    return found


def spoilt(value):
    return torch.full_like(value, torch.nan) if value.is_floating_point() else torch.bitwise_not(value)


@contextlib.contextmanager
def machine(monkeypatch, seed=None):
    one = Machine(seed)
    with monkeypatch.context() as patch, one:
        side = object.__new__(cuda_streams.SideStream)
        patch.setattr(cuda_streams, "cuda", one)
        cuda_streams.SideStream.__init__(side, torch.device("cpu"))
        patch.setattr(collection, "side_stream", lambda device: side)
        patch.setattr(cuda_streams, "pinned", lambda tensor: torch.full(tensor.shape, torch.nan, dtype=tensor.dtype))
        yield one
    assert one.current is one.main


class Network(torch.nn.Module):
    """Two convolutions, whose maps lie in memory of `memory`'s, where there is one."""

    memory = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(5, 6, 1), torch.nn.Conv2d(6, 3, 1)

    def placed(self, maps):
        return maps if self.memory is None else self.memory.take(maps).copy_(maps)

    def forward(self, z):
        x = self.placed(z[:, :, None, None] * torch.linspace(1, 2, 12).view(3, 4))
        return self.second(self.placed(torch.relu(self.first(x))))


class Overwriting(Network):
    """Writes to the keys of its first convolution after that has run."""

    def forward(self, z):
        x = self.placed(z[:, :, None, None] * torch.linspace(1, 2, 12).view(3, 4))
        y = torch.relu(self.first(x))
        x.fill_(7)
        return self.second(self.placed(y))


class Static(Network):
    """Has its keys in the same memory in every pass, as parts in CUDA graphs have."""

    def forward(self, z):
        x = super().placed(torch.relu(self.first(z[:, :, None, None].expand(-1, -1, 3, 4))))
        if getattr(self, "kept", x).shape != x.shape or not hasattr(self, "kept"):
            self.kept = torch.empty_like(x)
        self.kept.copy_(x)
        return self.second(self.kept)


class Viewed(Network):
    """Keys that are a view of what the generator keeps, and of what it does not."""

    def forward(self, z):
        if not hasattr(self, "kept") or self.kept.shape[1] < len(z):
            self.kept = torch.empty(2, len(z), 5, 3, 4)
        x = self.kept[1, : len(z)]
        x.copy_(z[:, :, None, None].expand(-1, -1, 3, 4))
        y = torch.relu(self.first(x))
        return self.second(self.placed(y.transpose(2, 3)).transpose(2, 3))


SEEDS = (None, 0, 1, 2)
LOOKS = 2  # passes before the first batch: how often layers run, and whether rows depend on each other
GENERATORS = (Network, Overwriting, Static, Viewed)
Z = torch.randn(39, 5, generator=torch.Generator().manual_seed(1))


def broken(z):
    z = z.clone()
    z[[3, 30], 2] = torch.nan
    z[8:12, 0] = torch.inf  # all of a batch
    return z


def collect(generator, names=("second",), z=Z, **how):
    layers = [rc.bind(generator, name) for name in names]
    how = {"batch_size": 4, "progress": False} | how
    return rc.collect_second_moments(layers, z, **how)


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one._sum, other._sum), (one._sum - other._sum).abs().max()
        assert one._facts() == other._facts() and one.count > 0
        assert (one.key_errors is None) == (other.key_errors is None)
        assert one.key_errors is None or torch.equal(one.key_errors, other.key_errors)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("names", [("second",), ("first", "second")], ids=str)
@pytest.mark.parametrize("generator", GENERATORS)
def test_the_same_bits(generator, names, seed, monkeypatch):
    want = collect(generator(), names)
    with machine(monkeypatch, seed) as gpu:
        network = generator()
        network.memory = gpu.memory
        got = collect(network, names)
    assert_same(got, want)
    assert gpu.most > 0 and not gpu.queue


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "how",
    [
        {"skip_nonfinite": True},
        {"skip_nonfinite": True, "keys": True},
        {"keys": True, "until": 0.4},
        {"until": 0.2, "skip_nonfinite": True},
        {"mask": True},
        {"mask": True, "skip_nonfinite": True, "keys": True},
    ],
    ids=lambda how: "-".join(how),
)
def test_the_same_bits_whatever_is_asked(how, seed, monkeypatch):
    z = broken(Z) if "skip_nonfinite" in how else Z
    names = ("first", "second")
    if "keys" in how:
        how = how | {"keys": [torch.eye(5)[:2], torch.ones(6)]}
    if "mask" in how:
        how = how | {"mask": lambda batch: (batch[:, :1, None] + torch.linspace(-1, 1, 12).view(3, 4)) > 0}
    if "until" in how:
        z = torch.cat([z, torch.randn(500, 5, generator=torch.Generator().manual_seed(2))])
    want = collect(Network(), names, z, **how)
    with machine(monkeypatch, seed) as gpu:
        network = Network()
        network.memory = gpu.memory
        got = collect(network, names, z, **how)
    if "until" in how:  # looked at less often, from the 32nd batch on
        used = got[0].latents["used"]
        assert want[0].latents["used"] <= used < 1.07 * want[0].latents["used"] + 4
        want = collect(Network(), names, z[:used], **how | {"until": None})
        for one, other in zip(got, want, strict=True):
            assert max([one.standard_error, *(one.key_errors.tolist() if "keys" in how else ())]) <= how["until"]
            other.latents = one.latents
    if "skip_nonfinite" in how:
        assert got[0].skipped == 6
    assert_same(got, want)


@pytest.mark.parametrize(
    ("names", "blocks"), [(("second",), {60: 1, 72: 2}), (("first", "second"), {60: 1, 72: 1})], ids=str
)
def test_memory_is_constant(names, blocks, monkeypatch):
    """The last layer's maps of one batch beside the pass's own, even if the host never waits and updates never end by
    themselves. (With two layers, the second's are done with when the first's turn comes again.)"""
    with machine(monkeypatch) as gpu:
        network = Network()
        network.memory = gpu.memory
        collect(network, names, Z[:36])
    sizes = [block.size // 4 for block in gpu.memory.blocks]
    looks = {30: 1, 36: 1}  # passes on two latents, before the first batch
    assert {size: sizes.count(size) for size in sizes} == blocks | looks


@pytest.mark.parametrize("how", [{}, {"skip_nonfinite": True}, {"keys": [torch.eye(5), torch.eye(6)]}], ids=str)
def test_no_waiting_between_batches(how, monkeypatch):
    """From the second batch on the host reads nothing and waits for nothing, but where an error of keys falls due."""
    with machine(monkeypatch) as gpu:
        network, all_waits = Network(), []
        network.register_forward_pre_hook(lambda *_: all_waits.append(len(gpu.waits)))
        collect(network, ("first", "second"), broken(Z)[16:28] if how else Z[16:28], **how)  # 3 batches
        waits = all_waits[LOOKS:]
        assert len(waits) == 3 and waits[2] == waits[1], gpu.waits[waits[1] :]
        assert gpu.waits[waits[2] :].count("synchronize") <= 4
        gpu.waits.clear(), all_waits.clear()
        collect(network, ("second",), Z, **how | {"keys": how["keys"][1:]} if "keys" in how else how)
    waits = all_waits[LOOKS:]
    changes = [number for number, (one, other) in enumerate(itertools.pairwise(waits[1:]), 2) if other > one]
    assert changes == ([8] if "keys" in how else []), gpu.waits


def test_updates_run_beside_the_next_pass(monkeypatch):
    """When a pass begins, the update before it has not been waited for, by the host or by the pass's stream."""
    with machine(monkeypatch) as gpu:
        network, under_way = Network(), []
        network.memory = gpu.memory
        network.register_forward_pre_hook(lambda *_: under_way.append(len(gpu.queue)))
        collect(network)
    assert not any(under_way[: LOOKS + 1]) and all(under_way[LOOKS + 1 :]) and len(under_way) == LOOKS + 10
    with machine(monkeypatch) as gpu:
        network, under_way = Static(), []  # which may write to its keys
        network.register_forward_pre_hook(lambda *_: under_way.append(len(gpu.queue)))
        collect(network)
    assert not any(under_way)


@pytest.mark.parametrize("forgotten", ["hold", "held_elsewhere", "after", "kept"])
def test_the_machine_notices(forgotten, monkeypatch):
    """What these tests are worth: without each of the precautions they fail."""
    generator, names = Network, ("second",)
    if forgotten == "hold":
        monkeypatch.setattr(cuda_streams.SideStream, "hold", lambda *args: None)
    elif forgotten == "held_elsewhere":
        generator = Static
        monkeypatch.setattr(launches, "held_elsewhere", lambda tensor: False)
    elif forgotten == "after":
        monkeypatch.setattr(
            cuda_streams.SideStream, "after", lambda self, origin: cuda_streams.cuda.stream(self._stream)
        )
    else:  # maps of the first layer are not waited for
        generator, names = Overwriting, ("first", "second")
        launch = launches.Launches.launch
        monkeypatch.setattr(launches.Launches, "launch", lambda *args: launch(*args[:-1], True))
        monkeypatch.setattr(launches.Launches, "release", lambda self: None)
    want = None
    with monkeypatch.context() as patch:
        patch.undo()
        want = collect(generator(), names)
    with pytest.raises((AssertionError, rc.NonFiniteError)):
        with machine(monkeypatch) as gpu:
            network = generator()
            network.memory = gpu.memory
            got = collect(network, names)
        assert_same(got, want)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("value", "words"), [(torch.nan, "NaN or infinity"), (1e30, "squares overflow torch.float32")])
def test_errors_name_the_batch_that_was_bad(value, words, seed, monkeypatch):
    z = Z.clone()
    z[13, 1] = value
    z[25, 1] = torch.nan
    with pytest.raises(rc.NonFiniteError, match=words) as plain:
        collect(Network(), ("first", "second"), z)
    with machine(monkeypatch, seed), pytest.raises(rc.NonFiniteError, match=words) as caught:
        collect(Network(), ("first", "second"), z)
    assert str(caught.value) == str(plain.value) and "'first', batch 3 (latents 12 to 15)" in str(plain.value)


def test_an_error_of_the_generator_comes_after_that_of_an_earlier_batch(monkeypatch):
    z = Z.clone()
    z[13] = torch.nan
    with machine(monkeypatch) as gpu:
        network, batches = Network(), []
        network.memory = gpu.memory

        def fail(*_):
            batches.append(0)
            if len(batches) == LOOKS + 5:
                raise OSError("no more")

        network.register_forward_pre_hook(fail)
        with pytest.raises(rc.NonFiniteError, match="batch 3") as caught:
            collect(network, z=z)
        assert isinstance(caught.value.__cause__.__context__, OSError)
        batches.clear()
        with pytest.raises(OSError, match="no more"):
            collect(network)


@pytest.mark.parametrize("seed", SEEDS)
def test_checkpoints_hold_whole_batches_and_resume_to_the_same_bits(seed, tmp_path, monkeypatch):
    names, keys = ("first", "second"), [None, torch.eye(6)[:3]]
    z = torch.cat([broken(Z), Z])
    want = collect(Network(), names, z, keys=keys, skip_nonfinite=True)
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        "rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks)
    )  # about every 5 batches
    chances = random.Random(seed)
    paths = [tmp_path / name for name in names]
    for _ in range(100):
        network = Network()
        left = chances.randrange(4, 14)

        def fail(*_):
            nonlocal left
            left -= 1
            if not left:
                raise KeyboardInterrupt

        with machine(monkeypatch, seed) as gpu:
            network.memory = gpu.memory
            network.register_forward_pre_hook(fail)
            try:
                got = collect(network, names, z, keys=keys, skip_nonfinite=True, checkpoints=paths)
                break
            except KeyboardInterrupt:
                continue
    assert_same(got, want)
    for path, moment in zip(paths, got, strict=True):
        assert torch.equal(rc.SecondMoment.load(path)._sum, moment._sum)


def test_a_checkpoint_is_never_of_bad_keys(tmp_path, monkeypatch):
    z = Z.clone()
    z[22] = torch.nan
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr("rewrite_core.statistics.collection.time.monotonic", lambda: next(ticks))  # after every batch
    with machine(monkeypatch), pytest.raises(rc.NonFiniteError, match="batch 5"):
        collect(Network(), z=z, checkpoints=[tmp_path / "moment"])
    saved, progress, _ = rc.SecondMoment._load(tmp_path / "moment")
    assert progress["done"] == 20 and torch.equal(saved._sum, collect(Network(), z=z[:20])[0]._sum)


def test_a_real_generator(monkeypatch):
    layer = rc.bind(rc.load_proggan(DATA / "proggan_state.npz"), "layer5.conv")
    latents = rc.sample_latents(64, 30)
    want = rc.collect_second_moment(layer, latents, batch_size=4, progress=False)
    with machine(monkeypatch, 3):
        got = rc.collect_second_moment(layer, latents, batch_size=4, progress=False)
    assert_same([got], [want])
    assert got.fingerprint == want.fingerprint and not math.isnan(got.standard_error)


def test_memory_that_others_hold():
    with torch.no_grad():
        key = torch.ones(4) * 2
        kept = key.detach()
        assert cuda_streams.held_elsewhere(kept)
        del key
        assert not cuda_streams.held_elsewhere(kept)
        base = torch.ones(4)
        kept = base.view(2, 2).detach()
        assert cuda_streams.held_elsewhere(kept)
        del base
        assert not cuda_streams.held_elsewhere(kept)
    layer = torch.nn.Linear(3, 3)
    assert cuda_streams.held_elsewhere(layer.weight.expand(2, 3, 3).detach())


def test_that_cannot_be_told_counts_as_held(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    assert cuda_streams.held_elsewhere(torch.ones(1))
