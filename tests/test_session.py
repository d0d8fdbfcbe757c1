"""Sessions: the same results as the free functions, nothing computed twice, bounded memory, many threads."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import reference
from torch import nn

import rewrite_core as rc
from rewrite_core.session import Session
from rewrite_core.turns import GeneratorLock, Latest


def make(noise=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)),
        nn.ConvTranspose2d(16, 8, 4),
        noise or nn.Identity(),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1),
    ).eval()


LAYER = "5"
Z = rc.sample_latents(16, 64)


def square(row, top, side=3):
    return rc.Selection.box(row, (top, top, top + side, top + side), (8, 8))


EDIT = rc.Edit(copy=square(0, 1), paste=square(1, 4), context=[square(1, 4), square(2, 4)])
HOW = {"loss": "l2", "region": "map", "rank": 2}
VALUES = HOW | {"objective": "value", "trust": None}


@pytest.fixture
def layer():
    return rc.bind(make(), LAYER)


@pytest.fixture
def moment(layer):
    return rc.collect_second_moment(layer, Z, progress=False)


@pytest.fixture
def session(layer, moment):
    return Session(layer, moment, Z)


def painted(layer, rows):
    with torch.no_grad():
        return layer.generator(Z[rows])


def test_images_are_the_generators_own(session, layer):
    for rows in ([3], [0, 5, 9], list(range(24))):
        for _ in range(2):
            assert torch.equal(session.images(rows), painted(layer, rows))
    assert session.replays


def test_images_with_rewrites_are_those_of_applying_them(session, layer, moment):
    one = session.rewrite(EDIT, **VALUES)
    other = session.rewrite(rc.Edit(copy=square(5, 2), paste=square(6, 3)), **VALUES)
    before = painted(layer, [1, 2, 3])
    for changes, strengths in (([one], [1.0]), ([one, other], [0.5, 2.0]), ([other], [-1.0])):
        found = session.images([1, 2, 3], changes, strengths)
        for change, strength in zip(changes, strengths, strict=True):
            change.apply(layer.generator, strength=strength)
        assert torch.equal(found, painted(layer, [1, 2, 3])) and not torch.equal(found, before)
        for change in changes:
            change.revert(layer.generator)
    assert torch.equal(painted(layer, [1, 2, 3]), before)


def test_a_change_is_made_once_for_many_pictures(session, layer, moment, monkeypatch):
    """Pictures with the same changes on, as strong as before, take the weight that they made; the generator is left as
    it was, and other changes, strengths and weights are made anew."""
    change, calls = session.rewrite(EDIT, **VALUES), []
    apply = rc.Rewrite.apply
    monkeypatch.setattr(rc.Rewrite, "apply", lambda *given, **more: calls.append(given) or apply(*given, **more))
    original, weight = session.images([0, 1]), layer.weight.clone()
    first = session.images([0, 1], [change])
    assert torch.equal(session.images([0, 1], [change]), first) and len(calls) == 1
    assert torch.equal(layer.weight, weight) and torch.equal(session.images([0, 1]), original)
    half = session.images([0, 1], [change], 0.5)
    assert len(calls) == 2 and not torch.equal(half, first)
    with torch.no_grad():
        layer.parameter.mul_(1.5)
    other = session.images([0, 1], [change], 0.5)
    assert len(calls) == 3 and not torch.equal(other, half)
    change.apply(layer.generator, strength=0.5, force=True)
    assert torch.equal(painted(layer, [0, 1]), other)


def test_a_rewrite_of_an_earlier_layer_takes_a_full_pass(session, layer):
    early = rc.bind(layer.generator, "1")
    change = rc.erase(
        early,
        rc.collect_second_moment(early, Z, progress=False),
        rc.Edit(paste=rc.Selection(1, torch.ones(4, 4))),
        Z,
        units=3,
    )
    found = session.images([1, 2], [change])
    with change:
        assert torch.equal(found, painted(layer, [1, 2]))


def test_results_are_those_of_the_free_functions(session, layer, moment):
    for call, free, how in (
        (session.rewrite, reference.rewrite, VALUES),
        (session.erase, rc.erase, {"units": 2, "rank": 1}),
        (session.zero, rc.zero, {"rank": 2}),
    ):
        for _ in range(2):  # cold and warm
            mine, theirs = call(EDIT, **how), free(layer, moment, EDIT, Z, **how)
            assert torch.equal(mine.directions, theirs.directions)
            assert torch.equal(mine.coefficients, theirs.coefficients)
    mine, theirs = session.search(EDIT.copy, top=5), rc.search(layer, moment, EDIT.copy, Z, top=5)
    assert torch.equal(mine.indices, theirs.indices) and torch.equal(mine.heatmaps, theirs.heatmaps)


def test_a_warm_edit_runs_no_pass_to_the_layer(session, layer):
    session.rewrite(EDIT, **VALUES)
    ran = []
    handle = layer.generator[1].register_forward_hook(lambda *_: ran.append(1))
    session.rewrite(EDIT, **VALUES)
    handle.remove()
    assert not ran


def test_a_warm_search_runs_nothing_and_finds_the_same(session, layer, moment):
    ran = []
    for _ in range(2):
        mine, theirs = session.search(EDIT.copy, top=7), rc.search(layer, moment, EDIT.copy, Z, top=7)
        assert torch.equal(mine.indices, theirs.indices) and torch.equal(mine.scores, theirs.scores)
        assert torch.equal(mine.heatmaps, theirs.heatmaps) and mine.level == theirs.level
    handle = layer.generator[1].register_forward_hook(lambda *_: ran.append(1))
    session.search(EDIT.pastes[0], top=3)
    handle.remove()
    assert len(ran) <= 2  # of a picture that no edit has used yet


def test_a_search_through_more_than_memory_holds(layer, moment):
    small = Session(layer, moment, Z, memory=60_000)
    one = small.search(EDIT.copy, top=7)
    assert 0 < small.nbytes <= 60_000
    other = small.search(EDIT.copy, top=7)
    assert torch.equal(one.heatmaps, other.heatmaps) and small.nbytes <= 60_000


def test_what_is_made_of_a_key_is_made_again_where_the_layer_changed(session, layer, moment):
    session.rewrite(EDIT, **VALUES)
    for tensor in (layer.module.weight, layer.module.bias):
        with torch.no_grad():
            tensor.mul_(1.5)
        mine, theirs = session.rewrite(EDIT, **VALUES), reference.rewrite(layer, moment, EDIT, Z, **HOW)
        assert torch.equal(mine.coefficients, theirs.coefficients) and mine.losses == theirs.losses


def test_changed_weights_are_noticed(session, layer):
    session.images([1, 2])
    with torch.no_grad():
        layer.generator[1].weight.mul_(1.5)
    assert torch.equal(session.images([1, 2]), painted(layer, [1, 2]))
    with pytest.raises(rc.MismatchError):
        session.rewrite(EDIT, **VALUES)


def test_memory_is_bounded(layer, moment):
    small = Session(layer, moment, Z, memory=40_000)
    for row in range(60):
        small.images([row])
        assert small.nbytes <= 40_000
    assert small.nbytes > 10_000
    assert torch.equal(small.images(list(range(40))), painted(layer, list(range(40))))  # too much to keep


class Writes(nn.Module):
    """Puts out something else each time."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls * 1e-3


def test_what_cannot_be_replayed_is_painted_in_full():
    generator = make()
    generator.append(Writes())
    layer = rc.bind(generator, LAYER)
    session = Session(layer, rc.collect_second_moment(layer, Z, progress=False), Z)
    with pytest.warns(UserWarning, match="cannot be replayed"):
        session.images([1])
    assert not session.replays and session.images([1]).shape == (1, 3, 8, 8)


def test_noise_is_that_of_a_full_pass():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    generator = make(Noise())
    generator.append(Noise())  # before the layer and after it
    layer = rc.bind(generator, LAYER)
    session = Session(layer, rc.collect_second_moment(layer, Z, progress=False), Z)
    first = session.images([1, 2])
    assert (
        torch.equal(session.images([1, 2]), first) and torch.equal(layer.render(Z[[1, 2]]), first) and session.replays
    )


@pytest.mark.parametrize("rows", [[], [-1], [64], [0, 100]])
def test_rows_that_are_not_there(session, rows):
    with pytest.raises(rc.SelectionError, match="0 to 63"):
        session.images(rows)


def test_strengths_are_one_each(session):
    with pytest.raises(rc.RewriteCoreError, match="one each"):
        session.images([0], [session.rewrite(EDIT, **VALUES)], [1.0, 2.0])


def test_many_threads(session, layer):
    change = session.rewrite(EDIT, **VALUES)
    plain, edited = painted(layer, [1, 2]), session.images([1, 2], [change])
    wrong = []

    def work(number):
        for _ in range(15):
            if number % 2:
                wrong.extend([] if torch.equal(session.images([1, 2], [change]), edited) else [number])
            else:
                wrong.extend([] if torch.equal(session.images([1, 2]), plain) else [number])
            session.rewrite(EDIT, **VALUES)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(painted(layer, [1, 2]), plain)


def test_a_generator_goes_to_whoever_has_waited_longest():
    lock, order, started = GeneratorLock(), [], threading.Event()

    def long():
        for number in range(3):
            with lock, lock:  # twice
                order.append(f"long {number}")
                started.set()
                if number == 0:
                    while not lock._line:
                        pass

    def short():
        started.wait()
        with lock:
            order.append("short")

    threads = [threading.Thread(target=work) for work in (long, short)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["long 0", "short", "long 1", "long 2"]
    assert lock._owner is None and not lock._line


def test_a_newer_call_replaces_the_one_that_waits():
    latest, started, go = Latest(), threading.Event(), threading.Event()

    def slow():
        started.set()
        go.wait()
        return "slow"

    first = latest.submit(slow)
    started.wait()
    waiting = [latest.submit(lambda number=number: number) for number in range(5)]
    go.set()
    assert first.result() == "slow" and waiting[-1].result() == 4
    assert all(future.cancelled() for future in waiting[:-1])
    failing = latest.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result()
    latest.close()


def test_a_session_knows_how_often_a_layer_runs_and_how_it_was_called():
    class Tiled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return torch.cat([self.conv(part) for part in x.split(4, 2)], 2)

    class Scaled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    z, mask = torch.randn(12, 3, 8, 8), torch.ones(8, 8)
    edit = rc.Edit(copy=rc.Selection(0, mask), paste=rc.Selection(1, mask), context=[rc.Selection(2, mask)], latents=z)
    for generator, name in ((Tiled(), "conv"), (torch.nn.Sequential(Scaled(3, 4, 1)), "0")):
        layer = rc.bind(generator, name)
        moment = rc.collect_second_moment(layer, z, progress=False)
        session = rc.Session(layer, moment, z)
        if name == "conv":
            with pytest.raises(rc.RewriteCoreError, match="runs 2 times"):
                session.rewrite(edit, region="map")
        else:
            with pytest.warns(UserWarning, match="not known"):
                change = session.rewrite(edit, region="map", solver=rc.LM())
            assert change.solver == "adam" and change.losses[-1] < change.losses[0]
