"""``with change:`` and ``change.apply()`` act on the generator that the change was made on."""

import copy

import pytest
from helpers.small import bits, fit, generator, same

import rewrite_core as rc


@pytest.fixture
def made():
    G = generator()
    return G, copy.deepcopy(G), fit(G)[1]


@pytest.mark.parametrize("call", ["apply", "with", "state_dict", "parametrize"])
def test_after_a_copy_was_edited_and_reverted(made, call):
    G, other, change = made
    before = bits(G)
    change.apply(other)
    change.revert(other)
    if call == "with":
        with change:
            assert not same(before, G) and same(before, other)
    elif call == "apply":
        change.apply()
        assert not same(before, G) and same(before, other)
        change.revert()
    elif call == "parametrize":
        change.parametrize().remove()
        assert not hasattr(other[4], "parametrizations")
    else:
        assert change.state_dict().keys() == before.keys()
    assert same(before, G) and same(before, other)


def test_while_a_copy_is_edited(made):
    G, other, change = made
    before = bits(G)
    change.apply(other).apply()
    assert not same(before, G) and not same(before, other)
    change.revert()
    assert same(before, G) and not same(before, other), "the last first"
    change.revert()
    assert same(before, other)


def test_with_apply_of_a_copy_is_the_copy(made):
    G, other, change = made
    before = bits(G)
    with change.apply(other):
        assert same(before, G) and not same(before, other)
    with change, change.apply(other):
        assert not same(before, G) and not same(before, other)
    assert same(before, G) and same(before, other)


def test_a_loaded_change_acts_on_what_it_was_applied_to_last(made, tmp_path):
    G, other, change = made
    change.save(tmp_path / "c.safetensors")
    loaded, before = rc.Rewrite.load(tmp_path / "c.safetensors"), bits(G)
    with pytest.raises(rc.MismatchError, match="name the generator"), loaded:
        pass
    loaded.apply(G).revert()
    loaded.apply(other).revert()
    with loaded:
        assert same(before, G) and not same(before, other)
    assert same(before, other)
