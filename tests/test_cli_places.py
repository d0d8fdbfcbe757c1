"""``rewrite make-edit``, ``search --add`` and ``edit --preview``."""

import numpy as np
import pytest
from helpers.command_line import LAYER, MINE, assert_refused, run, save_edit
from PIL import Image

import rewrite_core as rc

ADD = ("search", "e.json", "--layer", "3", "--count", 20, *MINE)
MAKE = ("make-edit", "--out", "made.json", "--count", 20, *MINE)


def test_an_edit_of_boxes_and_pictures(user_generator, capsys, tmp_path):
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[2:5, 3:7] = 255
    Image.fromarray(mask).save("mask.png")
    code, out, err = run(
        capsys, *MAKE, "--copy", "0:1,2,5,6", "--paste", "3:mask.png", "--context", "3:mask.png", "--context",
        "4:0,0,4,4", "--sheet", "sheet.png", "--quiet",
    )  # fmt: skip
    assert code == 0 and "1 copy, 1 paste, 2 context -> made.json" in out and not err
    edit, z = rc.Edit.load("made.json"), rc.sample_latents(6, 20, seed=1)
    size = user_generator(z[:1]).shape[-2:]
    paste = rc.Selection(3, "mask.png")
    assert edit == rc.Edit(
        rc.Selection.box(0, (1, 2, 5, 6), size), paste, [paste, rc.Selection.box(4, (0, 0, 4, 4), size)]
    )
    edit.check(z)
    with pytest.raises(rc.MismatchError):
        edit.check(z + 1)
    assert Image.open("sheet.png").width > 4 * 128


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "An edit marks something"),
        (("--copy", "0:5,5,5,6"), "is empty"),
        (("--copy", "0:0,0,500,6"), "not inside a picture"),
        (("--copy", "20:0,0,4,4"), "There are 20 pictures, and none of number 20"),
        (("--copy", "0:none.png"), "none.png"),
        (("--copy", "0"), "PICTURE:TOP,LEFT,BOTTOM,RIGHT"),
        (("--copy", "x:0,0,4,4"), "PICTURE:TOP,LEFT,BOTTOM,RIGHT"),
        (("--copy", "0:0,0,4"), "PICTURE:TOP,LEFT,BOTTOM,RIGHT"),
        (("--copy=-1:0,0,4,4",), "is not a place"),
    ],
)
def test_what_is_no_place_is_one_sentence(user_generator, capsys, tmp_path, given, words):
    assert_refused(capsys, tmp_path, [*MAKE, *(f"{each}" for each in given)], words)


def test_matches_are_added_to_the_edit(user_generator, capsys):
    save_edit(latents=rc.sample_latents(6, 20, seed=1))
    before = rc.Edit.load("e.json")
    code, out, _ = run(capsys, *ADD, "--add", 3, "--edit-out", "more.json", "--out", "added.png", "--quiet")
    assert code == 0 and "are context now -> more.json" in out and Image.open("added.png").width > 128
    more = rc.Edit.load("more.json")
    assert more.where[:1] == before.where and len(more.where) == 4 and rc.Edit.load("e.json") == before
    assert run(capsys, *ADD, "--add", 3, "--quiet")[0] == 0 and rc.Edit.load("e.json") == more
    layer = rc.bind(user_generator, "3")
    z = rc.sample_latents(6, 20, seed=1)
    moment = rc.collect_second_moment(layer, z, progress=False)
    assert more == before.with_matches(layer, moment, z, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "Name the picture to write with --out"),
        (("--edit-out", "x.json", "--out", "p.png"), "--add N"),
        (("--add", 2, "--selection", "copy"), "leave --selection out"),
        (("--add", 19), "no 19 others"),
        (("--add", 0), "of 1 or more"),
    ],
)
def test_what_cannot_be_added_is_one_sentence(user_generator, capsys, tmp_path, given, words):
    save_edit(latents=rc.sample_latents(6, 20, seed=1))
    assert_refused(capsys, tmp_path, [*ADD, *given], words)


def test_a_shipped_edit_is_not_written_over(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, tmp_path, ["search", "spire", "--layer", LAYER, "--add", 2], "--edit-out")


def test_the_preview_is_drawn_without_a_fit(user_generator, capsys, monkeypatch):
    from rewrite_core.rewrites import calls

    save_edit(latents=rc.sample_latents(6, 20, seed=1))
    edit = ("edit", "e.json", "--layer", "3", "--count", 20, "--quiet", *MINE)
    with monkeypatch.context() as patch:
        patch.setattr(calls, "rewrite", None)
        code, out, _ = run(capsys, *edit, "--preview", "goal.png")
    assert code == 0 and out == "what the paste renders -> goal.png\n" and Image.open("goal.png").width >= 256
    code, out, _ = run(capsys, *edit, "--preview", "goal.png", "--out", "r.safetensors")
    assert code == 0 and "r.safetensors" in out


@pytest.mark.parametrize("given", [(), ("--preview", "g.png", "--zero"), ("--preview", "g.png", "--erase", 3)])
def test_nothing_to_write_and_nothing_to_preview(user_generator, capsys, tmp_path, given):
    save_edit(latents=rc.sample_latents(6, 20, seed=1))
    assert_refused(capsys, tmp_path, ["edit", "e.json", "--layer", "3", "--count", 20, *MINE, *given], "--preview")
