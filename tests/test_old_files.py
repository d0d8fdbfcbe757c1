"""Files of version 0.1 hold what they held."""

import hashlib
import json

import pytest
import torch
from conftest import DATA, same_bits, state_bits
from helpers import reference

import rewrite_core as rc

OLD = DATA / "version_0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def test_a_second_moment(layer, latents, moment):
    old = rc.SecondMoment.load(OLD / "moment.safetensors", layer)
    assert sha256(old.matrix()) == EXPECTED["matrix"] and old.count == EXPECTED["count"]
    assert old.latents["count"] == 200 and "recipe" not in old.latents
    old.check(layer, latents)
    assert torch.allclose(old.matrix(), moment.matrix(), rtol=1e-6) and 0 < old.standard_error < 1


def test_an_edit():
    edit = rc.Edit.load(OLD / "edit.json")
    assert [sha256(torch.from_numpy(part.mask)) for part in edit.selections] == EXPECTED["masks"]
    assert [part.index for part in edit.selections] == [7, 11, 5, 3, 11, 19] and len(edit.pastes) == 2
    assert edit.rows == {} and edit.recipe is None


@pytest.mark.parametrize("name", ["rewrite", "zero"])
def test_a_rewrite(generator, layer, moment, latents, name):
    assert sha256(layer.weight) == EXPECTED["weight"]
    before, change = state_bits(generator), rc.Rewrite.load(OLD / f"{name}.safetensors")
    with change.apply(generator):
        assert sha256(layer.weight) == EXPECTED[name]
    assert same_bits(before, state_bits(generator))
    assert change.size > 0 and change.edit.context and change.edit.rows == {}
    with pytest.warns(rc.LatentsWarning):
        reference.rewrite(layer, moment, change.edit, latents)


def test_a_rewrite_saved_again_is_of_this_version(tmp_path):
    old = rc.Rewrite.load(OLD / "rewrite.safetensors")
    old.save(tmp_path / "new.safetensors")
    new = rc.Rewrite.load(tmp_path / "new.safetensors")
    assert repr(new) == repr(old) and new.edit == old.edit and new.fitted_to == old.fitted_to
    assert torch.equal(new.directions, old.directions) and torch.equal(new.coefficients, old.coefficients)
