"""Constants that C++ and Python both have: the values are the same, by name."""

import pytest

from rewrite_core import backends
from rewrite_core.ops.fit_low_rank_op import problem as fit_low_rank
from rewrite_core.ops.fit_projected_op import problem as fit_projected
from rewrite_core.ops.fit_projected_op import winograd

PYTHON = {"fit_low_rank": vars(fit_low_rank), "fit_projected": vars(fit_projected) | vars(winograd)}


@pytest.mark.parametrize("op", PYTHON)
def test_cpp_constants_are_pythons(op):
    constants = backends.extension().constants[op]
    assert len(constants) >= 5
    assert constants == {name: PYTHON[op][name] for name in constants}


def test_a_field_is_missing_or_unknown():
    """Fields are passed by name: what is wrong with them is said, and nothing is read."""
    call = backends.extension().cholesky_solve
    given = {
        "matrices": None,
        "lower": None,
        "sketches": None,
        "batch": 0,
        "n": 1,
        "rhs": None,
        "sides": 0,
        "x": None,
        "threads": 1,
    }
    call(**given)
    with pytest.raises(TypeError, match="the field sides is missing"):
        call(**{name: given[name] for name in given if name != "sides"})
    with pytest.raises(TypeError, match=r"1 of these fields are none of this call's: .*'side'"):
        call(**given, side=1)
    with pytest.raises(TypeError, match="the field n has a value of the wrong type"):
        call(**given | {"n": "one"})
    with pytest.raises(TypeError, match="by its name"):
        call(0)
    with pytest.raises(ValueError, match="no instruction set sse9"):
        call(**given, isa="sse9")
    with pytest.raises(RuntimeError, match="cholesky_solve: a size, stride or pointer is out of range"):
        call(**given | {"n": 0})
