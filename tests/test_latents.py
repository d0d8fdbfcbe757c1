"""The standard latents: their numbers, how they are known again, and what is refused."""

import copy
import gc
import hashlib
import io

import numpy as np
import pytest
import torch

import rewrite_core as rc
from rewrite_core.layers import latents as module
from rewrite_core.layers.latents import LatentRecipe, check_rows, recipe_of, row_digest, row_digests


def test_normal_rows_are_numpys_row_by_row():
    rows = np.random.RandomState(7).standard_normal(6 * 5).reshape(5, 6)
    assert torch.equal(rc.sample_latents(6, 5, seed=7), torch.from_numpy(rows).float())
    assert torch.equal(rc.sample_latents((2, 3), 5, seed=7), torch.from_numpy(rows).float().reshape(5, 2, 3))
    assert torch.equal(rc.sample_latents(6, 3, seed=7), rc.sample_latents(6, 5, seed=7)[:3])
    assert rc.sample_latents(np.int64(6), np.int32(5), seed=np.uint8(7)).dtype == torch.float32


def test_uniform_rows_lie_between_minus_one_and_one():
    rows = np.random.RandomState(1).uniform(-1, 1, (400, 3, 1, 1))
    found = rc.sample_latents((3, 1, 1), 400, distribution="uniform")
    assert torch.equal(found, torch.from_numpy(rows).float())
    assert found.min() < -0.98 and found.max() > 0.98 and found.abs().max() <= 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": None},
        {"seed": 1.0},
        {"seed": True},
        {"seed": -1},
        {"seed": 2**32},
        {"count": 0},
        {"count": 2.0},
        {"count": True},
        {"count": "4"},
        {"count": 2**31 - 1, "shape": (2**20,)},
        {"shape": 0},
        {"shape": ()},
        {"shape": (3, True)},
        {"shape": (3, 0)},
        {"shape": 2.5},
        {"shape": "16"},
        {"shape": None},
        {"distribution": "normall"},
        {"distribution": None},
        {"distribution": ["normal"]},
    ],
)
def test_bad_arguments_are_told_in_one_sentence(arguments):
    with pytest.raises(rc.RewriteCoreError) as caught:
        rc.sample_latents(**{"shape": 16, "count": 4} | arguments)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_the_recipe_is_known_of_the_tensor_and_of_its_first_rows_alone():
    z = rc.sample_latents((4, 1), 10, seed=3, distribution="uniform")
    assert recipe_of(z) == LatentRecipe((4, 1), "uniform", 3, 10)
    assert recipe_of(z[:6]) == LatentRecipe((4, 1), "uniform", 3, 6)
    for other in (
        z[1:],
        z[::2],
        z[:, :2],
        z.clone(),
        z + 0,
        z.double(),
        z.flatten(1),
        copy.deepcopy(z),
        z[:0],
        [z],
        z.mT,
    ):
        assert recipe_of(other) is None
    assert recipe_of(torch.zeros(3)) is None


@pytest.mark.parametrize("how", ["index", "numpy", "data", "inference"])
def test_a_recipe_is_forgotten_once_its_tensor_was_written_to(how):
    z = rc.sample_latents(4, 10)
    part = z[:5]
    with torch.inference_mode(how == "inference"):
        place = {"index": z, "numpy": z.numpy(), "data": z.data, "inference": z}[how]
        place[9, 3] = 5.0
    assert recipe_of(z) is None and recipe_of(part) is None


def test_latents_drawn_in_inference_mode_are_ordinary_tensors():
    with torch.inference_mode():
        z = rc.sample_latents(4, 10)
    assert not z.is_inference() and recipe_of(z) == LatentRecipe((4,), "normal", 1, 10)


def test_saved_latents_load_without_pickled_classes():
    buffer = io.BytesIO()
    torch.save(rc.sample_latents(4, 10), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), rc.sample_latents(4, 10))


def test_what_is_remembered_goes_with_the_tensor():
    gc.collect()
    before = len(module._sampled)
    z = rc.sample_latents(4, 10)
    assert len(module._sampled) == before + 1
    del z
    assert len(module._sampled) == before


def test_a_recipe_reads_back_what_it_wrote():
    recipe = LatentRecipe((100, 1, 1), "uniform", 9, 50)
    assert str(recipe) == "uniform 100x1x1, seed 9, 50 rows"
    assert str(LatentRecipe((512,), "normal", 1, 1000)) == "normal 512, seed 1, 1000 rows"
    assert recipe.to_dict() == {"shape": [100, 1, 1], "distribution": "uniform", "seed": 9, "count": 50}
    assert LatentRecipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"seed": 1},
        {"shape": 5},
        {"shape": []},
        {"shape": [0]},
        {"shape": [True]},
        {"shape": [1] * 9},
        {"shape": [2**40]},
        {"distribution": "cauchy"},
        {"distribution": ["normal"]},
        {"seed": None},
        {"seed": -1},
        {"seed": 1.0},
        {"seed": 2**32},
        {"count": 0},
        {"count": "5"},
        {"count": 2**63},
        {"more": 1},
    ],
)
def test_a_record_that_is_no_recipe_is_refused(record):
    good = LatentRecipe((4,), "normal", 1, 10).to_dict()
    partial = not isinstance(record, dict) or record in ({}, {"seed": 1})
    with pytest.raises(rc.FileFormatError):
        LatentRecipe.from_dict(record if partial else good | record)


def test_a_row_digest_is_blake2b_of_shape_and_float32():
    row = torch.tensor([[1.5, -0.0, -2.25]])
    numbers = np.array([[1.5, 0.0, -2.25]], np.float32)
    plain = hashlib.blake2b(b"(1, 3)|" + numbers.tobytes(), digest_size=8).hexdigest()
    assert row_digest(row) == plain and len(plain) == 16
    assert row_digest(row.double()) == row_digest(row.mT.contiguous().mT) == plain
    assert row_digest(torch.tensor([[1.5, 0.0, -2.25]])) == plain
    assert row_digest(row[0]) != plain and row_digest(-row) != plain


def test_digests_of_rows_by_index():
    z = rc.sample_latents((3, 2), 8)
    found = row_digests(z, [5, 0, 5])
    assert found == {0: row_digest(z[0]), 5: row_digest(z[5])} and list(found) == [0, 5]
    assert row_digests(z, []) == {}
    for index in (8, -1):
        with pytest.raises(rc.SelectionError, match="does not exist"):
            row_digests(z, [index])


def test_rows_that_agree_pass_whatever_the_rest():
    z = rc.sample_latents(4, 10)
    recorded = row_digests(z, [2, 7])
    changed = z.clone()
    changed[3] = 0
    check_rows(recorded, None, changed, "The edit")
    check_rows(recorded, recipe_of(z), rc.sample_latents(4, 200), "The edit")
    check_rows({}, None, rc.sample_latents(4, 1, seed=2), "The edit")


def test_other_rows_are_refused_with_both_recipes():
    z, other = rc.sample_latents(4, 10), rc.sample_latents(4, 10, seed=9)
    recorded, recipe = row_digests(z, [2, 7]), recipe_of(z)
    with pytest.raises(rc.MismatchError) as caught:
        check_rows(recorded, recipe, other, "The edit")
    assert str(caught.value) == (
        "The edit was made on other latents (normal 4, seed 1, 10 rows) than these (normal 4, seed 9, 10 rows): row 2 "
        "differs; give the latents that it was made on."
    )
    with pytest.raises(rc.MismatchError, match="their distribution is uniform, not normal"):
        check_rows(recorded, recipe, rc.sample_latents(4, 10, distribution="uniform"), "The edit")
    with pytest.raises(rc.MismatchError, match=r"other latents than these: row 7 differs"):
        swapped = z.clone()
        swapped[7] += 1e-6
        check_rows(recorded, None, swapped, "The edit")
    with pytest.raises(rc.SelectionError, match="does not exist"):
        check_rows(recorded, recipe, z[:5], "The edit")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_rounded_for_a_generator_of_lower_precision_are_known_by_the_recipe(dtype):
    z = rc.sample_latents(4, 10)
    recorded, recipe = row_digests(z, [2, 7]), recipe_of(z)
    check_rows(recorded, recipe, z.to(dtype), "The edit")
    with pytest.raises(rc.MismatchError):
        check_rows(recorded, recipe, rc.sample_latents(4, 10, seed=2).to(dtype), "The edit")


@pytest.mark.parametrize("rows", [torch.zeros(()), torch.zeros(16)])
def test_latents_without_rows_are_told_so(rows):
    layer = rc.bind(torch.nn.Sequential(torch.nn.Linear(16, 4)), "0")
    with pytest.raises(rc.RewriteCoreError, match=r"latents\[None\]"):
        layer.keys(rows)


def test_whole_numbers_may_be_latents_of_one_axis():
    generator = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 4))
    assert rc.bind(generator, "1").keys(torch.tensor([1, 3])).shape == (2, 8, 1)
