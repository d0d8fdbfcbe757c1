"""What is of a wrong type, or says nothing, is told in one sentence: nothing is taken in silence."""

import numpy as np
import pytest
import torch
from helpers import reference
from helpers.small import COPY, EDIT, PASTE, Z, generator

import rewrite_core as rc


@pytest.fixture(scope="module")
def given():
    layer = rc.bind(generator(), "4")
    return layer, rc.collect_second_moment(layer, Z, progress=False)


WRONG = {
    "rank": ["1", 1.0, True, [1]],
    "directions": [None, True, ["svd"], "pca"],
    "region": ["yes", True, None, "Box"],
    "blend": ["yes", True, None, 0.5],
    "loss": [None, True, "L1", 1],
    "preserve": ["x", True, -1, float("nan"), float("inf")],
    "solver": [5, "LM", rc.LM, rc.Adam, True],
    "backend": [None, 5, "gpu"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_options_of_rewrite(given, name, value):
    with pytest.raises(rc.RewriteCoreError) as caught:
        reference.rewrite(*given, EDIT, Z, **{name: value})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, moment: rc.erase(layer, moment, EDIT, Z, units="4"),
        lambda layer, moment: rc.erase(layer, moment, EDIT, Z, units=True),
        lambda layer, moment: rc.erase(layer, moment, EDIT, Z, units=0),
        lambda layer, moment: rc.zero(layer, moment, EDIT, Z, amount="x"),
        lambda layer, moment: rc.zero(layer, moment, EDIT, Z, amount=True),
        lambda layer, moment: reference.rewrite(layer, moment, EDIT, None),
        lambda layer, moment: reference.rewrite(layer, None, EDIT, Z),
        lambda layer, moment: reference.rewrite(None, moment, EDIT, Z),
        lambda layer, moment: reference.rewrite(layer, moment, None, Z),
        lambda layer, moment: reference.rewrite_many(layer, moment, None, Z),
        lambda layer, moment: reference.rewrite_many(layer, moment, 5, Z),
        lambda layer, moment: rc.search(layer, moment, PASTE, Z, top="3"),
        lambda layer, moment: rc.search(layer, moment, PASTE, Z, top=2.5),
        lambda layer, moment: rc.search(layer, moment, PASTE, Z, batch_size=0),
        lambda layer, moment: rc.search(layer, moment, np.ones(8), Z),
        lambda layer, moment: rc.search(layer, moment, torch.ones(8) * 1j, Z),
        lambda layer, moment: rc.context_keys(layer, EDIT, Z),
        lambda layer, moment: rc.context_keys(layer, [5], Z),
        lambda layer, moment: rc.context_keys(layer, [PASTE], None),
        lambda layer, moment: rc.context_directions(moment, torch.ones(2, 8), weights="x"),
        lambda layer, moment: rc.context_directions(moment, torch.ones(2, 8), weights=torch.ones(2) * 1j),
        lambda layer, moment: rc.context_directions(moment, torch.rand(2, 8), weights=-torch.ones(2)),
        lambda layer, moment: rc.context_directions(moment, torch.rand(2, 8), quantiles=5, directions="units"),
        lambda layer, moment: rc.query_key(layer, moment, EDIT, Z),
        lambda layer, moment: rc.Edit(COPY, []),
        lambda layer, moment: rc.Edit(COPY, [None]),
        lambda layer, moment: rc.Edit(COPY, 5),
        lambda layer, moment: rc.Edit(COPY, PASTE, 5),
        lambda layer, moment: rc.Edit(COPY, PASTE, latents=5),
        lambda layer, moment: rc.Edit.from_json(None),
        lambda layer, moment: EDIT.on(None),
        lambda layer, moment: rc.Selection(0, None),
        lambda layer, moment: rc.Selection(0, {}),
        lambda layer, moment: rc.Selection(0, "a\0b"),
        lambda layer, moment: rc.Rewrite.load(5),
        lambda layer, moment: rc.Edit.load(5),
    ],
)
def test_other_arguments(given, call):
    with pytest.raises((rc.RewriteCoreError, FileNotFoundError)) as caught:
        call(*given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_arguments_of_a_change(given):
    layer, moment = given
    change = reference.rewrite(layer, moment, EDIT, Z, loss="l2", region="map")
    for call in (change.apply, change.revert, change.state_dict, change.parametrize):
        for wrong in (5, "G", {}):
            with pytest.raises(rc.RewriteCoreError):
                call(wrong)
    with pytest.raises(rc.RewriteCoreError):
        change.apply(force="yes")
    switch = change.parametrize()
    try:
        with pytest.raises(rc.ArgumentError, match="enabled must be True or False"):
            switch.enabled = 1
    finally:
        switch.remove()
