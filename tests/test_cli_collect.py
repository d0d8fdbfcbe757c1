"""``rewrite collect``."""

from pathlib import Path

import torch
from helpers.command_line import MINE, run

import rewrite_core as rc


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
