import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image

import rewrite_core as rc
from rewrite_core.cli import commands as cli
from rewrite_core.cli.commands import build_parser, main
from rewrite_core.demo import load_edit

LAYER = "synthesis.layer4.conv"


def run(capsys, *arguments):
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def user_generator(tmp_path, monkeypatch):
    """A user's module beside which the command is run, and its checkpoint."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch
            def make():
                torch.manual_seed(0)
                return torch.nn.Sequential(
                    torch.nn.Unflatten(1, (6, 1, 1)), torch.nn.ConvTranspose2d(6, 8, 4), torch.nn.ReLU(),
                    torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 3, 4, 2, 1),
                )
            def make_maps():
                return make()[1:]
            def make_half():
                return make().bfloat16()
            def make_unit():
                return torch.nn.Sequential(*make(), torch.nn.Sigmoid())
            def one_at_a_time():
                class Single(torch.nn.Linear):
                    def forward(self, latents):
                        assert len(latents) == 1
                        return super().forward(latents).reshape(1, 1, 2, 3)
                return Single(6, 6)
            def pair():
                class Pair(torch.nn.Linear):
                    def forward(self, latents):
                        return latents, latents
                return Pair(6, 6)
            def not_a_module():
                return 3
            def empty():
                return torch.nn.ReLU()
            def raises():
                raise KeyError("weights")
            def quits():
                raise SystemExit(3)
            def two(path, size):
                return make()
            def keyword(*, path):
                return make()
            def fussy():
                class Fussy(torch.nn.Linear):
                    def forward(self, latents):
                        raise ValueError
                return Fussy(2, 2)
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mine", None)
    spec = importlib.util.spec_from_file_location("mine_for_saving", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generator = module.make()
    with torch.no_grad():
        generator[3].weight.add_(0.1)  # not what make() starts from
    torch.save(generator.state_dict(), tmp_path / "weights.pt")
    path = list(sys.path)  # the command line puts the working folder there
    yield generator.eval()
    sys.path[:] = path
    sys.modules.pop("mine", None)


MINE = ("--generator", "mine:make", "--checkpoint", "weights.pt", "--latent-size", "6")


def square(size=8):
    mask = np.zeros((size, size))
    mask[1:5, 1:5] = 1
    return mask


def test_every_option_has_help():
    [commands] = [action.choices for action in build_parser()._actions if action.dest == "command"]
    for command, parser in commands.items():
        for action in parser._actions:
            assert action.help, f"rewrite {command} {action.option_strings or action.dest}"


@pytest.mark.parametrize(
    ("images", "words"),
    [("0-9999999999", "10000 pictures"), ("99999999999999", "1000000 latents"), ("5-3", "names no picture")],
)
def test_pictures_that_cannot_be(images, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["render", "--images", images, "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_score_of_no_scene_is_json(tmp_path, capsys, monkeypatch):
    change = tmp_path / "spire.safetensors"
    assert run(capsys, "edit", "spire", "--layer", LAYER, "--out", change, "--count", 1000)[0] == 0
    monkeypatch.setattr(cli, "score", lambda *_: SimpleNamespace(efficacy=float("nan"), scenes=0))
    code, out, _ = run(capsys, "eval", "--rewrite", change, "--rule", "spire", "--count", 1)
    assert code == 0 and json.loads(out, parse_constant=pytest.fail)["efficacy"] is None


def test_every_command_has_help(capsys):
    for command in ("demo", "layers", "collect", "edit", "render", "eval", "search", "bench", "info"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "--device" in capsys.readouterr().out
    assert build_parser().prog == "rewrite"


def test_a_whole_session_on_chapels(tmp_path, capsys):
    edit, moment, rule = tmp_path / "spire.json", tmp_path / "moment.safetensors", tmp_path / "spire.safetensors"
    load_edit("spire").save(edit)
    code, out, _ = run(capsys, "layers")
    assert code == 0 and LAYER in out and "proggan" in out
    code, out, _ = run(capsys, "layers", "--json")
    assert code == 0 and LAYER in [row["name"] for row in json.loads(out)]
    code, out, _ = run(capsys, "collect", "--layer", LAYER, "--out", moment, "--count", 1000, "--quiet")
    assert code == 0 and rc.SecondMoment.load(moment).count == 1000 * 64
    assert rc.SecondMoment.load(moment).latents["seed"] == 1
    code, out, _ = run(
        capsys,
        "edit",
        edit,
        "--layer",
        LAYER,
        "--moment",
        moment,
        "--rank",
        4,
        "--loss",
        "l2",
        "--whole-map",
        "--out",
        rule,
        "--state-dict",
        tmp_path / "edited.safetensors",
        "--quiet",
    )
    assert code == 0 and "closed_form" in out and rc.Rewrite.load(rule).rank == 4
    code, out, _ = run(capsys, "eval", "--rewrite", rule, "--rule", "spire", "--count", 200, "--seed", 2)
    report = json.loads(out)
    assert code == 0 and report["efficacy"] > 0.8 and report["pictures"] == 200
    code, out, _ = run(capsys, "render", "--rewrite", rule, "--images", "0-3,9", "--out", tmp_path / "grid.png")
    assert code == 0 and Image.open(tmp_path / "grid.png").width > 500
    code, out, _ = run(
        capsys,
        "search",
        edit,
        "--layer",
        LAYER,
        "--moment",
        moment,
        "--top",
        5,
        "--out",
        tmp_path / "found.png",
        "--quiet",
    )
    assert code == 0 and len(out.splitlines()[0].split()) == 5 and Image.open(tmp_path / "found.png").width > 500
    # the edited state dict is the generator with the rewrite applied
    from safetensors.torch import load_file

    from rewrite_core.demo import chapels

    edited = chapels()
    rc.Rewrite.load(rule).apply(edited)
    state = load_file(tmp_path / "edited.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in edited.state_dict().items())


def test_collecting_until_it_is_good_enough(tmp_path, capsys, user_generator):
    collect = ("collect", "--layer", "3", "--out", "m.safetensors", "--count", 400, "--batch-size", 4, *MINE, "--quiet")
    code, out, _ = run(capsys, *collect, "--until", "0.2", "--skip-nonfinite")
    moment = rc.SecondMoment.load("m.safetensors")
    assert code == 0 and f"standard error {moment.standard_error:.2%} ->" in out
    assert moment.standard_error <= 0.2 and moment.latents["used"] < 400


def test_collecting_several_layers_in_one_pass(tmp_path, capsys, user_generator):
    words = [*MINE, "--count", 20, "--quiet"]
    layers = [word for name in ("3", "1") for word in ("--layer", name, "--out", f"{name}.safetensors")]
    code, out, err = run(capsys, "collect", *layers, *words)
    assert code == 0 and err == "" and len(out.splitlines()) == 2
    assert run(capsys, "collect", "--layer", "1", "--out", "alone.safetensors", *words)[0] == 0
    alone = rc.SecondMoment.load("alone.safetensors", rc.bind(user_generator, "1"))
    together = rc.SecondMoment.load("1.safetensors", rc.bind(user_generator, "1"))
    assert torch.equal(alone.matrix(), together.matrix())
    one = ["collect", "--layer", "3", "--layer", "1", "--out", "m.safetensors"]
    for more, named in (
        ([], "--out"),
        (["--out", "n.safetensors", "--resume", "r"], "--resume"),
    ):
        code, _, err = run(capsys, *one, *more, *words)
        assert code == 2 and err == f"rewrite collect: Each --layer takes one {named} of its own, in the same order.\n"
        assert not Path("m.safetensors").exists()
    code, _, err = run(capsys, *one, "--out", "./m.safetensors", *words)
    assert code == 2 and "./m.safetensors is named twice" in err
    code, _, err = run(capsys, *one, "--out", "n.safetensors", *("--resume", "m.safetensors") * 2, *words)
    assert code == 2 and "m.safetensors is named twice" in err
    own = [
        "collect",
        "--layer",
        "1",
        "--out",
        "own.safetensors",
        "--resume",
        "own.safetensors",
    ]  # a checkpoint may end as it
    for _ in range(2):
        assert run(capsys, *own, *words)[0] == 0
        assert torch.equal(
            rc.SecondMoment.load("own.safetensors", rc.bind(user_generator, "1")).matrix(), alone.matrix()
        )


def test_a_whole_session_on_a_users_generator(tmp_path, capsys, user_generator):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square()), query=rc.Selection(2, square())).save(
        "e.json"
    )
    assert run(capsys, "layers", *MINE)[0] == 0
    assert run(capsys, "collect", "--layer", "3", "--out", "m.safetensors", "--count", 40, *MINE, "--quiet")[0] == 0
    moment = rc.SecondMoment.load("m.safetensors", rc.bind(user_generator, "3"))
    moment.check(rc.bind(user_generator, "3"), rc.sample_latents(6, 40))  # the checkpoint was loaded
    for i, extra in enumerate(([], ["--erase", 2], ["--zero"], ["--solver", "projected", "--steps", 20])):
        rule = f"rule{i}.safetensors"
        code, _out, err = run(
            capsys,
            "edit",
            "e.json",
            "--layer",
            "3",
            "--moment",
            "m.safetensors",
            "--out",
            rule,
            "--count",
            40,
            *MINE,
            "--quiet",
            *extra,
        )
        assert code == 0, err
        assert run(capsys, "render", "--rewrite", rule, "--images", "0-2", "--out", f"{i}.png", *MINE)[0] == 0
        assert run(capsys, "eval", "--rewrite", rule, "--count", 10, *MINE)[0] == 0
    assert (
        run(
            capsys,
            "search",
            "e.json",
            "--layer",
            "3",
            "--selection",
            "query",
            "--out",
            "s.png",
            "--count",
            40,
            *MINE,
            "--quiet",
        )[0]
        == 0
    )
    assert (
        run(
            capsys,
            "collect",
            "--layer",
            "3",
            "--out",
            "u.safetensors",
            "--count",
            40,
            "--latents",
            "uniform",
            *MINE,
            "--quiet",
        )[0]
        == 0
    )


def test_loaders_that_take_a_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    golden = (
        "--generator",
        "rewrite_core:load_proggan",
        "--checkpoint",
        DATA / "proggan_state.npz",
        "--latent-size",
        64,
    )
    code, out, err = run(capsys, "layers", *golden)
    assert code == 0 and "layer5.conv" in out
    code, out, err = run(
        capsys,
        "edit",
        DATA / "proggan_edit.json",
        "--layer",
        "layer5.conv",
        "--count",
        200,
        "--out",
        "r.safetensors",
        "--quiet",
        *golden,
    )
    assert code == 0 and (tmp_path / "r.safetensors").exists(), err


BAD = [
    (["layers", "--generator", "mine"], "module:function"),
    (["layers", "--generator", "nowhere:make", "--latent-size", "6"], "no module 'nowhere'"),
    (["layers", "--generator", "../work/mine.py:make", "--latent-size", "6"], "use mine:make, and run from ../work/"),
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
    (["eval", "--rewrite", "r", "--generator", "mine:one_at_a_time", "--latent-size", "6"], "AssertionError (mine.py"),
    (["layers", "--generator", "mine:pair", "--latent-size", "6"], "returns a tuple and not images alone"),
    (["layers", "--latent-size", "6x"], "512 or 100x1x1"),
    (["layers", "--range", "1,0"], "the lower first"),
    (["layers", "--seed", "-1"], "from 0 to 4294967295"),
    (["layers", "--seed", "4294967296"], "4294967295"),
    (["collect", "--layer", LAYER, "--count", "99999999999999", "--out", "m.safetensors"], "Out of memory"),
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
    (["collect", "--layer", "3", "--out", "m.safetensors", "--until", "0", *MINE], "--until is the relative error"),
    (["collect", "--layer", "3", "--out", "", *MINE], "empty"),
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
        ["edit", "e.json", "--layer", "3", "--out", "r", "--zero", "--whole-map", *MINE],
        "--whole-map would change nothing",
    ),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--erase", "2", "--box", *MINE], "--box would change nothing"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--steps", "20", *MINE], "--steps would change nothing"),
    (
        ["edit", "e.json", "--layer", "3", "--out", "r", "--solver", "unconstrained", "--rank", "2", *MINE],
        "--rank would change nothing",
    ),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--tight", "--whole-map", *MINE], "not allowed with"),
    (["edit", "q.json", "--layer", "3", "--out", "r", *MINE], "or use --erase or --zero"),
    (["edit", "spire", "--layer", "3", "--out", "r", "--seed", "2"], "--seed 1"),
    (["edit", "spire", "--layer", "3", "--out", "r", *MINE], "spire: No such file"),
    (
        ["edit", "spires", "--layer", "3", "--out", "r"],
        "no file 'spires'; the embedded generator's own edits are spire, ",
    ),
    (["eval", "--rewrite", "r", "--rule", "spire", *MINE], "embedded generator only"),
    (["bench", "flying"], "no benchmark 'flying'"),
    (["bench", "--device", "bogus"], "cannot be used"),
    (["bench", "--device", "meta"], "measure the CPU"),
    (["edit", "none.json", "--layer", "3", "--out", "r", *MINE], "none.json"),
    (["edit", "bad.json", "--layer", "3", "--out", "r", *MINE], "bad.json"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--count", "1", *MINE], "out of range"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--rank", "9", *MINE], "8 channels"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--moment", "weights.pt", *MINE], "weights.pt"),
    (["render", "--rewrite", "weights.pt", "--out", "g.png", *MINE], "weights.pt"),
    (["eval", "--rewrite", "none.safetensors", *MINE], "none.safetensors"),
    (["search", "e.json", "--layer", "3", "--selection", "query", "--out", "s.png", *MINE], "no query"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a[:4]) + "..." + w for a, w in BAD])
def test_bad_input_is_one_sentence_and_a_status(tmp_path, capsys, user_generator, arguments, words):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    rc.Edit(paste=rc.Selection(1, square())).save("q.json")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "needy.py").write_text("import notthere")
    (tmp_path / "zero.py").write_text("1 / 0")
    (tmp_path / "typo.py").write_text("def make(:")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    code, _out, err = run(capsys, *arguments, "--quiet")
    assert code == 2 and words in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    after = [name for name in sorted(os.listdir(tmp_path)) if name != "__pycache__"]
    assert after == before, "something was half-written"


def test_argparse_errors_exit_with_two(capsys):
    for arguments in ([], ["fly"], ["render", "--images", "a-b", "--out", "x.png"], ["edit", "e.json"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        capsys.readouterr()


def test_info_names_the_backends(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and all(word in out for word in ("second_moment", "spd_solve", "fit_low_rank", "cpp"))


def test_latents_that_are_maps(tmp_path, capsys, user_generator):
    """[N, 6, 1, 1], as a textbook DCGAN takes them, are the very numbers of [N, 6]."""
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    torch.save(user_generator[1:].state_dict(), "maps.pt")
    maps = ("--generator", "mine:make_maps", "--checkpoint", "maps.pt", "--latent-size", "6x1x1")
    for name, generator in (("rows", MINE), ("maps", maps)):
        for options in (
            ("collect", "--layer", "3", "--out", f"{name}.safetensors", "--count", 40, "--quiet"),
            ("edit", "e.json", "--layer", "3", "--out", f"{name}_rule.safetensors", "--count", 40, "--quiet"),
            ("render", "--out", f"{name}.png"),
        ):
            code, _, err = run(capsys, *options, *generator)
            assert code == 0, err
    rows, other = (rc.SecondMoment.load(f"{name}.safetensors").matrix() for name in ("rows", "maps"))
    assert torch.equal(rows, other)
    title = 34  # the pictures are under it
    first, second = (np.asarray(Image.open(f"{name}.png"))[title:] for name in ("rows", "maps"))
    assert np.array_equal(first, second)


def test_generators_in_half_precision(tmp_path, capsys, user_generator):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    half = ("--generator", "mine:make_half", "--checkpoint", "weights.pt", "--latent-size", "6")
    edit = ("edit", "e.json", "--layer", "3", "--count", 20, "--out", "r.safetensors", "--quiet")
    for command in (("layers",), edit, ("render", "--rewrite", "r.safetensors", "--out", "g.png")):
        code, _, err = run(capsys, *command, *half)
        assert code == 0, err


def test_the_range_of_a_generators_images(tmp_path, capsys, user_generator):
    unit = ("--generator", "mine:make_unit", "--latent-size", "6", "--images", 3)
    assert run(capsys, "render", "--out", "wrong.png", *unit)[0] == 0
    assert run(capsys, "render", "--out", "right.png", "--range", "0,1", *unit)[0] == 0
    wrong, right = (np.asarray(Image.open(name))[40:160, 10:130].mean() for name in ("wrong.png", "right.png"))
    assert wrong == pytest.approx(127.5 + right / 2, abs=2)


def test_the_shipped_edits_by_name_and_the_size_of_a_change(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("--layer", LAYER, "--rank", 4, "--loss", "l2", "--quiet")
    code, out, err = run(capsys, "edit", "spire", *common, "--whole-map", "--out", "good.safetensors")
    assert code == 0 and 0.1 < float(re.search(r"\|dW\| / \|W\|: ([\d.]+)", out)[1]) < 1 and not err
    code, out, err = run(capsys, "edit", "spire", *common, "--tight", "--out", "bad.safetensors")
    assert code == 0 and float(re.search(r"\|dW\| / \|W\|: ([\d.]+)", out)[1]) > 2
    assert "rewrite: warning: The change is" in err and "use --whole-map" in err
    assert all(line.startswith("rewrite: warning: ") for line in err.splitlines())


def test_options_that_were_not_given_are_the_librarys_defaults(tmp_path, capsys, user_generator, monkeypatch):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    seen = {}
    for name in ("rewrite", "erase", "zero"):
        real = getattr(cli, name)
        monkeypatch.setattr(
            cli, name, lambda *a, _real=real, _name=name, **k: (seen.update({_name: k}), _real(*a, **k))[1]
        )
    edit = ("edit", "e.json", "--layer", "3", "--out", "r.safetensors", "--count", 20, "--quiet", *MINE)
    assert run(capsys, *edit)[0] == 0 and seen["rewrite"] == {"blend": "mask", "progress": False}
    assert run(capsys, *edit, "--erase", 3, "--tight")[0] == 0
    assert seen["erase"] == {"units": 3, "progress": False, "region": "box"}
    assert run(capsys, *edit, "--zero", "--rank", 2)[0] == 0 and seen["zero"] == {"rank": 2}
    assert run(capsys, *edit, "--whole-map", "--box", "--preserve", 0.5)[0] == 0
    assert seen["rewrite"] == {"blend": "box", "progress": False, "region": "map", "preserve": 0.5}


def test_an_edit_of_several_pastes(tmp_path, capsys, user_generator):
    edit = rc.Edit(copy=rc.Selection(0, square()), paste=[rc.Selection(1, square()), rc.Selection(2, square())])
    edit.save("e.json")
    common = ("e.json", "--layer", "3", "--count", 20, "--quiet", *MINE)
    for option in ((), ("--solver", "adam", "--steps", 3), ("--erase", 3)):
        assert run(capsys, "edit", *common, "--out", "r.safetensors", *option)[0] == 0
        assert rc.Rewrite.load("r.safetensors").edit == edit
    stages = re.findall(r"(\w+) \d+ ms \((\d+)%\)", run(capsys, "edit", *common, "--out", "r.safetensors")[1])
    assert {"generator", "directions", "goal", "fit"} <= {stage for stage, _ in stages}
    assert 95 <= sum(int(share) for _, share in stages) <= 105
    assert run(capsys, "search", *common, "--selection", "paste", "--out", "found.png")[0] == 0
    twice = rc.Edit(copy=edit.copy, paste=[edit.pastes[0], rc.Selection(1, np.roll(square(), 3, 0))])
    twice.save("e.json")
    code, _, err = run(capsys, "edit", *common, "--out", "r.safetensors")
    assert code and err.count("\n") == 1 and "overlap" in err


def test_warnings_are_one_line(tmp_path, capsys, user_generator):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    code, _, err = run(capsys, "layers", "--generator", "mine:make", "--latent-size", 6)
    assert (
        code == 0
        and err == "rewrite: warning: Without --checkpoint the weights are those that mine:make starts from.\n"
    )
    assert run(capsys, "collect", "--layer", "3", "--out", "m.safetensors", "--count", 30, *MINE, "--quiet")[2] == ""
    edit = ("edit", "e.json", "--layer", "3", "--out", "r.safetensors", "--moment", "m.safetensors", "--zero", *MINE)
    for same in (("--count", 30), ("--count", 60), ("--count", 20)):  # samples of one seed begin alike
        assert run(capsys, *edit, *same)[2] == ""
    for other in (("--seed", 2), ("--latents", "uniform")):
        code, _, err = run(capsys, *edit, *other)
        assert code == 0 and err.startswith("rewrite: warning: m.safetensors was collected on other latents"), err
        assert len(err.splitlines()) == 1


def test_advice_names_options(capsys):
    assert cli._worded("apply those first,\n or pass force=True.") == "apply those first, or pass --force."
    assert cli._worded("a lower rank, or preserve=0.3.") == "a lower rank, or --preserve 0.3."
    assert cli._worded("use solver='adam'.") == "use --solver adam."
    # every phrase that is translated is still said somewhere in the library
    sources = "".join(file.read_text() for file in Path(rc.__file__).parent.rglob("*.py") if file.name != "commands.py")
    for python, _ in cli._OPTIONS:
        assert re.search(python, sources), python


def test_a_rewrite_of_other_weights_needs_force(tmp_path, capsys, user_generator):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    assert (
        run(capsys, "edit", "e.json", "--layer", "3", "--out", "r.safetensors", "--count", 9, *MINE, "--quiet")[0] == 0
    )
    other = ("render", "--rewrite", "r.safetensors", "--out", "g.png", "--generator", "mine:make", "--latent-size", 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, _, err = run(capsys, *other)
        assert code == 2 and "pass --force" in err
        assert run(capsys, *other, "--force")[0] == 0


def test_benchmarks_without_a_name(tmp_path, capsys, monkeypatch):
    runner = pytest.importorskip("rewrite_core.benchmarks.runner")
    asked = []
    monkeypatch.setattr(runner, "main", lambda *arguments: asked.append(arguments) or 0)
    assert run(capsys, "bench", "--quick", "--out", tmp_path)[0] == 0
    assert run(capsys, "bench", "solve", "--out", tmp_path)[0] == 0
    assert asked == [(["all"], tmp_path, True), (["solve"], tmp_path, False)]


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys, user_generator, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "collect_second_moment", interrupt)
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    Path("c.safetensors").touch()
    collect = ("collect", "--layer", "3", "--out", "m.safetensors", *MINE)
    edit = ("edit", "e.json", "--layer", "3", "--out", "r.safetensors", *MINE)
    for command, words in (
        ((*collect, "--resume", "none.safetensors"), "before the first checkpoint"),
        ((*collect, "--resume", "c.safetensors"), "the same command again to go on from c.safetensors"),
        (collect, "with --resume FILE"),
        (edit, "rewrite collect --resume FILE"),
    ):
        code, _, err = run(capsys, *command)
        assert code == 130 and err.startswith(f"rewrite {command[0]}: interrupted; ") and words in err
        assert len(err.splitlines()) == 1


def test_the_module_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rewrite_core", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == rc.__version__
    assert (Path(rc.__file__).parent / "py.typed").exists()


def test_an_interrupt_while_torch_is_imported(tmp_path):
    script = "import sys; from rewrite_core_command import main; print('started', flush=True); sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "info"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs inherit that it is ignored
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "rewrite: interrupted.\n"


def test_a_pickled_network_is_opened_only_where_asked_to(capsys, user_generator, tmp_path):
    torch.save({"G_ema": user_generator}, tmp_path / "network.pkl")
    code, _, err = run(capsys, "layers", "--checkpoint", "network.pkl", "--latent-size", "6")
    assert code == 2 and "name yours with --generator" in err
    code, _, err = run(
        capsys, "layers", "--generator", "mine:make", "--checkpoint", "network.pkl", "--latent-size", "6"
    )
    assert code == 2 and "holds more than tensors" in err
    code, out, _ = run(capsys, "layers", "--allow-pickle", "--checkpoint", "network.pkl", "--latent-size", "6")
    assert code == 0 and out == run(capsys, "layers", *MINE)[1]
    code, _, err = run(capsys, "layers", "--generator", "mine:make", "--allow-pickle", "--checkpoint", "network.pkl")
    assert code == 2 and "--allow-pickle: not allowed with argument --generator" in err
    code, _, err = run(capsys, "layers", "--allow-pickle", "--latent-size", "6")
    assert code == 2 and "--allow-pickle needs the pickled network, --checkpoint FILE" in err


def test_a_pickled_networks_code_is_found_beside_it(capsys, tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("import torch\nclass Net(torch.nn.ConvTranspose2d):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    torch.save(importlib.import_module("beside").Net(6, 3, 4), tmp_path / "net.pt")
    monkeypatch.setattr(sys, "path", sys.path[1:])
    monkeypatch.delitem(sys.modules, "beside")
    code, _out, err = run(capsys, "layers", "--allow-pickle", "--checkpoint", "net.pt", "--latent-size", "6x1x1")
    assert code == 0, err
    monkeypatch.delitem(sys.modules, "beside")


def test_layers_of_other_dimensions_are_listed(capsys, user_generator, tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch
            def make():
                return torch.nn.Sequential(
                    torch.nn.Linear(6, 8 * 5), torch.nn.Unflatten(1, (8, 5)), torch.nn.Conv1d(8, 12, 3, padding=1),
                    torch.nn.Unflatten(1, (3, 4)),
                )
            """
        )
    )
    sys.modules.pop("mine", None)
    code, out, _ = run(capsys, "layers", "--generator", "mine:make", "--latent-size", "6")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and rows[1] == ["0", "linear", "6", "->", "40", "1", "1", "1", "closed_form"]
    assert rows[2] == ["2", "conv", "8", "->", "12", "3", "5", "5", "closed_form"]
