"""The benchmarks run, write what they promise, and refuse to time what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rewrite_core
from rewrite_core import backends
from rewrite_core.benchmarks import harness, large, lines, neighbour, report, runner
from rewrite_core.version import source_digest

OPS = {"second-moment": "second_moment", "solve": "solve", "edit": "edit", "collect": "collect"}
CASES = {"second-moment": 2, "solve": 4, "edit": 7, "collect": 3}  # of a quick run
TIMES = {
    "p20": float,
    "p50": float,
    "p80": float,
    "rounds": int,
    "gflops": float,
    "error": float,
    "paired": float,
    "part": float,
    "aside": bool,
}
SCHEMA = {
    **TIMES,
    "schema": int,
    "timestamp": str,
    "machine": str,
    "cpu": str,
    "cores": int,
    "isa": (str, type(None)),
    "threads": int,
    "load": float,
    "python": str,
    "torch": str,
    "rewrite_core": str,
    "commit": (str, type(None)),
    "op": str,
    "case": str,
    "group": str,
    "quick": bool,
    "backend": str,
    "shapes": dict,
    "dtype": str,
    "details": dict,
    "stages": dict,
    "tests": str,
    "operations": (int, float),
    "bytes": (int, float),
    "gbytes_per_second": float,
    "error_kind": str,
    "tolerance": float,
    "best_stock": str,
    "ratio": float,
    "contenders": dict,
    "yardstick": (dict, type(None)),
    "per_second": (dict, type(None)),
}


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def test_quick_run(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert runner.main(["all"], tmp_path / "results", True) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    records = lines_of(tmp_path / "results")
    assert [record["op"] for record in records] == [op for name, op in OPS.items() for _ in range(CASES[name])]
    clicks = [record for record in records if record["case"].startswith("click")]
    assert len(clicks) == 2  # one of them in a warm session
    click = clicks[0]
    assert {"generator", "check", "directions", "goal", "fit", "apply"} <= set(click["stages"])
    assert re.search(r"of ours: .*fit [\d.]+ m?s \(\d+%\)", output)
    rates = [record["per_second"] for record in records if record["per_second"]]
    assert [(rate["what"], rate["together"]) for rate in rates] == [("edits", 2), ("edits", 3)]
    assert len(re.findall(r"edits a second: rewrite_core [\d.e+]+, ", output)) == 2
    for record in records:
        if record["per_second"]:
            made = record["per_second"]["together"] / record["p50"]
            assert record["per_second"]["rewrite_core"] == pytest.approx(made)
        assert set(record) == set(SCHEMA)
        assert all(isinstance(record[key], kind) for key, kind in SCHEMA.items()), record
        assert record["quick"] and record["tests"] == "not run" and record["error"] <= record["tolerance"]
        assert 0 < record["p20"] <= record["p50"] <= record["p80"]
        contenders = record["contenders"]
        assert len(contenders) >= 2 and all(set(times) == set(TIMES) for times in contenders.values())
        stock = {
            t["p50"] / t["part"]: name for name, t in contenders.items() if name != "rewrite_core" and not t["aside"]
        }
        rivals = {time: name for time, name in stock.items() if contenders[name]["part"] == 1} or stock
        able = {time: name for time, name in rivals.items() if contenders[name]["error"] <= record["tolerance"]}
        best = able or rivals  # where no other does the job, what it does is named all the same
        assert record["best_stock"] == best[min(best)]
        assert record["ratio"] == pytest.approx(min(best) / record["p50"])
        assert record["backend"] in backends.ORDER
        assert f"{record['op']}: {record['case']} ({record['backend']})" in output
    for op in OPS.values():
        assert re.search(f"{op}(, grid)?: the best stock expression", output)
        (picture,) = (tmp_path / "results").glob(f"*.quick.{op}.png")
        assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    # nothing is left behind, and a second run only appends
    (path,) = (tmp_path / "results").glob("*.jsonl")
    assert len(list(path.parent.iterdir())) == 5
    before = path.read_bytes()
    assert runner.main(["second-moment"], path.parent, True) == 0
    assert path.read_bytes().startswith(before) and len(lines_of(path.parent)) == len(records) + 2


def test_under_pytest(tmp_path, capsys, monkeypatch):
    """``pytest benchmarks/`` from a checkout; in this process, to be spared another import of torch."""
    pytest.importorskip("pytest_benchmark")
    folder = report.checkout()
    if folder is None or not (folder / "benchmarks").is_dir():
        pytest.skip("no checkout here")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a worker times nothing, and this is one of its tests
    threads = torch.get_num_threads()
    suite = folder / "benchmarks" / "bench_second_moment.py"
    try:
        status = pytest.main([str(suite), "--quick", "-q", "--out", str(tmp_path / "out")])
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert status == 0, output
    assert "2 passed" in output and "bmm on NCHW" in output and "bench_second_moment[" in output
    assert [record["op"] for record in lines_of(tmp_path / "out")] == ["second_moment"] * 2


def wrong_second_moment(right):
    return lambda features, out: (right(features, out), out.mul_(1 + 1e-5))


def nan_second_moment(right):
    return lambda features, out: out.fill_(torch.nan)


def wrong_spd_solve(right):
    return right._replace(
        solve=lambda *args: right.solve(*args) * 1.001,
        direct=lambda *args: right.direct(*args) * 1.001,
        at_once=lambda *args: NotImplemented,
    )


def wrong_fit_low_rank(right):
    def wrong(*args):
        coefficients, *rest = right(*args)
        return (coefficients * 1.2, *rest)  # and still reports the loss of the right ones

    return wrong


def failing_fit_low_rank(right):
    def wrong(*args):
        raise RuntimeError("out of luck")

    return wrong


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("second-moment", wrong_second_moment),
        ("second-moment", nan_second_moment),
        ("collect", wrong_second_moment),
        ("solve", wrong_spd_solve),
        ("edit", wrong_fit_low_rank),
        ("edit", failing_fit_low_rank),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_wrong_kernel_is_refused(name, wrong, tmp_path, monkeypatch, capsys):
    op = getattr(runner.suite(name), "KERNEL", OPS[name])
    chosen = next(choice.backend for choice in backends.explain().choices if choice.op == op)
    record = next(record for record in backends.backends_of(op) if record.name == chosen)
    right = record.load()
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda path: wrong(right) if path == record.target else load(path))
    assert runner.main([name], tmp_path, True) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and OPS[name] in captured.err and "case" in captured.err.lower()
    assert lines_of(tmp_path) == [] and "rewrite_core   " not in captured.out


def test_backend_that_cannot_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REWRITE_CORE_BACKEND", "cuda")
    assert runner.main(["solve"], tmp_path, True) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "solve" in error and "REWRITE_CORE_BACKEND" in error


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout whose tests one can write."""
    folder = tmp_path / "checkout"
    (folder / "tests").mkdir(parents=True)
    monkeypatch.setattr(report, "checkout", lambda: folder)
    return folder


def test_failing_tests_refuse(project, tmp_path, capsys):
    (project / "tests/test_second_moment.py").write_text("def test_sums():\n    assert False\n")
    assert runner.main(["second-moment"], tmp_path / "out", False) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "test_sums" in captured.err
    assert lines_of(tmp_path / "out") == [] and "GFLOP/s" in captured.out


def test_untested_op_is_refused(project, tmp_path, capsys):
    assert runner.main(["solve"], tmp_path / "out", False) == 1
    assert "no tests/test_spd_solve.py" in capsys.readouterr().err


def test_tests_meet_the_library_that_is_measured(project):
    (project / "tests/test_second_moment.py").write_text(
        "from importlib.util import find_spec\n"
        f"def test_it():\n    assert find_spec('rewrite_core').origin == {rewrite_core.__file__!r}\n"
    )
    (project / "rewrite_core").mkdir()  # an unbuilt tree, as in a checkout
    (project / "rewrite_core/__init__.py").write_text("")
    assert runner.run_tests("second_moment") == "passed"


@pytest.mark.parametrize("names", [["second-moments"], []])
def test_unknown_names(names, tmp_path, capsys):
    assert runner.main(names, tmp_path / "out", True) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "second-moment, solve, edit, collect" in error
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert runner.main(["all"], tmp_path / "file" / "out", True) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_append_keeps_history_and_closes_a_cut_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines.append(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "cut')
    lines.append(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 2, "cut\n{"a": 3}\n'
    assert lines.read(path) == [{"a": 1}, {"a": 3}]
    lines.append(path, {"contenders": {"failed": {"error": math.inf, "times": (1.0, math.nan)}}})
    assert lines.read(path)[-1] == {"contenders": {"failed": {"error": None, "times": [1.0, None]}}}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "intel-xeon-platinum-8488c"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654-96-core"),
        ("../../etc", "etc"),
        ("", "unknown"),
    ],
)
def test_machine_name(model, name, monkeypatch):
    monkeypatch.setattr(report, "cpu_name", lambda: model)
    assert report.machine_name() == name


def test_contenders_take_turns():
    calls = []

    def contender(name, rounds=None):
        return harness.Contender(name, lambda: calls.append(name), lambda: calls.append(f"({name})"), rounds)

    problem = harness.Problem(
        ours=contender("ours"),
        stock=[contender("a"), contender("b", rounds=1)],
        shapes={},
        dtype="",
        operations=1.0,
        traffic=1.0,
        error=lambda result: 0.0,
        error_kind="",
        tolerance=0.0,
    )
    race = harness.Race(problem)
    assert race.plan(quick=True) == 21
    assert calls == ["(ours)", "ours", "(a)", "a"]  # b is slow: it is not warmed up
    calls.clear()
    for _ in range(3):
        race.others()
        race.ours()
    assert calls == [*("(a) a (b) b (ours) ours " + "(a) a (ours) ours " * 2).split()]
    assert {name: len(times) for name, times in race.times.items()} == {"ours": 3, "a": 3, "b": 1}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_only_named_for_the_library_that_was_built_from_it(monkeypatch, tmp_path):
    folder = report.checkout()
    copy = tmp_path / "copy"
    for name in ("csrc", "rewrite_core"):  # the links in it as the folders they name
        shutil.copytree(folder / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(folder / "CMakeLists.txt", copy)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(copy), *words], check=True)
    built = source_digest(copy)
    assert built == source_digest(folder) and len(backends.extension().source()) == len(built)
    monkeypatch.setattr(report, "checkout", lambda: copy)
    monkeypatch.setattr(report, "extension", lambda: SimpleNamespace(source=lambda: built))
    assert len(report.commit()) == 40
    with (copy / "csrc" / "common.h").open("a") as file:
        file.write("// changed after the build\n")
    assert report.commit() is None
    shutil.copy(folder / "csrc" / "common.h", copy / "csrc")
    (copy / "rewrite_core" / "kernels" / "__init__.py").write_text('"""Another."""')
    assert report.commit() is None


def test_only_some_cases(tmp_path, capsys):
    """By words of their names; edits per second are said of those that make edits."""
    assert runner.main(["edit"], tmp_path, True, "edits of StyleGAN2") == 0
    told = capsys.readouterr().out
    (path,) = tmp_path.glob("*.jsonl")
    (record,) = map(json.loads, path.read_text().splitlines())
    assert "edits of StyleGAN2" in record["case"] and "a second" in told
    assert runner.main(["edit"], tmp_path, True, "no such case") == 2
    assert capsys.readouterr().err == "No case has 'no such case' in its name; leave --only out to see all.\n"


def test_large_generators_in_small(tmp_path, capsys):
    """Each in a process of its own; those of packages that are not installed are left out, and that is said."""
    assert runner.main(["large"], tmp_path, True) == 0
    out = capsys.readouterr().out
    records = {record["generator"]: record for record in lines_of(tmp_path)}
    assert "stylegan2-1024" in records
    for name in large.LARGE.keys() - records.keys():
        assert f"{name} is left out: ModuleNotFoundError" in out
    for name, record in records.items():
        assert f"{name}: " in out and record["tiny"] and record["losses"][1] < record["losses"][0]
        assert tuple(record["steps"]) == large.STEPS
        for step in record["steps"].values():
            assert step["seconds"] > 0 and step["peak"] >= 0
        assert record["weight_bytes"] == math.prod(record["weight"]) * (2 if record["dtype"] == "torch.bfloat16" else 4)


def test_a_step_is_measured_at_its_peak():
    """Some megabytes that are there in between, and a few that stay."""

    def run():
        between = torch.ones(40 << 20, dtype=torch.uint8)
        return between[: 10 << 20].clone()

    found, kept = large.measured(run)
    assert 49 << 20 <= found["peak"] < 60 << 20 and 10 << 20 <= found["kept"] < 20 << 20 and len(kept) == 10 << 20


def test_beside_a_busy_neighbour(capsys, monkeypatch):
    words = ["neighbour", "solve", "second-moment", "--quick", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", words)
    neighbour.begin()
    out = capsys.readouterr().out
    assert out.count("-> ") == 2 * (CASES["second-moment"] + CASES["solve"])
    assert re.search(r"^second-moment: kept [\d.]+, geometric mean over 2 cases", out, re.MULTILINE)


def test_a_bench_beside_a_busy_neighbour(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(neighbour, "SUITES", ("solve",))
    assert runner.main(["neighbour"], tmp_path, quick=True) == 0
    (path,) = tmp_path.glob("*.neighbour.quick.jsonl")
    records = lines.read(path)
    assert len(records) == CASES["solve"] and f"-> {path}" in capsys.readouterr().out
    for record in records:
        best, quiet, busy = record["best_stock"], record["quiet"], record["busy"]
        assert best != "rewrite_core" and quiet[best] == min(quiet[name] for name in quiet if name != "rewrite_core")
        ratios = quiet[best] / quiet["rewrite_core"], busy[best] / busy["rewrite_core"]
        assert record["kept"] == pytest.approx(ratios[1] / ratios[0])


def test_whoever_does_a_part_is_compared_with_where_nobody_does_all():
    def problem(*stock):
        ours = harness.Contender("rewrite_core", lambda: None)
        return harness.Problem(ours, stock, {}, "float64", 1.0, 1.0, lambda result: 0.0, "none", 1.0)

    whole, part, aside = (harness.Contender(*given) for given in (("whole", int), ("part", int), ("aside", int)))
    part, aside = dataclasses.replace(part, part=0.1, rounds=3), dataclasses.replace(aside, aside=True)
    assert [each.name for each in harness.rivals(problem(aside, part, whole))] == ["whole"]
    assert [each.name for each in harness.rivals(problem(aside, part))] == ["part"]
    quiet, busy, best = neighbour.compare(problem(aside, part), 0.01)
    assert best == "part" and set(quiet) == set(busy) == {"rewrite_core", "part"}


def test_the_neighbour_ends_with_what_it_disturbs():
    with pytest.raises(KeyboardInterrupt), neighbour.beside() as process:
        assert process.poll() is None
        raise KeyboardInterrupt
    assert process.poll() is not None
