"""Bad input ends in one sentence and a status."""

import os

import pytest
from conftest import DATA
from helpers.command_line import LAYER, MINE, assert_refused, save_edit, square

import rewrite_core as rc
from rewrite_core.cli.entry import main

BAD = [
    (["layers", "--generator", "mine"], "module:function"),
    (["layers", "--generator", "nowhere:make", "--latent-size", "6"], "no module 'nowhere'"),
    (["layers", "--generator", "../other/mine.py:make", "--latent-size", "6"], "use mine:make, and run from ../other/"),
    (
        ["layers", "--generator", "needy:make", "--latent-size", "6"],
        "install what it needs: ModuleNotFoundError: No module named 'notthere'",
    ),
    (
        ["layers", "--generator", "zero:make", "--latent-size", "6"],
        "ZeroDivisionError: division by zero (zero.py, line 1)",
    ),
    (["layers", "--generator", "typo:make", "--latent-size", "6"], "(typo.py, line 1)"),
    (["layers", "--generator", "mine:raises", "--latent-size", "6"], "KeyError: 'weights' (mine.py"),
    (["layers", "--generator", "mine:quits", "--latent-size", "6"], "SystemExit: 3"),
    (["layers", "--generator", "mine:two", "--latent-size", "6"], "needs path, size"),
    (["layers", "--generator", "mine:keyword", "--latent-size", "6"], "takes a checkpoint"),
    (["layers", "--generator", "mine:empty", "--latent-size", "6"], "without parameters"),
    (["layers", "--generator", "mine:fussy", "--latent-size", "6"], "ValueError (mine.py"),
    (["layers", "--generator", "mine:make_maps", "--latent-size", "6"], "100x1x1"),
    (
        ["measure", "--rewrite", "r", "--generator", "mine:one_at_a_time", "--latent-size", "6"],
        "AssertionError (mine.py",
    ),
    (["layers", "--generator", "mine:pair", "--latent-size", "6"], "returns a tuple and not images alone"),
    (["layers", "--latent-size", "6x"], "512 or 100x1x1"),
    (["layers", "--range", "1,0"], "the lower first"),
    (["layers", "--seed", "-1"], "from 0 to 4294967295"),
    (["layers", "--seed", "4294967296"], "4294967295"),
    (["collect", "--layer", LAYER, "--count", "99999999999999", "--out", "m.safetensors"], "and this machine has"),
    (["edit", "spire", "--layer", LAYER, "--out", "a.safetensors", "--state-dict", "./a.safetensors"], "named twice"),
    (
        ["edit", "spire", "--layer", LAYER, "--moment", "m.safetensors", "--out", "m.safetensors"],
        "would lose m.safetensors",
    ),
    (["layers", "--generator", "mine:nothing", "--latent-size", "6"], "no function"),
    (["layers", "--generator", "mine:not_a_module", "--latent-size", "6"], "torch.nn.Module"),
    (["layers", "--generator", "mine:make"], "--latent-size"),
    (["layers", "--generator", "mine:make", "--latent-size", "7"], "check --latent-size"),
    (["layers", "--generator", "mine:make", "--latent-size", "6", "--checkpoint", "none.pt"], "none.pt"),
    (["layers", "--generator", "mine:make", "--latent-size", "6", "--checkpoint", "e.json"], "e.json"),
    (
        ["layers", "--generator", "mine:make", "--latent-size", "6", "--checkpoint", str(DATA / "proggan_state.npz")],
        "does not fit",
    ),
    (["layers", "--generator", "rewrite_core:load_proggan", "--latent-size", "6"], "--checkpoint"),
    (["layers", "--checkpoint", "weights.pt"], "own weights"),
    (["layers", "--device", "cuda:77"], "cannot be used"),
    (["collect", "--layer", "3x", "--out", "m.safetensors", *MINE], "did you mean"),
    (["collect", "--layer", "3", "--out", "no/folder/m.safetensors", "--count", "4", *MINE], "folder"),
    (["collect", "--layer", "3", "--out", "m.safetensors", "--count", "0", *MINE], "1 or more"),
    (["collect", "--layer", "3", "--out", "m.safetensors", "--until", "0", *MINE], "not a number greater than 0"),
    (["collect", "--layer", "3", "--out", "", *MINE], "'' is not the name of a file"),
    (["collect", "--layer", "3", "--out", ".", *MINE], "is a folder"),
    (["collect", "--layer", "3", "--out", "pipe", *MINE], "not a file to replace"),
    (["collect", "--layer", "3", "--out", "m.safetensors", "--resume", "no/m.safetensors", *MINE], "folder"),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--state-dict", "state.pt", *MINE],
        "end its name in .safetensors",
    ),
    (["render", "--out", "x.jpg", *MINE], "end its name in .png"),
    (["demo", "--out", "e.json"], "is a file"),
    (["demo", "--out", "taken"], "report.json is a folder"),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--zero", "--preserve", "3", *MINE],
        "--preserve would change nothing",
    ),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--zero", "--region", "map", *MINE],
        "--region would change nothing",
    ),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--erase", "2", "--blend", "box", *MINE],
        "--blend would change nothing",
    ),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--steps", "20", *MINE],
        "no --steps; leave it out, or choose --solver projected or",
    ),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--solver", "unconstrained", "--rank", "2", *MINE],
        "--rank would change nothing",
    ),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--erase", "2", "--zero", *MINE], "not allowed with"),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--solver", "adam", "--project-every", "2", *MINE],
        "The adam solver has no --project-every; leave it out, or choose --solver projected.",
    ),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--solver", "adam", "--lr", "0", *MINE], "number greater than 0"),
    (["edit", "q.json", "--layer", "3", "--out", "r", *MINE], "or use --erase UNITS or --zero"),
    (["edit", "spire", "--layer", "3", "--out", "r", "--seed", "2"], "--seed 1"),
    (["edit", "spire", "--layer", "3", "--out", "r", *MINE], "no edit spire"),
    (
        ["edit", "spires", "--layer", "3", "--out", "r"],
        "no file 'spires'; the embedded generator's own edits are spire, ",
    ),
    (["measure", "--rewrite", "r", "--rule", "spire", *MINE], "embedded generator only"),
    (["bench", "flying"], "no benchmark 'flying'"),
    (["bench", "--device", "bogus"], "cannot be used"),
    (["bench", "--device", "meta"], "cannot be used"),
    (["edit", "none.json", "--layer", "3", "--out", "r", *MINE], "none.json"),
    (["edit", "bad.json", "--layer", "3", "--out", "r", *MINE], "bad.json"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--count", "1", *MINE], "out of range"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--rank", "9", *MINE], "8 channels"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--moment", "weights.pt", *MINE], "weights.pt"),
    (["render", "--rewrite", "weights.pt", "--out", "g.png", *MINE], "weights.pt"),
    (["measure", "--rewrite", "none.safetensors", *MINE], "none.safetensors"),
    (["search", "e.json", "--layer", "3", "--selection", "query", "--out", "s.png", *MINE], "no query"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a[:4]) + "..." + w for a, w in BAD])
def test_bad_input_is_one_sentence_and_a_status(tmp_path, capsys, user_generator, arguments, words):
    save_edit()
    rc.Edit(paste=rc.Selection(1, square())).save("q.json")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "needy.py").write_text("import notthere")
    (tmp_path / "zero.py").write_text("1 / 0")
    (tmp_path / "typo.py").write_text("def make(:")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    assert_refused(capsys, tmp_path, arguments, words)


@pytest.mark.parametrize(
    ("images", "words"),
    [("0-9999999999", "10000 pictures"), ("99999999999999", "1000000 latents"), ("5-3", "names no picture")],
)
def test_pictures_that_cannot_be(images, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["render", "--images", images, "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_argparse_errors_exit_with_two(capsys):
    for arguments in ([], ["fly"], ["render", "--images", "a-b", "--out", "x.png"], ["edit"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        capsys.readouterr()
