"""``rewrite edit``."""

import re
import warnings

import numpy as np
from helpers.command_line import LAYER, MINE, run, save_edit, square
from PIL import Image

import rewrite_core as rc
from rewrite_core.rewrites import calls


def test_the_shipped_edits_by_name_and_the_size_of_a_change(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("--layer", LAYER, "--rank", 4, "--loss", "l2", "--quiet")
    code, out, err = run(capsys, "edit", "spire", *common, "--region", "map", "--out", "good.safetensors")
    assert code == 0 and 0.1 < float(re.search(r"\|dW\| / \|W\|: ([\d.]+)", out)[1]) < 1 and not err
    box = (*common, "--region", "box", "--out")
    code, out, err = run(capsys, "edit", "spire", *box, "held.safetensors")
    assert code == 0 and "fitted again with preserve=" in err and "--trust None" in err
    code, out, err = run(capsys, "edit", "spire", *box, "bad.safetensors", "--trust", "none")
    assert code == 0 and float(re.search(r"\|dW\| / \|W\|: ([\d.]+)", out)[1]) > 2
    assert "rewrite: warning: The change is" in err and "use --region map" in err
    assert all(line.startswith("rewrite: warning: ") for line in err.splitlines())


def test_options_that_were_not_given_are_the_librarys_defaults(tmp_path, capsys, user_generator, monkeypatch):
    save_edit()
    seen = {}
    for name in ("rewrite", "erase", "zero"):
        real = getattr(calls, name)
        monkeypatch.setattr(
            calls, name, lambda *a, _real=real, _name=name, **k: (seen.update({_name: k}), _real(*a, **k))[1]
        )
    edit = ("edit", "e.json", "--layer", "3", "--out", "r.safetensors", "--count", 20, "--quiet", *MINE)
    assert run(capsys, *edit)[0] == 0 and seen["rewrite"] == {"progress": False}
    assert run(capsys, *edit, "--erase", 3, "--region", "box")[0] == 0
    assert seen["erase"] == {"units": 3, "progress": False, "region": "box"}
    assert run(capsys, *edit, "--zero", "--rank", 2)[0] == 0 and seen["zero"] == {"rank": 2}
    assert run(capsys, *edit, "--region", "map", "--blend", "box", "--preserve", 0.5)[0] == 0
    assert seen["rewrite"] == {"blend": "box", "progress": False, "region": "map", "preserve": 0.5}
    assert run(capsys, *edit, "--solver", "adam", "--steps", 3, "--lr", 0.1, "--directions", "svd")[0] == 0
    assert seen["rewrite"] == {"progress": False, "solver": rc.Adam(steps=3, lr=0.1), "directions": "svd"}
    assert run(capsys, *edit, "--solver", "projected", "--steps", 3, "--project-every", 2, "--project-gradient")[0] == 0
    assert seen["rewrite"]["solver"] == rc.Projected(steps=3, project_every=2, project_gradient=True)


def test_an_edit_of_several_pastes(tmp_path, capsys, user_generator):
    edit = rc.Edit(copy=rc.Selection(0, square()), paste=[rc.Selection(1, square()), rc.Selection(2, square())])
    edit.save("e.json")
    common = ("e.json", "--layer", "3", "--count", 20, "--quiet", *MINE)
    for option in ((), ("--solver", "adam", "--steps", 3), ("--erase", 3)):
        assert run(capsys, "edit", *common, "--out", "r.safetensors", *option)[0] == 0
        wanted = rc.Edit(paste=edit.pastes) if "--erase" in option else edit  # an erasure copies nothing
        assert rc.Rewrite.load("r.safetensors").edit == wanted
    stages = re.findall(r"(\w+) \d+ ms \((\d+)%\)", run(capsys, "edit", *common, "--out", "r.safetensors")[1])
    assert {"generator", "directions", "goal", "fit"} <= {stage for stage, _ in stages}
    assert 95 <= sum(int(share) for _, share in stages) <= 105
    assert run(capsys, "search", *common, "--selection", "paste", "--out", "found.png")[0] == 0
    twice = rc.Edit(copy=edit.copy, paste=[edit.pastes[0], rc.Selection(1, np.roll(square(), 3, 0))])
    twice.save("e.json")
    code, _, err = run(capsys, "edit", *common, "--out", "r.safetensors")
    assert code and err.count("\n") == 1 and "overlap" in err


def test_a_retouched_picture_is_a_goal(tmp_path, capsys, user_generator):
    save_edit()
    edit = ("edit", "e.json", "--layer", "3", "--out", "r.safetensors", "--count", 20, "--quiet", *MINE)
    goal = (*edit, "--objective", "pictures", "--goal", "goal.png")
    assert run(capsys, *edit, "--objective", "activation", "--iterations", 3)[0] == 0
    code, _, err = run(capsys, *goal)
    assert code == 2 and "goal.png" in err
    for size, fine in ((9, False), (8, True)):
        Image.fromarray(np.full((size, size, 3), 200, np.uint8)).save("goal.png")
        code, _, err = run(capsys, *goal)
        assert code == (0 if fine else 2), err
        assert fine or "9x9 pixels and the generator's pictures 8x8" in err
    assert rc.Rewrite.load("r.safetensors").solver == "lbfgs"
    for wrong, words in (("--region", "--goal pastes nothing"), ("--erase", "--erase pastes nothing")):
        code, _, err = run(capsys, *goal, wrong, "map" if wrong == "--region" else 3)
        assert code == 2 and words in err
    code, _, err = run(capsys, *edit, "--goal", "goal.png")
    assert code == 2 and "--objective pictures" in err


def test_a_rewrite_of_other_weights_needs_force(tmp_path, capsys, user_generator):
    save_edit()
    assert (
        run(capsys, "edit", "e.json", "--layer", "3", "--out", "r.safetensors", "--count", 9, *MINE, "--quiet")[0] == 0
    )
    other = ("render", "--rewrite", "r.safetensors", "--out", "g.png", "--generator", "mine:make", "--latent-size", 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, _, err = run(capsys, *other)
        assert code == 2 and "pass --force" in err
        assert run(capsys, *other, "--force")[0] == 0
