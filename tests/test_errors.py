"""What is raised and warned of: one base class, checked arguments, messages that a terminal can show."""

import enum
import math
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch

import rewrite_core as rc
from rewrite_core import errors
from rewrite_core.ops.finite import all_finite


def test_every_exception_has_one_base_and_every_class_is_exported():
    for name, each in vars(errors).items():
        if isinstance(each, type) and issubclass(each, Exception):
            assert getattr(rc, name) is each and name in rc.__all__
            assert issubclass(each, Warning) or issubclass(each, rc.RewriteCoreError)
    assert issubclass(rc.RewriteCoreError, ValueError) and issubclass(rc.ArgumentError, TypeError)
    assert issubclass(rc.BackendUnavailable, RuntimeError)
    assert rc.ops.DiagonalShiftWarning is rc.DiagonalShiftWarning


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind(value):
    whole = errors.whole_number("count", value)
    assert whole == 3 and type(whole) is int


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 2.0, "3", None, [3], np.array([3])])
def test_what_is_no_whole_number(value):
    with pytest.raises(rc.ArgumentError, match="count must be an integer of at least 1, and at most 9, not "):
        errors.whole_number("count", value, most=9)


@pytest.mark.parametrize("value", [0, 10, -(10**5000)], ids=["0", "10", "huge"])
def test_whole_numbers_out_of_range(value):
    with pytest.raises(rc.RewriteCoreError, match="count must be an integer of at least 1, and at most 9") as caught:
        errors.whole_number("count", value, most=9)
    assert not isinstance(caught.value, TypeError)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5)])
def test_numbers_of_any_kind(value):
    real = errors.number("until", value, above=0, most=1)
    assert real == 0.5 and type(real) is float
    assert errors.number("until", np.int64(1)) == 1.0


@pytest.mark.parametrize("value", ["0.5", True, np.True_, None, 1j, [0.5], torch.ones(2), b"1", np.str_("1")])
def test_what_is_no_number(value):
    with pytest.raises(rc.ArgumentError, match="until must be a number above 0 and at most 1, not "):
        errors.number("until", value, above=0, most=1)


@pytest.mark.parametrize(
    "value", [0, -1.0, 1.5, math.nan, math.inf, 10**400, np.float32("nan")], ids=lambda value: type(value).__name__
)
def test_numbers_out_of_range(value):
    with pytest.raises(rc.RewriteCoreError, match="until must be a number above 0 and at most 1, not ") as caught:
        errors.number("until", value, above=0, most=1)
    assert not isinstance(caught.value, TypeError)


def test_choices():
    assert errors.choice("loss", "l2", ("l1", "l2")) == "l2"
    with pytest.raises(rc.RewriteCoreError, match="loss must be 'l1' or 'l2', not 'l3'"):
        errors.choice("loss", "l3", ("l1", "l2"))
    for value in (None, 2, ["l1"], enum.Enum):
        with pytest.raises(rc.ArgumentError, match="loss must be 'l1' or 'l2', not "):
            errors.choice("loss", value, ("l1", "l2"))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [1] * 10**6, 10**5000, nested(10**4), {"a" * 999: "b" * 999}],
    ids=lambda value: type(value).__name__,
)
def test_what_is_quoted_is_short(value):
    assert len(errors.quoted(value)) < 200


def test_messages_hold_nothing_that_a_terminal_acts_on():
    nasty = "layer\x1b[2J\x9b31m\r\u202e\x00\udcff"
    message = str(rc.MismatchError(f"It is of {nasty}.\nCollect it."))
    assert message == "It is of layer\\x1b[2J\\x9b31m\\r\\u202e\\x00\\udcff.\nCollect it."
    assert str(pickle.loads(pickle.dumps(rc.MismatchError(message)))) == message
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors.warn(f"It is {nasty}.", rc.LatentsWarning)
    assert str(caught[0].message).startswith("It is layer\\x1b[2J") and caught[0].filename == __file__


def test_warnings_are_heard_in_one_thread_alone():
    other = []

    def loud():
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            errors.warn("Elsewhere.")
        other.extend(shown)

    with errors.heard() as said:
        errors.warn("Here.")
        errors.warn("Here.")
        thread = threading.Thread(target=loud)
        thread.start()
        thread.join()
    assert said == ["Here."] and [str(each.message) for each in other] == ["Elsewhere."]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_are_found_finite_or_not(dtype):
    big = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)  # adds up to infinity
    assert all_finite(big) and all_finite(torch.zeros(0, dtype=dtype)) and all_finite(torch.randn(7).to(dtype))
    for bad in (math.nan, math.inf, -math.inf):
        broken = torch.randn(100).to(dtype)
        broken[3] = bad
        assert not all_finite(broken)
    broken = torch.tensor([math.inf, -math.inf]).to(dtype)
    assert not all_finite(broken)
