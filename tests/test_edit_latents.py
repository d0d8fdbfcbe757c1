"""An edit belongs to its latents: it knows them again by their rows, and says how they are drawn."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from conftest import DATA, square
from helpers import reference

import rewrite_core as rc


@pytest.fixture
def bare(edit):
    """The golden edit made in memory, without latents."""
    return rc.Edit(edit.copy, edit.paste, edit.context)


def test_an_edit_learns_its_latents(edit, bare, latents):
    known = rc.Edit(edit.copy, edit.paste, edit.context, latents=latents)
    assert known == bare == edit and bare.rows == {} and bare.recipe is None
    assert str(known.recipe) == "normal 64, seed 1, 200 rows" and "seed 1" in repr(known)
    assert sorted(known.rows) == sorted({part.index for part in known.selections})
    assert bare.on(latents).rows == known.rows and known.on(latents) is known
    for again in (copy.deepcopy(known), pickle.loads(pickle.dumps(known)), rc.Edit.from_json(known.to_json())):
        assert again == known and (again.rows, again.recipe) == (known.rows, known.recipe)
    with pytest.raises(rc.SelectionError, match="out of range"):
        rc.Edit(edit.copy, latents=latents[:2])


def test_a_longer_sample_and_a_copy_are_the_same_latents(edit, latents):
    edit.check(rc.sample_latents(64, 500, seed=1))
    edit.check(latents.clone())
    edit.check(latents.double())
    edit.check(latents.half())  # rounded, by the recipe


def test_other_latents_are_refused_and_named(moment, layer, edit, latents):
    others = rc.sample_latents(64, 200, seed=9)
    calls = [
        lambda z: reference.rewrite(layer, moment, edit, z),
        lambda z: reference.rewrite_many(layer, moment, [edit], z),
        lambda z: rc.erase(layer, moment, edit, z, units=4),
        lambda z: rc.zero(layer, moment, edit, z),
        edit.on,
        edit.check,
    ]
    for call in calls:
        with pytest.raises(rc.MismatchError, match=r"normal 64, seed 1, 200 rows.*normal 64, seed 9, 200 rows"):
            call(others)
    uniform = rc.sample_latents(64, 200, seed=1, distribution="uniform")
    with pytest.raises(rc.MismatchError, match="distribution is uniform, not normal"):
        reference.rewrite(layer, moment, edit, uniform)


def test_a_change_knows_the_latents_it_was_solved_on(moment, layer, bare, latents, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an edit made in memory is taken silently
        change = reference.rewrite(layer, moment, bare, latents)
    assert change.edit == bare and len(change.edit.rows) == 4 and bare.rows == {}
    change.save(tmp_path / "c.safetensors")
    kept = rc.Rewrite.load(tmp_path / "c.safetensors").edit
    assert (kept, kept.rows, kept.recipe) == (change.edit, change.edit.rows, change.edit.recipe)
    reference.rewrite(layer, moment, kept, latents)
    with pytest.raises(rc.MismatchError, match="other latents"):
        reference.rewrite(layer, moment, kept, latents.flip(0))


def test_a_file_that_does_not_say_warns_once(moment, layer, latents, tmp_path):
    foreign = rc.Edit.load(DATA / "proggan_edit.json")
    with pytest.warns(rc.LatentsWarning, match="does not say which latents") as caught:
        for _ in range(2):
            rc.rewrite(layer, moment, foreign, latents, **reference.SETTINGS)
    assert len(caught) == 1 and caught[0].filename == __file__
    foreign.on(latents).save(tmp_path / "mine.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.rewrite(layer, moment, rc.Edit.load(tmp_path / "mine.json"), latents)


@pytest.mark.parametrize(
    "field",
    [
        None,
        [],
        {},
        {"rows": {}},
        {"recipe": None, "rows": {}},
        {"recipe": None, "rows": {"3": "0123456789abcdeg"}},
        {"recipe": None, "rows": {"3": "0123"}},
        {"recipe": None, "rows": {"03": "0123456789abcdef"}},
        {"recipe": None, "rows": {"-3": "0123456789abcdef"}},
        {"recipe": None, "rows": {"9" * 40: "0123456789abcdef"}},
        {"recipe": None, "rows": {"3": 5}},
        {"recipe": 5, "rows": {"3": "0123456789abcdef"}},
        {"recipe": None, "rows": {"3": "0123456789abcdef"}, "more": 1},
    ],
)
def test_a_damaged_field_is_refused(edit, field):
    record = json.loads(edit.to_json())
    with pytest.raises(rc.FileFormatError, match="latents"):
        rc.Edit.from_json(json.dumps(record | {"latents": field}))


def test_latents_without_a_recipe_are_known_by_their_rows(moment, layer, edit, latents):
    own = latents + 0.01
    mine = rc.Edit(edit.copy, edit.paste, edit.context, latents=own)
    assert mine.recipe is None and json.loads(mine.to_json())["latents"]["recipe"] is None
    reference.rewrite(layer, moment, mine, own)
    with pytest.raises(rc.MismatchError, match="row 3 differs"):
        reference.rewrite(layer, moment, mine, latents)


def test_only_the_rows_that_are_named_count(edit, latents):
    other = latents.clone()
    unnamed = next(index for index in range(200) if index not in edit.rows)
    other[unnamed] = 0
    edit.check(other)
    other[edit.paste.index, 5] += 1e-6
    with pytest.raises(rc.MismatchError, match=f"row {edit.paste.index} differs"):
        edit.check(other)


def test_zeros_of_either_sign_are_one_latent():
    z = torch.zeros(4, 8)
    edit = rc.Edit(paste=square(1, 8, 1, 4), latents=z)
    edit.check(-z)
