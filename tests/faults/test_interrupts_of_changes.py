"""Ctrl-C at any moment of a write leaves the weight as it was, or a change that reverts.

Interrupts come where Python lets them in: as a function is entered, and as a call of C returns.
"""

import gc
import sys
import threading

import pytest
from helpers.small import bits, fit, generator, same
from torch.nn.utils import parametrizations, spectral_norm

import rewrite_core as rc
from rewrite_core.rewrites import stack

KINDS = {
    "stored": lambda module: module,
    "parametrized": parametrizations.spectral_norm,
    "hooked": spectral_norm,
}


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def moments(call):
    """How many moments a call has."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_return")

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def interrupted(call, moment):
    """Make a call, and interrupt it at that moment."""
    left = moment

    def seen(frame, event, argument):
        nonlocal left
        left -= event in ("call", "c_return")
        if left == 0:
            sys.setprofile(None)
            raise Interrupt

    sys.setprofile(seen)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.setprofile(None)


def lock_is_free(layer):
    """Whether another thread can take the weight's lock."""
    free = []

    def take():
        lock = stack.module_lock(layer.module)
        free.append(lock.acquire(timeout=5))
        if free[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return free[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("which", ["apply", "revert", "with", "state_dict", "second apply"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_reverts_to_the_bit(kind, which):
    G = generator(KINDS[kind])
    layer, change = fit(G)
    below = rc.Rewrite("4", change.directions, change.coefficients * 0.5, change.fitted_to, "lm", bound=layer)
    before = bits(G)

    def inside():
        with change:
            pass

    call = {"with": inside, "second apply": change.apply}.get(which) or getattr(change, which)

    def prepare():
        if which == "revert":
            change.apply()
        elif which == "second apply":
            below.apply()

    def clear():
        for each in (change, below):
            if each.applied:
                each.revert()
            else:  # and what was half done is undone
                with pytest.raises(rc.MismatchError, match="not applied"):
                    each.revert()

    prepare()
    count = moments(call)
    clear()
    for moment in range(1, count + 1, max(1, count // 60)):
        prepare()
        interrupted(call, moment)
        clear()
        assert same(before, G), f"at moment {moment} of {count}"
        assert not hasattr(G[4], stack.NAME)
    gc.collect()
    assert lock_is_free(layer)


def test_a_record_that_was_made_and_no_write_is_no_change():
    G = generator()
    layer, change = fit(G)
    before = bits(G)
    change.apply()
    record = getattr(G[4], stack.NAME)
    change.revert()
    setattr(G[4], stack.NAME, {**record, "before": None})  # as an interrupt right before the write leaves it
    assert not change.applied and same(before, G)
    change.apply().revert()
    assert same(before, G) and not hasattr(G[4], stack.NAME)
    layer.parameter.data.copy_(record["weight"])
    setattr(G[4], stack.NAME, {**record, "before": None})  # right after it
    assert change.applied
    change.revert()
    assert same(before, G) and not hasattr(G[4], stack.NAME)
