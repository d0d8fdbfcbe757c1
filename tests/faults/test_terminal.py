"""What a terminal is sent: printable text of a length that is read, whatever names and files it quotes."""

import io
import json
from pathlib import Path

import pytest
from helpers.command_line import MINE, run

import rewrite_core as rc
from rewrite_core.cli.messages import MOST_CHARACTERS, say

RED = "\x1b[31mred"


def assert_fit_to_be_shown(text):
    assert all(line.isprintable() and len(line) <= MOST_CHARACTERS + 60 for line in text.splitlines()), text


@pytest.mark.parametrize(
    "arguments",
    [
        ["layers", "--generator", f"mine{RED}:make"],
        ["layers", "--generator", "mine:" + 3000 * "x", "--latent-size", "6"],
        ["layers", "--generator", "mine:interrupts", "--latent-size", "6"],
        ["layers", "--device", RED],
        ["layers", "--seed", 5000 * "9"],
        ["layers", "--checkpoint", f"{RED}.pt", "--generator", "mine:make", "--latent-size", "6"],
        ["collect", "--layer", RED, "--out", "m.safetensors", *MINE],
        ["collect", "--layer", "3", "--out", f"{RED}/m.safetensors", *MINE],
        ["edit", f"{RED}.json", "--layer", "3", "--out", "r.safetensors", *MINE],
        ["edit", "control.json", "--layer", "3", "--out", "r.safetensors", *MINE],
        ["measure", "--rewrite", 5000 * "r", *MINE],
        [RED],
        ["layers", f"--{RED}"],
    ],
    ids=lambda words: " ".join(words)[:40].replace("\x1b", "ESC"),
)
def test_errors(capsys, user_generator, arguments):
    Path("control.json").write_text(json.dumps({RED: [RED]}))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert_fit_to_be_shown(err)


def test_results(capsys, user_generator):
    """The name of a layer and of a file are the user's own."""
    code, out, _ = run(capsys, "collect", "--layer", "3", "--out", f"{RED}\nm", "--count", 4, *MINE)
    assert code == 0 and "\\x1b[31mred" in out and Path(f"{RED}\nm").exists()
    assert_fit_to_be_shown(out)


def test_an_output_that_cannot_show_every_letter():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("Käse \udc80 ✓", to=ascii_only)
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"K\\xe4se \\udc80 \\u2713\n"


def test_titles_say_what_a_number_is(capsys, user_generator, monkeypatch):
    """A layer may be called 3."""
    titles = []
    real = rc.pictures.grid
    monkeypatch.setattr(rc.pictures, "grid", lambda rows, title: titles.append(title) or real(rows, title))
    rc.Edit(paste=rc.Selection.box(1, (1, 1, 5, 5), 8)).save("e.json")
    assert run(capsys, "search", "e.json", "--layer", "3", "--count", 9, "--out", "s.png", *MINE)[0] == 0
    assert titles == ["best matches at layer 3"]
    code, out, _ = run(capsys, "collect", "--layer", "3", "--count", 9, "--out", "m.safetensors", *MINE)
    assert code == 0 and "channels at layer 3" in out
