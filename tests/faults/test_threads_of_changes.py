"""Threads: apply and revert of one weight wait for each other, and a change may be shared by threads."""

import contextlib
import copy
import sys
import threading

import pytest
import torch
from helpers.small import bits, fit, generator, same
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import rewrite_core as rc
from rewrite_core.rewrites import stack


@pytest.fixture(autouse=True)
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*loops):
    """Run each in a thread of its own; what it raised, if anything."""
    raised = []

    def run(loop):
        try:
            loop()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[loop]) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    return raised


def scaled(change, factor):
    other = copy.deepcopy(change)
    other.coefficients = change.coefficients * factor
    return other


def racing(change, G, times=200):
    def loop():
        for _ in range(times):
            with contextlib.suppress(rc.MismatchError):  # the other one is below it, as it was not fitted to that
                change.apply(G)
                change.revert(G)

    return loop


@pytest.mark.parametrize("wrap", [lambda module: module, parametrizations.spectral_norm, spectral_norm])
def test_racing_apply_and_revert_leave_nothing_in(wrap):
    G = generator(wrap)
    _, change = fit(G)
    before = bits(G)
    assert not together(*(racing(scaled(change, factor), G) for factor in (1, 0.5, -1)))
    assert same(before, G) and not hasattr(G[4], stack.NAME)


def test_racing_on_two_layers_that_share_their_weight():
    torch.manual_seed(0)
    G = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    G[2].weight = G[0].weight
    before, loops = bits(G), []
    for name in ("0", "2"):
        layer = rc.bind(G, name)
        rows = torch.nn.functional.normalize(torch.randn(1, 4))
        change = rc.Rewrite(
            name, rows, torch.randn(4, 1, 3, 3), layer.weight_fingerprint(layer.weight), "lm", bound=layer
        )
        loops.append(racing(change, G))
    assert not together(*loops)
    assert same(before, G)


def test_one_change_in_two_threads_each_with_a_generator_of_its_own():
    G = generator()
    _, change = fit(G)
    copies = [copy.deepcopy(G) for _ in range(3)]
    before, z = bits(G), torch.randn(2, 16)
    with change, torch.no_grad():
        edited = G(z)

    def loop(own):
        for number in range(100):
            if number % 2:
                with change.apply(own), torch.no_grad():
                    assert torch.equal(own(z), edited)
            else:
                change.apply(own)
                change.revert()  # its own, not what another thread applied last
            assert same(before, own)

    assert not together(*(lambda own=own: loop(own) for own in copies))
    assert same(before, G) and not change.applied


def test_a_change_of_several_generators_takes_no_two_locks_at_a_time():
    """Each thread applies to both, in another order: that would be a deadlock."""
    one, two = generator(), generator()
    _, change = fit(one)
    second = scaled(change, 0.5)

    def loop(own, first, last):
        for _ in range(100):
            with contextlib.suppress(rc.MismatchError):
                own.apply(first)
                own.apply(last)
            for place in (first, last):
                with contextlib.suppress(rc.MismatchError):
                    own.revert(place)

    before = bits(one)
    assert not together(lambda: loop(change, one, two), lambda: loop(second, two, one))
    assert same(before, one) and same(before, two)


def test_locks_are_dropped():
    G = generator()
    _, change = fit(G)
    change.apply()
    change.revert()
    assert not stack._locks
