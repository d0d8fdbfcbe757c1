"""The generator that a command works on: of a user, pickled, in half precision, with other latents."""

import importlib
import sys

import numpy as np
import pytest
import torch
from conftest import DATA
from helpers.command_line import MINE, run, save_edit, square
from PIL import Image

import rewrite_core as rc


def test_a_whole_session_on_a_users_generator(tmp_path, capsys, user_generator):
    save_edit(query=rc.Selection(2, square()))
    assert run(capsys, "layers", *MINE)[0] == 0
    assert run(capsys, "collect", "--layer", "3", "--out", "m.safetensors", "--count", 40, *MINE, "--quiet")[0] == 0
    moment = rc.SecondMoment.load("m.safetensors", rc.bind(user_generator, "3"))
    moment.check(rc.bind(user_generator, "3"), rc.sample_latents(6, 40))  # the checkpoint was loaded
    for i, extra in enumerate(([], ["--erase", 2], ["--zero"], ["--solver", "projected", "--steps", 20])):
        rule = f"rule{i}.safetensors"
        code, _, err = run(
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
        assert run(capsys, "measure", "--rewrite", rule, "--count", 10, *MINE)[0] == 0
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
            "--distribution",
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
    code, _, err = run(
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


def test_latents_that_are_maps(tmp_path, capsys, user_generator):
    """[N, 6, 1, 1], as a textbook DCGAN takes them, are the very numbers of [N, 6]."""
    save_edit()
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
    save_edit()
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
    code, _, err = run(capsys, "layers", "--allow-pickle", "--checkpoint", "net.pt", "--latent-size", "6x1x1")
    assert code == 0, err
    monkeypatch.delitem(sys.modules, "beside")


def test_layers_of_other_dimensions_are_listed(capsys, user_generator):
    code, out, _ = run(capsys, "layers", "--generator", "mine:lines", "--latent-size", "6")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and rows[1] == ["0", "linear", "6", "->", "40", "1", "1", "1", "closed_form"]
    assert rows[2] == ["2", "conv", "8", "->", "12", "3", "5", "5", "closed_form"]
