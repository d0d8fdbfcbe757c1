"""``rewrite batch``: many edits from one description, told before the work where a line is wrong, and resumed."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS
from helpers import reference
from helpers.command_line import MINE, run, save_edit, square

import rewrite_core as rc
from rewrite_core.cli import generator as cli_generator
from rewrite_core.rewrites import calls
from rewrite_core.statistics import blocks, collection

BATCH = ("batch", "jobs.jsonl", *MINE, "--count", "40", "--out", "rules", "--quiet")


def describe(*lines, name="jobs.jsonl"):
    Path(name).write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def edits(*numbers):
    """Files of edits that differ."""
    for number in numbers:
        rc.Edit(copy=rc.Selection(number, square()), paste=rc.Selection(number + 1, square())).save(f"e{number}.json")
    return [f"e{number}.json" for number in numbers]


def summary(folder="rules"):
    return json.loads(Path(folder, "summary.json").read_text())["edits"]


def content(path):
    """All that is in a file: two of the same content may differ in the order of their header."""
    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["metadata"]), data[8 + size :]


def results(folder="rules"):
    return {path.name: content(path) for path in Path(folder).glob("*.safetensors")}


def told(capsys, *arguments):
    """:func:`run`, without warnings: the small generator's edits have as many unknowns as pixels."""
    code, out, err = run(capsys, *arguments)
    return code, out, "".join(line for line in err.splitlines(True) if not line.startswith("rewrite: warning: "))


def test_every_mix_of_a_line_is_what_rewrite_edit_makes(capsys, user_generator):
    names = edits(0, 1, 2)
    describe(
        {"edit": names, "layer": ["3", "5"], "rank": [1, 2], "region": "map", "loss": "l2"},
        "",
        {"edit": "e0.json", "layer": "3", "solver": "projected", "steps": 7, "project_every": 3},
        {"edit": "e0.json", "layer": "3", "erase": 3},
        {"edit": "e0.json", "layer": "3", "zero": True},
        {"edit": "e1.json", "layer": "3", "seed": 5},
    )
    code, out, err = told(capsys, *BATCH)
    assert err == "" and code == 0 and out.startswith("16 rewrites, and 0 that were there, ")
    assert out.endswith(" edits/s with statistics -> rules/summary.md\n")
    records = summary()
    assert [record["line"] for record in records] == 12 * [1] + [3, 4, 5, 6]
    assert len({record["file"] for record in records}) == 16 == len(results())
    for record in (records[0], records[7], *records[12:]):
        one = ["edit", record["edit"], "--layer", record["layer"], *MINE, "--count", 40, "--out", "one"]
        for name in ("rank", "region", "loss", "solver", "steps", "project-every", "erase", "seed"):
            if name in record:
                one += [f"--{name}", record[name]]
        assert run(capsys, *one, *(["--zero"] if record.get("zero") else []), "--quiet")[0] == 0
        assert content("one") == content(Path("rules", record["file"]))
        change = rc.Rewrite.load("one")
        assert record["after"] == (change.losses[-1] if change.losses else None)
        assert (record["solved by"], record["size"], record["error"]) == (change.solver, change.size, None)
    table = Path("rules", "summary.md").read_text().splitlines()
    assert len(table) == 18 and table[0].startswith("| line | layer | edit | rank |")
    assert all(line.count(" | ") == table[0].count(" | ") for line in table)


def test_nothing_is_done_twice_and_what_is_new_is_added(capsys, user_generator, monkeypatch):
    describe({"edit": edits(0, 1), "layer": "3"})
    assert run(capsys, *BATCH)[0] == 0
    before = results()
    stamps = {path: path.stat().st_mtime_ns for path in Path("rules").glob("*.safetensors")}
    solved = []
    solve = calls.solve
    with monkeypatch.context() as patched:
        patched.setattr("rewrite_core.cli.generator.subject", None)  # not even the generator is made
        code, out, _ = told(capsys, *BATCH)
        assert code == 0 and out == "0 rewrites, and 2 that were there -> rules/summary.md\n"
    monkeypatch.setattr(calls, "solve", lambda *args: solved.append(len(args[2])) or solve(*args))
    describe({"edit": edits(0, 1, 2), "layer": "3"})
    assert run(capsys, *BATCH)[0] == 0 and solved == [1]
    assert before.items() <= results().items() and len(results()) == 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    # what its result depends on is another one: the edit's file, the checkpoint's content
    save_edit("e0.json", context=[rc.Selection(3, square())])
    assert run(capsys, *BATCH)[0] == 0 and solved == [1, 1]
    torch.save({name: 1.5 * tensor for name, tensor in user_generator.state_dict().items()}, "weights.pt")
    assert run(capsys, *BATCH)[0] == 0 and solved == [1, 1, 3]
    # half a file, as from a disk that failed, is made again
    broken = Path("rules", summary()[0]["file"])
    whole = content(broken)
    broken.write_bytes(broken.read_bytes()[:-7])
    assert run(capsys, *BATCH)[0] == 0 and solved == [1, 1, 3, 1] and content(broken) == whole


def test_a_killed_run_goes_on_to_the_same_bits(capsys, user_generator, monkeypatch):
    describe({"edit": edits(*range(6)), "layer": ["3", "5"], "rank": [1, 2], "region": "map"})
    assert run(capsys, *BATCH)[0] == 0
    undisturbed = results()
    shutil.move("rules", "undisturbed")
    command = [sys.executable, PROGRAMS / "slow_batch.py", *BATCH]
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while len([*Path("rules").glob("*.safetensors")]) < 5:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    there = len(results())
    assert 5 <= there < 24
    solved = []
    solve = calls.solve
    monkeypatch.setattr(calls, "solve", lambda *args: solved.append(len(args[2])) or solve(*args))
    monkeypatch.setattr("rewrite_core.statistics.collection.run_to", None)  # the moments were finished
    code, out, _ = told(capsys, *BATCH)
    assert code == 0 and out.startswith(f"{24 - there} rewrites, and {there} that were there")
    assert sum(solved) == 24 - there and results() == undisturbed


def test_hundreds_of_edits_layers_and_generators_from_one_line(capsys, user_generator, monkeypatch):
    """The generators are tried before any work, of which one is kept; the layers of each are collected in one pass."""
    for number in (1, 2):
        torch.save({name: tensor / number for name, tensor in user_generator.state_dict().items()}, f"g{number}.pt")
    layers, checkpoints = ["3", "5"], ["g1.pt", "g2.pt"]
    describe({"edit": edits(*range(38)), "layer": layers, "checkpoint": checkpoints, "rank": [1, 2], "region": "map"})
    passes, made, factored = [], [], []
    collect, subject, factor = collection.collect_second_moments, cli_generator.subject, blocks.spd_factor
    monkeypatch.setattr(
        collection,
        "collect_second_moments",
        lambda on, *args, **more: passes.append(len(on)) or collect(on, *args, **more),
    )
    monkeypatch.setattr(cli_generator, "subject", lambda *args: made.append(args) or subject(*args))
    monkeypatch.setattr(blocks, "spd_factor", lambda *args, **more: factored.append(1) or factor(*args, **more))
    code, out, _ = told(capsys, *BATCH)
    assert code == 0 and out.startswith("304 rewrites, and 0 that were there")
    assert len(made) == 3 and passes == [2, 2] and len(factored) == 4
    records = summary()
    assert len({record["file"] for record in records}) == 304 == len(results())
    assert {(record["layer"], record["checkpoint"]) for record in records} == {*itertools.product(layers, checkpoints)}
    assert len(Path("rules", "summary.md").read_text().splitlines()) == 306
    code, out, _ = told(capsys, *BATCH)
    assert code == 0 and out.startswith("0 rewrites, and 304 that were there")


def test_two_runs_at_once_on_one_folder(capsys, user_generator):
    """Each result is there whole, whoever made it; both say that all went well."""
    describe({"edit": edits(*range(8)), "layer": ["3", "5"], "region": "map"})
    assert run(capsys, *BATCH)[0] == 0
    alone = results()
    shutil.move("rules", "alone")
    command = [sys.executable, PROGRAMS / "slow_batch.py", *BATCH, "--together", "1"]
    children = [
        subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [child.communicate(timeout=200)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert results() == alone and [record["error"] for record in summary()] == 16 * [None]
    counts = [re.fullmatch(r"(\d+) rewrites, and (\d+) that were there.*", out.strip()) for out in outputs]
    assert all(int(count[1]) + int(count[2]) == 16 for count in counts) and sum(int(count[1]) for count in counts) >= 16
    assert not [*Path("rules").glob(".*")]


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"x" + data[1:]])
def test_a_damaged_moment_is_collected_again(damage, capsys, user_generator):
    describe({"edit": edits(0), "layer": "3"})
    assert run(capsys, *BATCH)[0] == 0
    whole, (name,) = results(), Path("rules", "moments").iterdir()
    name.write_bytes(damage(name.read_bytes()))
    for result in Path("rules").glob("*.safetensors"):
        result.unlink()
    code, _, err = told(capsys, *BATCH)
    assert code == 0 and results() == whole, err


def test_an_interrupt_leaves_a_summary_and_says_how_to_go_on(capsys, user_generator, monkeypatch):
    describe({"edit": edits(0, 1), "layer": "3", "rank": [1, 2]})
    solve, calls_left = calls.solve, [1]

    def interrupted(*args):
        if not calls_left:
            raise KeyboardInterrupt
        calls_left.pop()
        return solve(*args)

    monkeypatch.setattr(calls, "solve", interrupted)
    code, _, err = told(capsys, *BATCH)
    assert code == 130 and err == "rewrite batch: interrupted; run the same command again to go on.\n"
    assert [record["error"] is None for record in summary()] == [True, False, True, False]
    assert summary()[1]["error"] == "not made yet; run the same command again."


def test_one_that_fails_does_not_stop_the_others(capsys, user_generator):
    names = edits(0, 1)
    rc.Edit(copy=rc.Selection(0, square())).save("bad.json")  # it marks no paste, which is seen when it is solved
    describe({"edit": [*names, "bad.json"], "layer": "3"}, {"edit": "e0.json", "layer": "3", "rank": 9})
    code, out, err = told(capsys, *BATCH)
    assert code == 2 and out.startswith("2 rewrites, and 0 that were there")
    assert err.startswith("rewrite batch: 2 of 4 edits failed, the first on line 1 (") and err.count("\n") == 1
    assert "rules/summary.json has all reasons." in err
    assert [record["error"] is None for record in summary()] == [True, True, False, False]
    assert "rank" in summary()[3]["error"].lower()
    code, _, err = told(capsys, *BATCH)  # they are tried again, and fail again
    assert code == 2 and "2 of 4 edits failed" in err


def test_several_generators_and_moments_of_ones_own(capsys, user_generator):
    with torch.no_grad():
        user_generator[1].weight.mul_(1.1)
    torch.save(user_generator.state_dict(), "other.pt")
    edits(0)
    collect = ("collect", "--layer", "3", "--count", "40", *MINE, "--quiet")
    assert run(capsys, *collect, "--out", "moment.safetensors")[0] == 0
    describe(
        {"edit": "e0.json", "layer": "3", "checkpoint": ["weights.pt", "other.pt"]},
        {"edit": "e0.json", "layer": "3", "moment": "moment.safetensors"},
    )
    assert run(capsys, *BATCH)[0] == 0
    changes = [rc.Rewrite.load(Path("rules", record["file"])) for record in summary()]
    assert torch.equal(changes[0].coefficients, changes[2].coefficients)
    assert not torch.equal(changes[0].coefficients, changes[1].coefficients)
    assert len([*Path("rules", "moments").iterdir()]) == 2
    describe({"edit": "e0.json", "layer": "3", "checkpoint": "other.pt", "moment": "moment.safetensors"})
    code, _, err = told(capsys, *BATCH)
    assert code == 2 and err.startswith("rewrite batch: Line 1: The second moment was collected with other weights")


GOOD = {"edit": "e0.json", "layer": "3"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, "{"], "Line 2: it cannot be read as JSON ("),
        ([GOOD, "", "[1]"], "Line 3: it is no JSON object such as"),
        ([GOOD, {}], "Line 2: it names no edit; give it one"),
        ([{"edit": "e0.json"}], "Line 1: it names no layer; give it one"),
        ([GOOD | {"rnak": 4}], "Line 1: there is no 'rnak'; did you mean 'rank'?"),
        ([GOOD | {"out": "x"}], "Line 1: there is no 'out'; "),
        ([GOOD | {"device": "cuda"}], "Line 1: there is no 'device'; "),
        ([GOOD | {"rank": 0}], "Line 1: argument --rank: '0' is not a whole number of 1 or more."),
        ([GOOD | {"rank": [1, "x"]}], "Line 1: argument --rank: 'x' is not"),
        ([GOOD | {"rank": []}], "Line 1: 'rank' is an empty list; "),
        ([GOOD | {"rank": {}}], "Line 1: 'rank': a dict is neither a text nor a number."),
        ([GOOD | {"zero": 1}], "Line 1: 'zero' is true or false."),
        ([GOOD | {"zero": True, "erase": 3}], "not allowed with"),
        ([GOOD | {"zero": True, "loss": "l2"}], "Line 1: --loss would change nothing, for --zero fits nothing"),
        ([GOOD | {"solver": "lm", "steps": 3}], "Line 1: The lm solver has no --steps; "),
        ([GOOD, GOOD], "Line 2: it asks for the same edit as line 1, or twice for one; ask once."),
        ([GOOD | {"rank": [2, 2]}], "Line 1: it asks for the same edit as line 1"),
        ([GOOD, GOOD | {"edit": "none.json"}], "Line 2: There is no edit none.json."),
        ([GOOD, GOOD | {"edit": "mine.py"}], "Line 2: mine.py: The edit cannot be read as JSON"),
        ([GOOD | {"edit": "--zero"}], "Line 1: '--zero' is no name of an edit here"),
        ([GOOD, GOOD | {"layer": "33"}], "Line 2: The generator has no layer '33'"),
        ([GOOD, GOOD | {"moment": "none"}], "Line 2: There is no file none."),
        ([GOOD, GOOD | {"moment": "e0.json"}], "Line 2: e0.json is truncated or not a safetensors file"),
        ([GOOD, GOOD | {"count": 1}], "Line 2: "),
        ([GOOD, GOOD | {"generator": "nowhere:make"}], "Line 2: "),
        ([GOOD, GOOD | {"checkpoint": "none"}], "Line 2: There is no file none."),
        ([""], "jobs.jsonl describes no edit; give it a line such as"),
        ([GOOD | {"rank": [*range(1, 400)], "steps": [*range(1, 400)], "solver": "adam"}], "more than 100000 edits"),
    ],
)
def test_a_wrong_line_is_told_before_any_work(lines, words, capsys, user_generator, monkeypatch):
    edits(0)
    describe(*lines)
    monkeypatch.setattr("rewrite_core.rewrites.calls.solve", None)
    monkeypatch.setattr("rewrite_core.statistics.collection.run_to", None)
    code, out, err = told(capsys, *BATCH)
    assert code == 2 and out == "" and words in err and err.startswith("rewrite batch: ") and err.count("\n") == 1, err
    assert not Path("rules", "summary.json").exists() and not results()


def test_where_results_cannot_go(capsys, user_generator):
    edits(0)
    describe(GOOD)
    code, _, err = told(capsys, *BATCH[:-3], "--out", "e0.json", "--quiet")
    assert code == 2 and err == "rewrite batch: e0.json is a file, and results go to a folder; name another.\n"
    code, _, err = run(capsys, "batch", "none", *BATCH[2:])
    assert code == 2 and err == "rewrite batch: There is no description none.\n"


@pytest.mark.parametrize("together", [1, 2, 16])
def test_how_many_are_fitted_together_changes_no_bit(together, capsys, user_generator):
    describe({"edit": edits(0, 1, 2), "layer": "3", "rank": 2, "region": "map"})
    assert run(capsys, *BATCH, "--together", together)[0] == 0
    one = ("edit", "e2.json", "--layer", "3", "--rank", "2", "--region", "map", *MINE, "--count", "40", "--out", "one")
    assert run(capsys, *one, "--quiet")[0] == 0
    assert content("one") == content(Path("rules", summary()[2]["file"]))


def test_every_edit_at_every_layer_in_python(generator, latents, edit):
    layers = [rc.bind(generator, name) for name in ("layer5.conv", "layer4.conv")]
    moments = rc.collect_second_moments(layers, latents[:60], progress=False)
    other = rc.Edit(copy=edit.copy, paste=edit.paste)
    found = reference.rewrite_many(layers, moments, [edit, other], latents, rank=2)
    assert [len(each) for each in found] == [2, 2]
    for layer, moment, changes in zip(layers, moments, found):
        for one, change in zip((edit, other), changes):
            alone = reference.rewrite(layer, moment, one, latents, rank=2)
            assert change.layer == layer.name and torch.equal(change.coefficients, alone.coefficients)
    for wrong in (moments[0], moments[:1], []):
        with pytest.raises(rc.ArgumentError, match="a list of as many"):
            reference.rewrite_many(layers, wrong, [edit], latents)
    with pytest.raises(rc.ArgumentError):
        reference.rewrite_many([], [], [edit], latents)
    with pytest.raises(rc.MismatchError):
        reference.rewrite_many(layers, moments[::-1], [edit], latents)
