"""A file's name does not promise another format than it holds, and one rewrite is not counted twice."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.command_line import MINE, assert_refused, run, save_edit

ON = ("--layer", "3", "--count", "9", *MINE)


@pytest.mark.parametrize("name", ["x.pt", "x.PTH", "x.npz", "x.json", "x.png", "x.bin"])
@pytest.mark.parametrize(
    "command", [["edit", "e.json", "--out"], ["collect", "--out"], ["collect", "--out", "m.safetensors", "--resume"]]
)
def test_safetensors_are_not_written_into_other_names(capsys, user_generator, tmp_path, command, name):
    save_edit()
    words = f"{name!r} would hold safetensors; end its name in .safetensors"
    assert_refused(capsys, tmp_path, [*command, name, *ON], words)


@pytest.mark.parametrize("name", ["rule", "rule.v2", "rule.safetensors", "RULE.SAFETENSORS"])
def test_names_that_promise_nothing_else(capsys, user_generator, name):
    save_edit()
    code, _, err = run(capsys, "edit", "e.json", "--out", name, *ON, "--quiet")
    assert code == 0 and Path(name).exists(), err


def test_pictures_are_png(capsys, user_generator, tmp_path):
    assert_refused(
        capsys, tmp_path, ["render", "--out", "x.jpg", *MINE], "'x.jpg' would hold png; end its name in .png"
    )


def test_one_rewrite_twice_is_refused(capsys, user_generator, tmp_path):
    save_edit()
    assert run(capsys, "edit", "e.json", "--out", "a", *ON, "--quiet")[0] == 0
    shutil.copy("a", "copy")
    for second in ("a", "./a", "copy"):
        for command in (["render", "--out", "g.png"], ["measure", "--count", "4"]):
            words = f"a and {second} hold one rewrite, which counts once; for more of it use --strength."
            assert_refused(capsys, tmp_path, [*command, "--rewrite", "a", "--rewrite", second, *MINE], words)


def test_strength(capsys, user_generator, tmp_path, monkeypatch):
    save_edit()
    assert run(capsys, "edit", "e.json", "--out", "a", "--region", "map", *ON, "--quiet")[0] == 0
    seen = []
    monkeypatch.setattr("rewrite_core.pictures.before_after", lambda *given, **_: seen.append(given) or [])
    monkeypatch.setattr("rewrite_core.pictures.grid", lambda *_: None)
    monkeypatch.setattr("rewrite_core.pictures.save_png", lambda *_: None)
    for strength in (1, 0, 0.5):
        command = ("render", "--rewrite", "a", "--strength", strength, "--images", "0-3", "--out", "g.png", *MINE)
        assert run(capsys, *command)[0] == 0
    whole, none, half = (after - before for before, after, *_ in seen)
    assert whole.abs().max() > 0 and not none.any()
    assert 0 < half.abs().mean() < whole.abs().mean()
    assert torch.equal(seen[0][0], seen[2][0]), "the generator is left as it was"
    for wrong in ("nan", "inf", "x"):
        words = ["render", "--rewrite", "a", "--strength", wrong, "--out", "g.png", *MINE]
        assert_refused(capsys, tmp_path, words, "is not a number")
