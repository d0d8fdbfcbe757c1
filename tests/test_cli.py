import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import DATA
from PIL import Image

import rewrite_core as rc
from rewrite_core.cli import build_parser, main
from rewrite_core.demo import load_edit

LAYER = "synthesis.layer4.conv"


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
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
            def not_a_module():
                return 3
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mine", None)
    import importlib.util

    spec = importlib.util.spec_from_file_location("mine_for_saving", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generator = module.make()
    with torch.no_grad():
        generator[3].weight.add_(0.1)  # not what make() starts from
    torch.save(generator.state_dict(), tmp_path / "weights.pt")
    yield generator.eval()
    sys.modules.pop("mine", None)


MINE = ("--generator", "mine:make", "--checkpoint", "weights.pt", "--latent-size", "6")


def square(size=8):
    mask = np.zeros((size, size))
    mask[1:5, 1:5] = 1
    return mask


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
        capsys, "edit", edit, "--layer", LAYER, "--moment", moment, "--rank", 4, "--loss", "l2", "--whole-map",
        "--out", rule, "--state-dict", tmp_path / "edited.safetensors", "--quiet",
    )  # fmt: skip
    assert code == 0 and "closed_form" in out and rc.load_rewrite(rule).rank == 4
    code, out, _ = run(capsys, "eval", "--rewrite", rule, "--rule", "spire", "--count", 200, "--seed", 2)
    report = json.loads(out)
    assert code == 0 and report["efficacy"] > 0.8 and report["pictures"] == 200
    code, out, _ = run(capsys, "render", "--rewrite", rule, "--images", "0-3,9", "--out", tmp_path / "grid.png")
    assert code == 0 and Image.open(tmp_path / "grid.png").width > 500
    code, out, _ = run(
        capsys, "search", edit, "--layer", LAYER, "--moment", moment, "--top", 5, "--out", tmp_path / "found.png", "--quiet"
    )
    assert code == 0 and len(out.splitlines()[0].split()) == 5 and Image.open(tmp_path / "found.png").width > 500
    # the edited state dict is the generator with the rewrite applied
    from safetensors.torch import load_file

    from rewrite_core.demo import chapels

    edited = chapels()
    rc.load_rewrite(rule).apply(edited)
    state = load_file(tmp_path / "edited.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in edited.state_dict().items())


def test_a_whole_session_on_a_users_generator(tmp_path, capsys, user_generator):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square()), query=rc.Selection(2, square())).save("e.json")
    assert run(capsys, "layers", *MINE)[0] == 0
    assert run(capsys, "collect", "--layer", "3", "--out", "m.safetensors", "--count", 40, *MINE, "--quiet")[0] == 0
    moment = rc.SecondMoment.load("m.safetensors", rc.bind(user_generator, "3"))
    moment.check(rc.bind(user_generator, "3"), rc.sample_latents(6, 40))  # the checkpoint was loaded
    for i, extra in enumerate(([], ["--erase", 2], ["--zero"], ["--solver", "projected", "--steps", 20])):
        rule = f"rule{i}.safetensors"
        code, out, err = run(
            capsys, "edit", "e.json", "--layer", "3", "--moment", "m.safetensors", "--out", rule, "--count", 40, *MINE, "--quiet", *extra
        )
        assert code == 0, err
        assert run(capsys, "render", "--rewrite", rule, "--images", "0-2", "--out", f"{i}.png", *MINE)[0] == 0
        assert run(capsys, "eval", "--rewrite", rule, "--count", 10, *MINE)[0] == 0
    assert run(capsys, "search", "e.json", "--layer", "3", "--selection", "query", "--out", "s.png", "--count", 40, *MINE, "--quiet")[0] == 0
    assert run(capsys, "collect", "--layer", "3", "--out", "u.safetensors", "--count", 40, "--latents", "uniform", *MINE, "--quiet")[0] == 0


def test_loaders_that_take_a_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    golden = ("--generator", "rewrite_core:load_proggan", "--checkpoint", DATA / "proggan_state.npz", "--latent-size", 64)
    code, out, err = run(capsys, "layers", *golden)
    assert code == 0 and "layer5.conv" in out
    code, out, err = run(
        capsys, "edit", DATA / "proggan_edit.json", "--layer", "layer5.conv", "--count", 200, "--out", "r.safetensors", "--quiet", *golden
    )
    assert code == 0 and (tmp_path / "r.safetensors").exists(), err


BAD = [
    (["layers", "--generator", "mine"], "module:function"),
    (["layers", "--generator", "nowhere:make", "--latent-size", "6"], "no module"),
    (["layers", "--generator", "mine:nothing", "--latent-size", "6"], "no function"),
    (["layers", "--generator", "mine:not_a_module", "--latent-size", "6"], "torch.nn.Module"),
    (["layers", "--generator", "mine:make"], "--latent-size"),
    (["layers", "--generator", "mine:make", "--latent-size", "7"], "check --latent-size"),
    (["layers", "--generator", "mine:make", "--latent-size", "6", "--checkpoint", "none.pt"], "none.pt"),
    (["layers", "--generator", "mine:make", "--latent-size", "6", "--checkpoint", "e.json"], "e.json"),
    (["layers", "--generator", "mine:make", "--latent-size", "6", "--checkpoint", str(DATA / "proggan_state.npz")], "does not fit"),
    (["layers", "--generator", "rewrite_core:load_proggan", "--latent-size", "6"], "--checkpoint"),
    (["layers", "--checkpoint", "weights.pt"], "own weights"),
    (["layers", "--device", "cuda:77"], "cannot be used"),
    (["collect", "--layer", "3x", "--out", "m.safetensors", *MINE], "did you mean"),
    (["collect", "--layer", "3", "--out", "no/folder/m.safetensors", "--count", "4", *MINE], "folder"),
    (["collect", "--layer", "3", "--out", "m.safetensors", "--count", "0", *MINE], "At least one"),
    (["edit", "none.json", "--layer", "3", "--out", "r", *MINE], "none.json"),
    (["edit", "bad.json", "--layer", "3", "--out", "r", *MINE], "bad.json"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--count", "1", *MINE], "out of range"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--rank", "9", *MINE], "8 channels"),
    (["edit", "e.json", "--layer", "3", "--out", "r", "--moment", "weights.pt", *MINE], "weights.pt"),
    (["render", "--rewrite", "weights.pt", "--out", "g.png", *MINE], "weights.pt"),
    (["eval", "--rewrite", "none.safetensors", *MINE], "none.safetensors"),
    (["search", "e.json", "--layer", "3", "--selection", "query", "--out", "s.png", *MINE], "no query"),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(a[:4]) + "..." + w for a, w in BAD])
def test_bad_input_is_one_sentence_and_a_status(tmp_path, capsys, user_generator, arguments, words):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square())).save("e.json")
    (tmp_path / "bad.json").write_text("{")
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(capsys, *arguments, *(["--quiet"] if "--quiet" not in arguments else []))
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


def test_the_console_script(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rewrite_core.cli", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == rc.__version__
