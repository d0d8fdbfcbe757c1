"""Commands whose work the processes of torchrun share: the result of one process, and one sentence where it fails."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS
from helpers.command_line import MINE, run, save_edit, square
from helpers.torchrun import said, torchrun

import rewrite_core as rc
from rewrite_core.evaluation.steps import Steps
from rewrite_core.statistics.distributed import own_part
from rewrite_core.statistics.shards import Shard


@pytest.fixture
def one_thread():
    """As each of torchrun's processes has: the generator's own bits may depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rule(user_generator):
    """A rewrite and its edit in files; the options that name it."""
    z = rc.sample_latents(6, 90)
    save_edit(context=[rc.Selection(row, square()) for row in (2, 3, 4)])
    layer = rc.bind(user_generator, "3")
    moment = rc.collect_second_moment(layer, z, progress=False)
    change = rc.rewrite(layer, moment, rc.Edit.load("e.json"), z, region="map")
    change.save("r.safetensors")
    return ("--rewrite", "r.safetensors", *MINE, "--quiet")


@pytest.mark.slow
def test_pictures_that_processes_paint_together(rule, tmp_path, capsys, one_thread):
    """To the bits of one process; the first says and writes it."""
    render, measure = ("render", *rule, "--images", "0-39"), ("measure", *rule, "--count", "40")
    assert run(capsys, *render, "--out", "one.png")[0] == 0
    code, report, _ = run(capsys, *measure)
    assert torchrun(tmp_path, 2, *render, "--out", "two.png")[:2] == (0, "40 pictures -> two.png\n")
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert torchrun(tmp_path, 2, *measure)[:2] == (code, report)


def test_a_measurement_that_processes_share(rule, tmp_path, capsys, one_thread):
    measure = ("measure", *rule, "--edit", "e.json", "--count", "90", "--out")
    code, one, err = run(capsys, *measure, "one.png")
    assert code == 0
    report = json.loads(one)
    assert report["matching"] and report["unrelated_rows"] and report["size"]
    code, four, errors = torchrun(tmp_path, 4, *measure, "four.png")
    assert code == 0 and four == one.replace("one.png", "four.png")
    assert Path("four.png").read_bytes() == Path("one.png").read_bytes()
    assert said(errors) == said(err)


@pytest.mark.slow
def test_a_scan_that_processes_share(rule, tmp_path, capsys, one_thread):
    scan = ("scan", "e.json", *MINE, "--count", "90", "--ranks", "1,2,9", "--quiet", "--out")
    code, one, err = run(capsys, *scan, "one.png", "--json")
    assert code == 0
    found = json.loads(one)
    assert len(found["rows"]) >= 3 and any("rank 9" in name for name in found["left_out"])
    code, three, errors = torchrun(tmp_path, 3, *scan, "three.png", "--json")
    assert code == 0 and three == one
    assert Path("three.png").read_bytes() == Path("one.png").read_bytes()
    assert said(errors) == said(err)


@pytest.mark.slow
def test_one_sentence_for_what_all_find(rule, tmp_path):
    for command, words in (
        (("render", *rule, "--out", "none/x.png"), "rewrite render: argument --out: There is no folder"),
        (("scan", "e.json", *MINE, "--layers", "x"), "rewrite scan: There is no layer 'x' with maps of two axes;"),
    ):
        code, out, err = torchrun(tmp_path, 3, *command)
        lines = said(err)
        assert len(lines) == 1, lines
        (line,) = lines
        assert code != 0 and out == "" and line.startswith(words), line


def test_one_sentence_where_one_process_fails(rule, tmp_path):
    """And the others, which wait for it, end too."""
    Path("mine.py").write_text(
        f"{Path('mine.py').read_text()}\n"
        "def uneven():\n"
        "    import os\n"
        "    from rewrite_core import RewriteCoreError\n"
        "    if os.environ['RANK'] == '2':\n"
        "        raise RewriteCoreError('This machine has no weights.')\n"
        "    return make()\n"
    )
    command = ("measure", "--edit", "e.json", *rule, "--generator", "mine:uneven", "--count", "60", "--out", "x.png")
    code, out, err = torchrun(tmp_path, 3, *command)
    assert code != 0 and out == "" and said(err) == ["rewrite measure: This machine has no weights."]
    assert not Path("x.png").exists()


SQUARES = [number * number for number in range(10)]
SHARING = (PROGRAMS / "sharing.py",)


def test_warnings_of_any_process_are_shown_once(tmp_path):
    code, out, err = torchrun(tmp_path, 3, "warn", program=SHARING)
    assert code == 0 and out == f"{SQUARES} [1, 2, 3]\n"
    assert said(err) == [
        f"rewrite: warning: {text}"
        for text in ("All say this.", "Process 1 says this.", "Process 2 says this.", "Process 3 says this.")
    ]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fail", "rewrite sharing: The second cannot go on."),
        ("write", "rewrite sharing: out: No space left on device."),
        ("differ", "rewrite sharing: torchrun's processes found different things to do,"),
        ("kill", "rewrite sharing: Another of torchrun's processes ended ("),
    ],
)
def test_how_a_failure_is_told(what, words, tmp_path):
    starts = 2 if what == "fail" else 1
    code, out, err = torchrun(tmp_path, 3, what, program=SHARING, restarts=starts - 1)
    lines = said(err)
    assert code != 0 and all(line.startswith(words) for line in lines), lines
    # once for each start; nobody may get to say that one was killed, which torchrun says
    assert len(lines) <= starts if what == "kill" else len(lines) == starts
    assert "rewrite_core/" not in err  # a file in a traceback of ours; torchrun's own shows torch's
    assert out == ("" if what != "write" else f"{SQUARES} [1, 2, 3]\n")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("pieces", [0, 1, 2, 6, 7, 20])
def test_each_piece_is_one_process_own(pieces, processes):
    items = range(pieces)
    parts = [Steps(shard=Shard(number, processes)).own(items) for number in range(1, processes + 1)]
    assert [each for part in parts for each in part] == [*items]
    sizes = {len(items[own_part(pieces, Shard(number, processes))]) for number in range(1, processes + 1)}
    assert max(sizes) - min(sizes) <= 1
    assert [*Steps().own(items)] == [*items] == Steps().all(items, "alone")


@pytest.mark.parametrize("command", [["info"], ["layers"], ["merge", "a", "--out", "b"]])
def test_commands_that_torchrun_would_run_several_times(command, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(capsys, *command)
    assert (
        code == 2
        and out == ""
        and err
        == (
            f"rewrite {command[0]}: rewrite {command[0]} does not share its work between torchrun's processes, as "
            "collect, scan, render, measure do; run it in one process.\n"
        )
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "torchrun" not in run(capsys, *command)[2]


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("RANK", ""), ("MASTER_PORT", "x")])
def test_an_environment_that_torchrun_does_not_make(name, value, rule, capsys, monkeypatch):
    whole = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for each, text in (whole | {name: value}).items():
        monkeypatch.setenv(each, text)
    code, out, err = run(capsys, "render", *rule, "--out", "x.png")
    assert code == 2 and out == "" and err.startswith(f"rewrite render: {name} is {value!r} in the environment, and")
    assert err.count("\n") == 1 and not Path("x.png").exists()
