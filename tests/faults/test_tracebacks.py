"""No mix of options and values ends in a traceback: see helpers/fuzz_command_line.py, which runs thousands by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import MINE, assert_refused, run

FUZZ = Path(__file__).parent.parent / "helpers" / "fuzz_command_line.py"


def test_mixes_of_options_and_values(tmp_path):
    """Of one seed, so that they are the same every time."""
    done = subprocess.run(
        [sys.executable, FUZZ, "--mixes", "120", "--seed", "11"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "120 of 120 end as they should" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layers", "--device", "hpu"], "Device 'hpu' cannot be used here"),
        (["layers", "--device", "meta"], "Device 'meta' cannot be used here"),
        (["layers", "--device", ""], "Device '' cannot be used here"),
        (["measure", "--rewrite", "r", "--count", "99999999999"], "latents take 1.92e+04 GB, and this machine has"),
        (["layers", "--latent-size", "99999x99999x99999"], "GB, and this machine has"),
        (["render", "--out", "g.png", "--size", "4096", "--images", "0-99"], "more than the 250000000 pixels"),
        (["render", "--out", "g.png", "--size", "5000"], "from 1 to 4096"),
        (["search", "spire", "--layer", "3", "--out", "g.png", "--top", "99999999"], "more than the 250000000 pixels"),
        (["layers", "--checkpoint", "a\0b"], "'a\\x00b' is not the name of a file"),
        (["layers", "--checkpoint", ""], "'' is not the name of a file"),
    ],
)
def test_requests_that_no_machine_can_serve(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, tmp_path, arguments, words)


def test_a_generator_that_fails_later_than_it_was_tried(capsys, user_generator):
    late = ("--generator", "mine:late", *MINE[2:])
    code, _, err = run(capsys, "render", "--out", "g.png", *late)
    assert code == 2 and err == (
        "rewrite render: The generator fails, on other latents than the two it was tried on: KeyError: 'late' "
        f"(mine.py, line {line_of('KeyError')}).\n"
    )


def line_of(word):
    return next(i for i, line in enumerate(Path("mine.py").read_text().splitlines(), 1) if word + '("late")' in line)


def test_a_bug_still_shows_its_trace(capsys, user_generator, monkeypatch):
    """What is neither bad input nor a user's own code must not be made to look like it."""

    def broken(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr("rewrite_core.layers.listing.list_layers", broken)
    with pytest.raises(KeyError, match="a bug"):
        run(capsys, "layers", *MINE)


def test_too_little_memory_is_one_sentence(capsys, user_generator, monkeypatch):
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):

        def full(*_, error=error, **__):
            raise error

        monkeypatch.setattr("rewrite_core.layers.listing.list_layers", full)
        code, _, err = run(capsys, "layers", *MINE)
        assert code == 2 and err.startswith("rewrite layers: Out of memory; ask for fewer pictures")
        assert err.count("\n") == 1
