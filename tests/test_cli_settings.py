"""``rewrite init`` and ``rewrite.toml``: a generator is typed once."""

from pathlib import Path

import pytest
import torch
from helpers.command_line import LAYER, MINE, assert_refused, run, save_edit

import rewrite_core as rc
from rewrite_core.cli.entry import parser
from rewrite_core.cli.options import PICKLED
from rewrite_core.cli.settings import SETTINGS, fill, read_settings, settings_text


def filled(*words):
    options = parser().parse_args([str(word) for word in words])
    fill(options, read_settings())
    return options


def test_what_init_writes_every_command_reads(capsys, user_generator):
    code, out, err = run(capsys, "init", *MINE, "--layer", "3", "--count", 30, "--seed", 5, "--range", "0,1")
    assert code == 0 and err == "" and "rewrite.toml" in out
    assert read_settings() == {
        "generator": "mine:make",
        "checkpoint": "weights.pt",
        "latent_size": (6,),
        "distribution": "normal",
        "range": (0.0, 1.0),
        "layer": "3",
        "seed": 5,
        "count": 30,
        "device": "cpu",
    }
    save_edit()
    assert run(capsys, "layers")[0] == 0
    assert run(capsys, "collect", "--out", "m.safetensors", "--quiet")[0] == 0
    moment = rc.SecondMoment.load("m.safetensors", rc.bind(user_generator, "3"))
    moment.check(rc.bind(user_generator, "3"), rc.sample_latents(6, 30, seed=5))
    assert run(capsys, "edit", "e.json", "--moment", "m.safetensors", "--out", "r.safetensors", "--quiet")[0] == 0
    assert run(capsys, "search", "e.json", "--out", "s.png", "--quiet")[0] == 0
    assert run(capsys, "render", "--rewrite", "r.safetensors", "--out", "g.png")[0] == 0
    code, out, _ = run(capsys, "measure", "--rewrite", "r.safetensors")
    assert code == 0 and '"pictures": 30' in out


def test_the_command_line_overrides_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewrite.toml").write_text(
        'generator = "mine:make"\nlayer = "3"\nlatent-size = 6\nrange = [0, 1]\nseed = 5\ncount = 9\n'
    )
    options = filled("collect", "--out", "m")
    assert (options.generator, options.layer, options.latent_size) == ("mine:make", ["3"], (6,))
    assert (options.range, options.seed, options.count) == ((0, 1), 5, 9)
    options = filled("collect", "--out", "m", "--seed", 2, "--count", 3, "--layer", "1", "--layer", "2")
    assert (options.seed, options.count, options.layer) == (2, 3, ["1", "2"])
    same = filled("edit", "e", "--out", "m", "--generator", "mine:make")
    assert same.layer == "3" and same.latent_size == (6,)


def test_what_belongs_to_another_generator_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewrite.toml").write_text('generator = "mine:make"\nlatent-size = 6\nrange = [0, 1]\nseed = 5\n')
    other = filled("layers", "--generator", "chapels")
    assert (other.latent_size, other.range, other.seed) == (None, (-1, 1), 5)
    assert filled("layers", "--allow-pickle").latent_size is None
    Path("rewrite.toml").write_text('layer = "synthesis.layer4.conv"\n')
    assert filled("edit", "spire", "--out", "m").layer == LAYER
    with pytest.raises(rc.RewriteCoreError, match="Say which layer"):
        filled("edit", "spire", "--out", "m", "--generator", "mine:make")


def test_without_a_file_the_usual_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = filled("measure", "--rewrite", "r")
    assert (options.generator, options.seed, options.count, options.device) == ("chapels", 1, 500, "cpu")
    assert (options.range, options.distribution) == ((-1, 1), "normal")


def test_names_survive_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('quote".pt', "back\\slash.pt", "line\nbreak.pt", "\x7f\x1b.pt", "Käse 😀.pt"):
        options = filled("init", "--generator", "a:b", "--checkpoint", name, "--latent-size", "100x1x1")
        Path("rewrite.toml").write_text(settings_text(options), encoding="utf-8")
        assert read_settings()["checkpoint"] == name and read_settings()["latent_size"] == (100, 1, 1)
    with pytest.raises(rc.RewriteCoreError, match="rename the file"):
        settings_text(filled("init", "--generator", "a:b", "--checkpoint", "\udc80.pt"))


def test_a_pickled_network_by_the_file(capsys, user_generator, tmp_path):
    torch.save({"G_ema": user_generator}, tmp_path / "network.pkl")
    assert run(capsys, "init", "--allow-pickle", "--checkpoint", "network.pkl", "--latent-size", 6)[0] == 0
    assert read_settings()["generator"] == PICKLED
    code, out, _ = run(capsys, "layers")
    assert code == 0 and out == run(capsys, "layers", *MINE)[1]


def test_init_replaces_nothing_unasked_and_writes_nothing_wrong(capsys, user_generator, tmp_path):
    for arguments, words in (
        ((*MINE[:-1], "7"), "check --latent-size"),
        ((*MINE, "--layer", "7"), "no layer"),
        (("--generator", "mine:make"), "--latent-size"),
    ):
        assert_refused(capsys, tmp_path, ["init", *arguments], words)
    Path("rewrite.toml").write_text("seed = 3\n")
    code, _, err = run(capsys, "init", *MINE)
    assert code == 2 and "--force" in err and Path("rewrite.toml").read_text() == "seed = 3\n"
    assert run(capsys, "init", *MINE, "--force")[0] == 0 and read_settings()["seed"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = ,", "cannot be read: Invalid value (at line 1"),
        ("seed = " + 5000 * "9", "cannot be read"),
        (b"\xff", "cannot be read"),
        ("a = " + 3000 * "[", "cannot be read"),
        ("sed = 1", "no setting 'sed'; did you mean seed?"),
        ("zzz = 1", "no setting 'zzz'; it may have generator,"),
        ("[generator]\nname = 1", "generator: a dict is neither a text nor a number"),
        ("seed = -1", "seed: '-1' is not a whole number from 0"),
        ("seed = true", "seed: a bool is neither"),
        ("seed = [1]", "seed: a list is neither"),
        ("seed = 1979-05-27", "seed: a date is neither"),
        ("count = 0", "count: '0' is not a whole number"),
        ("count = 2.5", "count: '2.5' is not a whole number"),
        ("range = [1, 0]", "range: '1,0' is not two numbers"),
        ("range = [0, inf]", "range: '0,inf' is not two numbers"),
        ("latent-size = [6, 0]", "latent-size: '6x0' is not a size"),
        ('distribution = "cauchy"', "distribution: 'cauchy' is not one of normal, uniform"),
        ('allow-pickle = "yes"', "allow-pickle: 'yes' is not one of true, false"),
        ('generator = "a:b"\nallow-pickle = true', "leave one out"),
    ],
)
def test_a_bad_file_is_one_sentence(text, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewrite.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(capsys, tmp_path, ["layers"], words)


def test_a_folder_of_that_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewrite.toml").mkdir()
    assert_refused(capsys, tmp_path, ["layers"], "rewrite.toml is not a file")


def test_every_setting_is_an_option():
    known = vars(parser().parse_args(["init"]))
    assert {key.replace("-", "_") for key in SETTINGS} - {"allow_pickle"} <= known.keys()
