"""What the tests of the command line share: how one is run, and a user's generator to run it on."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rewrite_core as rc
from rewrite_core.cli.entry import main

LAYER = "synthesis.layer4.conv"  # of the embedded generator
MINE = ("--generator", "mine:make", "--checkpoint", "weights.pt", "--latent-size", "6")


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of ``rewrite`` with these arguments."""
    try:
        code = main([str(each) for each in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def square(size=8):
    mask = np.zeros((size, size))
    mask[1:5, 1:5] = 1
    return mask


def save_edit(name="e.json", **options):
    rc.Edit(copy=rc.Selection(0, square()), paste=rc.Selection(1, square()), **options).save(name)


def assert_refused(capsys, folder, arguments, words):
    """The command says one sentence with these words, ends with status 2, and leaves no file behind."""
    before = sorted(os.listdir(folder))
    code, _, err = run(capsys, *arguments, "--quiet")
    assert code == 2 and words in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    after = [name for name in sorted(os.listdir(folder)) if name != "__pycache__"]
    assert after == before, "something was half-written"


@pytest.fixture
def user_generator(tmp_path, monkeypatch):
    """A user's module beside which the command is run, and its checkpoint; the generator that both make."""
    shutil.copy(Path(__file__).with_name("mine.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)  # the command line puts the working folder there
    sys.path.insert(0, str(tmp_path))
    sys.modules.pop("mine", None)
    import mine

    generator = mine.make()
    with torch.no_grad():
        generator[3].weight.add_(0.1)  # not what make() starts from
    torch.save(generator.state_dict(), tmp_path / "weights.pt")
    yield generator.eval()
    sys.path[:] = path
    sys.modules.pop("mine", None)
