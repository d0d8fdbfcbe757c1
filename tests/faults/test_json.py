"""What a command prints as JSON is JSON, also where numbers are NaN or infinite: null, and a sentence that says so."""

import json

import numpy as np
import pytest
from helpers import reference
from helpers.command_line import run, save_edit
from PIL import Image

import rewrite_core as rc

NAN = ("--generator", "mine:nan", "--checkpoint", "weights.pt", "--latent-size", "6")


def parse(text):
    return json.loads(text, parse_constant=pytest.fail)


@pytest.fixture
def rule(user_generator):
    save_edit(context=[rc.Selection(2, np.pad(np.ones((4, 4)), 2))])
    layer, latents = rc.bind(user_generator, "3"), rc.sample_latents(6, 20)
    moment = rc.collect_second_moment(layer, latents, progress=False)
    reference.rewrite(layer, moment, rc.Edit.load("e.json"), latents, region="map", loss="l2").save("r.safetensors")
    return "r.safetensors"


def test_a_report_of_pictures_that_hold_nan(capsys, rule):
    code, out, err = run(capsys, "measure", "--rewrite", rule, "--count", 8, *NAN)
    report = parse(out)
    assert code == 0 and report["mean_change"] is None and report["pictures"] == 8
    assert "8 of 8 pictures hold NaN or infinity" in err
    assert "null in the report: mean_change, median_change, largest_change." in err
    assert all(line.startswith("rewrite: warning: ") for line in err.splitlines())


def test_pictures_that_hold_nan_are_drawn_and_it_is_said(capsys, rule):
    code, _, err = run(capsys, "render", "--rewrite", rule, "--images", "0-2", "--out", "g.png", *NAN)
    assert code == 0 and "3 of 3 pictures hold NaN or infinity" in err
    pixels = np.asarray(Image.open("g.png"))[60:120, 20:100]
    assert (pixels[..., 2] == 0).all() and pixels[..., 0].any()  # the channel that is NaN is black


def test_the_list_of_layers_is_json(capsys, user_generator):
    code, out, _ = run(capsys, "layers", "--json", *NAN)
    assert code == 0 and [row["name"] for row in parse(out)] == ["1", "3", "5"]
