"""``make gpu-check`` where there is no GPU: dry runs, the schedule on a clock that jumps, the library."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rewrite_core.benchmarks import lines
from rewrite_core.benchmarks.gpu import __main__ as command
from rewrite_core.benchmarks.gpu import host, plan, schedule, summary, tables
from rewrite_core.benchmarks.gpu.stages import (
    ALONE,
    HARM,
    SANITISED,
    STARTING,
    Case,
    Stage,
    all_stages,
    dry_stages,
    marked,
)

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


def gpu_check(*words, check=None, **how):
    """As from a shell: another process, which imports no torch."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **how,
    )
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


# --- without a GPU ---


@no_gpu
def test_without_a_gpu(tmp_path):
    done = gpu_check("--out", tmp_path / "out", check=2)
    assert done.stderr.count("\n") == 1 and "NVIDIA GPU" in done.stderr and not done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "many"], "--minutes"),
        (["--minutes", "0"], "--minutes must be a positive number"),
        (["--stages", "S0,S9"], "There is no stage S9: use S0, S1, S2, S3, S4"),
        (["--build"], "--build needs --system"),
    ],
)
def test_bad_arguments(words, said, tmp_path):
    done = gpu_check(*words, "--out", tmp_path / "out", check=2)
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = gpu_check("--dry-run", "--out", tmp_path / "file" / "out", check=2)
    assert done.stderr.count("\n") == 1 and "choose another folder" in done.stderr


def tool(folder, name, *body):
    """An executable script."""
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *body, ""]))
    path.chmod(0o755)
    return path


@no_gpu
def test_a_gpu_is_found_by_nvidia_smi_where_the_driver_is_silent(tmp_path, monkeypatch):
    assert host.find_gpu() is None
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed'", "exit 9")
    assert host.find_gpu() is None
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3'", "echo 'NVIDIA T4'")
    assert host.find_gpu() == "NVIDIA H100 80GB HBM3" and host.stem(host.find_gpu()) == "nvidia-h100-80gb-hbm3"
    tool(tmp_path, "nvidia-smi", "sleep 60")
    monkeypatch.setattr(host, "ASKING", 0.5)
    assert host.find_gpu() is None


def make(*words):
    """As from a shell, also where these tests were started by make."""
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "OUT", "VENV", "PYTHON", "TORCH", "TESTS", "SYSTEM"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@no_gpu
@needs_make
@pytest.mark.parametrize("system", [[], ["SYSTEM=1"]], ids=["venv", "system"])
def test_make_builds_nothing_without_a_gpu(system, tmp_path):
    """With a Python that has nothing installed, too."""
    python = tool(tmp_path, "python", f'exec {sys.executable} -S "$@"')
    library, venv = tmp_path / "library", tmp_path / "venv"
    made = (f"PYTHON={python}", f"VENV={venv}", f"SYSTEM_LIBRARY={library}", f"OUT={tmp_path}/out")
    done = make("gpu-check", *system, *made)
    assert "needs an NVIDIA GPU" in done.stderr and "Error 2" in done.stderr and done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


@needs_make
def test_what_make_runs():
    lines = make("-n", "gpu-check", "PYTHON=x", "VENV=v", "STAGES=S0,S1", "MINUTES=3").stdout.splitlines()
    assert lines[0] == "x -m benchmarks.gpu --look" and "pip install" not in lines[-1]
    assert lines[-1].startswith("v/bin/python -m benchmarks.gpu --out 'benchmarks/results'")
    assert "--minutes 3" in lines[-1] and "--stages 'S0,S1'" in lines[-1]
    (line,) = make("-n", "gpu-check", "SYSTEM=1", "PYTHON=x", "RESUME=a.jsonl", "OUT=o").stdout.splitlines()
    assert line.startswith("x -m benchmarks.gpu --system '.system' --out 'o'") and "--resume 'a.jsonl'" in line


@no_gpu
def test_what_this_python_lacks_and_a_torch_that_sees_no_gpu(tmp_path):
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA H200'")
    path = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    system = ("--system", tmp_path / "library", "--out", tmp_path / "out")
    done = gpu_check(*system, check=2, env=path)
    assert re.search(
        r"needs a torch that sees the NVIDIA H200, and torch \S+ \(CUDA \S+\) of \S+ does not\.", done.stderr
    )
    bare = tool(tmp_path, "python", f'exec {sys.executable} -S "$@"')
    words = [bare, "-m", "benchmarks.gpu", *map(str, system)]
    done = subprocess.run(words, cwd=ROOT, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and re.search(r"needs what \S+ lacks: torch, .*pytest\.\n", done.stderr), done.stderr
    assert not (tmp_path / "library").exists() and not (tmp_path / "out").exists()


# --- a dry run ---


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Every line of a dry run, and what it said."""
    out = tmp_path_factory.mktemp("dry")
    done = gpu_check("--dry-run", "--minutes", "5", "--out", out, check=1)
    assert sorted(path.name for path in out.iterdir()) == ["dry-run.jsonl", "dry-run.log"]
    return done.stdout, lines.read(out / "dry-run.jsonl"), out


def test_what_fails_hangs_and_crashes_costs_nothing_else(dry):
    _, found, _ = dry
    states = {(line["stage"], line["case"]): line["state"] for line in found}
    # one line each; where a worker was ended as it told of a case there are two, of which the later counts
    assert len(found) - len(states) <= 1
    assert set(states) == {(stage.name, case.name) for stage in dry_stages() for case in stage.cases}
    harmed = dict(zip(HARM, ["failed", "skipped", "timeout", *["crashed"] * 4, "ok", "crashed"]))
    for (stage, case), state in states.items():
        word = case.split()[0]
        if word in harmed:
            assert state == harmed[word], (stage, case, state)
        elif stage in ("D0", "D1", "D2", "D5"):
            assert state == "ok", (stage, case, state)
    assert [states["D4", name] for name in ("in time", "slow", "left")] == ["ok", "skipped", "skipped"]
    assert states["D3", "never"] == "failed"


def test_every_line_says_why(dry):
    said, found, _ = dry
    reasons = {
        line["case"]: line["reason"] for line in found if line["stage"] in ("D1", "D3", "D4") and "reason" in line
    }
    for name, words in {
        "raise 0": "RuntimeError: CUDA error: an illegal memory access was encountered (dry.py:",
        "refuse 1": "this machine lacks what it needs",
        "hang 2": "ended after 1 s without a result",
        "abort 3": "killed by SIGABRT",
        "segfault 4": "killed by SIGSEGV",
        "kill 5": "killed by SIGKILL",
        "exit 6": "exit status 3",
        "close 8": "it stopped telling what it does, and was ended",
        "never": "did not get to its first case: ModuleNotFoundError: No module named 'benchmarks.gpu.dry_missing'",
        "slow": schedule.OVER,
        "left": "no time was left for it",
    }.items():
        assert words in reasons[name], (name, reasons[name])
        assert f"{name}: " in said
    for line in found:
        assert {"stage", "case", "state", "seconds", "timestamp", "gpu", "sources", "run", "commit"} <= set(line)
        assert line["state"] in ("ok", *summary.BAD, "skipped") and line["seconds"] >= 0
        assert line["state"] == "ok" or line["reason"]
    assert found[0]["value"] == 1.5 and re.search(r"^D1: 11 ok, .*5 crashed", said, re.MULTILINE)


def test_no_process_is_left(dry):
    _, _, out = dry
    for _ in range(50):
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in path.read_bytes()]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"they still run: {left}")


def test_a_run_that_is_killed_leaves_its_lines_and_no_process(tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--stages", "D0,D4", "--out", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as run:
        path = tmp_path / "dry-run.jsonl"
        for _ in range(600):
            if path.exists() and any(line["case"] == "in time" for line in lines.read(path)):
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    assert [line["state"] for line in lines.read(path)] == ["ok", "ok"]
    test_no_process_is_left((None, None, tmp_path))


def test_a_second_run_does_what_is_missing(tmp_path):
    for known in (0, 1):
        done = gpu_check("--dry-run", "--stages", "D0,D5", "--out", tmp_path, check=0)
        assert done.stdout.count("1 of 1 are known") == 2 * known, done.stdout
    assert len(lines.read(tmp_path / "dry-run.jsonl")) == 2
    done = gpu_check(
        "--dry-run", "--out", tmp_path / "new", "--stages", "D0,D5", "--resume", tmp_path / "dry-run.jsonl"
    )
    assert done.stdout.count("1 of 1 are known") == 2 and len(lines.read(tmp_path / "new" / "dry-run.jsonl")) == 2


# --- the schedule, on a clock that jumps ---


class Slow(plan.Imagined):
    """Some cases take other times than expected: `seconds` by name."""

    def __init__(self, **seconds):
        super().__init__()
        self.seconds = seconds

    def start(self, stage, cases):
        return super().start(
            stage, [replace(case, expected=self.seconds.get(case.name, case.expected)) for case in cases]
        )


def run(stage, launcher, deadline=1e9, known=()):
    """The lines that no process wrote, and what was finished when."""
    told = []
    schedule.run_stage(stage, set(known), launcher, deadline, lambda *words: told.append(words))
    lost = {case for case, *_ in told}
    return told, {case: at for at, _, case in launcher.ends if case not in lost and at <= launcher.now()}


def stage_of(*groups, **how):
    cases = (tuple(Case(name, 10.0, 1.0) for name in group.split()) for group in groups)
    return Stage("T", "a test", "none", tuple(cases), starting=2.0, **how)


def test_groups_run_side_by_side_and_those_alone_last():
    told, ends = run(stage_of("a b c", "d", "e", "f", parallel=2, alone=1), Slow(d=3.0))
    assert not told and ends == {"a": 3.0, "b": 4.0, "c": 5.0, "d": 5.0, "e": 8.0, "f": 11.0}


def test_a_case_that_hangs_is_ended_at_its_limit_and_the_rest_go_on():
    told, ends = run(stage_of("a b c", seconds=100.0), Slow(b=1e6))
    assert told == [("b", "timeout", 10.0, "ended after 10 s without a result")]
    assert ends == {"a": 3.0, "c": 3.0 + 10.0 + 3.0}


def test_a_stage_ends_in_time_and_its_time_begins_with_the_first_case():
    launcher = Slow(b=9.0, d=9.0)
    told, ends = run(stage_of("a b c", "d e", seconds=5.0, parallel=2), launcher)
    assert launcher.now() == 2.0 + 5.0 and ends == {"a": 3.0}
    assert [(case, state) for case, state, *_ in told] == [(c, "skipped") for c in ("b", "c", "d", "e")]
    assert {reason for *_, reason in told} == {schedule.OVER, "no time was left for it"}


def test_a_deadline_comes_before_a_stages_own_time_and_leaves_what_is_reserved():
    for how, end in (({"seconds": 50.0}, 20.0), ({"reserved": 6.0}, 14.0)):
        launcher = Slow(b=9.9, c=9.9)
        told, _ = run(stage_of("a b c", **how), launcher, deadline=20.0)
        assert launcher.now() == end and told[-1][0] == "c"
    launcher = Slow()
    launcher.clock = 20.0
    told, ends = run(stage_of("a b"), launcher, deadline=20.0)
    assert [state for _, state, *_ in told] == ["skipped"] * 2 and not ends


def test_a_process_that_never_starts_is_given_up():
    told, _ = run(replace(stage_of("a b", seconds=9.0), starting=1e6), launcher := Slow())
    assert [(case, state) for case, state, *_ in told] == [("a", "failed"), ("b", "failed")]
    assert launcher.now() == STARTING and "did not get to its first case" in told[0][3]


def test_what_is_known_is_not_run_again():
    told, ends = run(stage_of("a b", "c", "d", parallel=3, alone=1), Slow(), known={"a", "c", "d"})
    assert not told and set(ends) == {"b"}
    launcher = Slow()
    assert run(stage_of("a b", "c"), launcher, known={"a", "b", "c"}) == ([], {}) and launcher.now() == 0.0


@pytest.mark.parametrize(("minutes", "built", "left_out"), [(5.0, 0.0, 13), (5.0, 120.0, 13), (10.0, 0.0, 0)])
def test_what_is_known_after_minutes(minutes, built, left_out):
    """On a machine with 16 cores. The whole run keeps to five minutes, and to seven with a build."""
    todo = all_stages(HERE, 16)
    table = plan.timetable(todo, 60 * minutes, built)
    known = {
        int(minute): dict(re.findall(r"(S\d) (\d+ of \d+)", words))
        for minute, words in re.findall(r"^after minute (\d+): (.*)$", table, re.MULTILINE)
    }
    assert set(known) == {3, 5, 10}
    whole = {stage.name: f"{len(stage.cases)} of {len(stage.cases)}" for stage in todo}
    if not built:
        assert all(known[3][name] == whole[name] for name in ("S0", "S1")), table
        assert int(known[3]["S2"].split()[0]) >= 24, table
    missing = sum(int(words.split()[2]) - int(words.split()[0]) for words in known[10].values())
    assert missing <= left_out, table
    ends = [int(end) for end in re.findall(r"s to +(\d+) s", table)]
    assert max(ends) <= 60 * minutes + built


def test_the_plan_is_printed():
    said = gpu_check("--plan", "--minutes", "10", "--cores", "16", check=0).stdout
    assert [line for line in said.splitlines() if line.startswith("after minute")] and "S4  compute-sanitizer" in said


# --- the stages ---


def test_the_stages():
    everything = {stage.name: stage for stage in all_stages(HERE, 16)}
    assert list(everything) == ["S0", "S1", "S2", "S3", "S4"]
    assert [everything[name].seconds for name in ("S0", "S1", "S2")] == [10.0, 40.0, 125.0]
    assert everything["S1"].parallel == len(everything["S1"].groups) == 4
    assert [name for name, stage in everything.items() if stage.tuning] == ["S2"]
    for stage in [*everything.values(), *dry_stages()]:
        names = [case.name for case in stage.cases]
        assert len(set(names)) == len(names)
    assert set(SANITISED.values()) <= {case.name for case in everything["S1"].cases}
    first = [case.arguments["of"] for case in everything["S2"].cases[:5]]
    assert set(first) == {"moment", "fit", "projected", "solve"}  # one of each target before any second
    channels = {case.arguments["channels"] for case in everything["S2"].cases if case.arguments["of"] == "moment"}
    assert channels == {64, 128, 256, 512, 1024, 2048}
    assert {case.arguments["n"] for case in everything["S2"].cases if case.arguments["of"] == "solve"} >= {
        64,
        512,
        2048,
    }


def test_every_test_that_needs_a_gpu_is_run():
    files = marked(HERE)
    texts = {name: (HERE / name).read_text() for name in files}
    for path in HERE.rglob("test_*.py"):
        if not path.name.startswith("test_gpu_") and re.search(r"pytest\.mark\.gpu", path.read_text()):
            assert path.relative_to(HERE).as_posix() in files
    assert files and Path(__file__).name not in files
    for name in ALONE:
        assert any(f"def {name}(" in text for text in texts.values()), name
    shards = [case for stage in all_stages(HERE, 4) if stage.name == "S3" for case in stage.cases]
    assert {file for case in shards for file in case.arguments["files"]} == set(files)


# --- what is given to processes, and the library ---


def test_no_home_is_needed(monkeypatch, tmp_path):
    for name in ("REWRITE_CORE_BACKEND", "TRITON_INTERPRET", "REWRITE_CORE_TUNING", "PYTEST_ADDOPTS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    everything = {stage.name: stage for stage in all_stages(HERE, 16)}
    for name, tuning in (("S1", "0"), ("S2", "1"), ("S3", "0")):
        given = host.environment(everything[name], Path("/library"), tmp_path)
        assert given["REWRITE_CORE_TUNING"] == tuning and given["PYTHONPATH"] == f"/library{os.pathsep}/some/where"
        assert not {"REWRITE_CORE_BACKEND", "TRITON_INTERPRET", "PYTEST_ADDOPTS"} & set(given)
        for cache in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH", "MPLCONFIGDIR"):
            assert Path(given[cache]).parent == tmp_path
    assert host.environment(everything["S1"], Path("/l"), tmp_path, interpreted=True)["TRITON_INTERPRET"] == "1"


def test_scratch_goes_elsewhere_where_the_checkout_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "build").write_text("no folder")
    monkeypatch.setattr(host, "CHECKOUT", tmp_path)
    with host.scratch() as folder:
        assert folder.is_dir() and tmp_path not in folder.parents
    assert not folder.exists()


def sources(folder):
    """A small checkout."""
    for name in (
        *host.FILES,
        "kernels/a.py",
        "csrc/a.cpp",
        "benchmarks/a.npz",
        "benchmarks/results/b.jsonl",
        "tests/t.py",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "rewrite_core").mkdir()
    (folder / "rewrite_core" / "kernels").symlink_to("../kernels")
    return folder


def test_the_digest_is_of_what_is_built(tmp_path):
    folder = sources(tmp_path)
    before = host.digest(host.PACKED, folder), host.digest((*host.PACKED, "tests"), folder)
    (folder / "benchmarks" / "results" / "b.jsonl").write_text("more")
    assert host.digest(host.PACKED, folder) == before[0]
    (folder / "tests" / "t.py").write_text("more")
    assert host.digest(host.PACKED, folder) == before[0] and host.digest((*host.PACKED, "tests"), folder) != before[1]
    for name in ("kernels/a.py", "csrc/a.cpp", "benchmarks/a.npz", "setup.py"):
        (folder / name).write_text("other")
        after = host.digest(host.PACKED, folder)
        assert after != before[0]
        before = after, None


def test_a_library_is_used_where_it_fits(tmp_path, monkeypatch):
    library = tmp_path / "library"
    assert host.misfit(library) == "there is none"
    (library / "rewrite_core").mkdir(parents=True)

    def stamp(**other):
        given = {"sources": host.digest(host.PACKED), "python": sys.implementation.cache_tag, "commit": "abc", **other}
        (library / host.STAMP).write_text(json.dumps(given))

    stamp(sources="others")
    assert "other sources" in host.misfit(library)
    stamp(python="cpython-39")
    assert "built for cpython-39, and this is cpython-" in host.misfit(library)
    stamp()
    assert "no compiled part" in host.misfit(library)
    compiled = library / "rewrite_core" / "_C.some.so"
    compiled.write_bytes(b"\x7fELF of another machine")
    assert "does not load here" in host.misfit(library)
    (built,) = (ROOT / "rewrite_core").glob("_C.*.so")
    shutil.copy(built, compiled)
    assert host.misfit(library) is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git: the commit is that of the library
    assert host.commit(library) == "abc"
    host.write_stamp(library)
    assert host.commit(library) == "abc" and host.misfit(library) is None
    (library / host.STAMP).write_text("cut off {")
    assert host.commit(library) is None


def test_a_build_that_fails_leaves_the_library_as_it_was(tmp_path, monkeypatch):
    library, log = tmp_path / "library", tmp_path / "log"
    library.mkdir()
    (library / "old").touch()
    commands = []

    def fails(command, folder, environment, log, timeout):
        commands.append(command)
        Path(command[command.index("--target") + 1]).mkdir()
        return "exit status 1"

    monkeypatch.setattr(host, "run", fails)
    assert host.build(library, log) == "exit status 1"
    assert (library / "old").exists() and not list(tmp_path.glob("*.partial"))
    assert {"--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"} <= set(commands[0])

    def works(command, *rest):
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setattr(host, "run", works)
    assert host.build(library, log) is None and not (library / "old").exists()
    assert json.loads((library / host.STAMP).read_text())["sources"] == host.digest(host.PACKED)


def test_the_package_holds_kernels_benchmarks_and_goals(tmp_path):
    """Links become folders."""
    words = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("kernels/tuning.py", "benchmarks/lines.py", "benchmarks/gpu/worker.py", "benchmarks/gpu/goals.npz"):
        path = tmp_path / "rewrite_core" / name
        assert path.is_file() and not any(part.is_symlink() for part in (path, *path.parents)), name


# --- earlier runs, and what is told ---


def test_what_earlier_runs_found_counts(tmp_path):
    """With the same sources on such a GPU, and where it is right: other files' lines are taken over once."""
    own, other, common = tmp_path / "own.jsonl", tmp_path / "other.jsonl", {"gpu": "G", "sources": "s"}
    for case, state, change in (
        ("a", "ok", {}),
        ("b", "wrong", {}),
        ("c", "ok", {"gpu": "H"}),
        ("d", "ok", {"sources": "t"}),
        ("e", "ok", {}),
        ("f", "failed", {}),
    ):
        lines.append(other, common | {"stage": "S1", "case": case, "state": state} | change)
    for case, state in (("a", "failed"), ("e", "ok"), ("f", "ok"), ("f", "skipped"), ("g", "skipped"), ("g", "ok")):
        lines.append(own, common | {"stage": "S1", "case": case, "state": state, "run": "here"})
    for _ in range(2):
        command.carry_on(own, [other, own, tmp_path / "none"], common)
        found = {line["case"]: (line["state"], line.get("run")) for line in summary.latest(own, common)}
        assert found == {"a": ("ok", None), "e": ("ok", "here"), "f": ("ok", "here"), "g": ("ok", "here")}
        assert len(lines.read(own)) == 7


def test_the_table():
    times = {"p50": 1e-3, "error": 1e-7, "part": 1.0, "wall": {"p50": 2e-3}}
    timed = {
        "stage": "S2", "case": "a fit", "state": "ok", "best_stock": "stock", "ratio": 3.0,
        "contenders": {"rewrite_core": times, "stock": times | {"p50": 3e-3, "part": 0.5, "wall": {"p50": 3e-3}}},
        "details": {"floor_seconds": 2.5e-4}, "kernels": [{"name": "k", "spills": 7}],
    }  # fmt: skip
    found = [
        {"stage": "S0", "case": "copy bandwidth", "state": "ok", "rate": 4.3e12, "unit": "bytes/s"},
        {"stage": "S1", "case": "bad", "state": "wrong", "reason": "because"},
        timed,
        {"stage": "S2", "case": "half", "state": "ok", "contenders": {"rewrite_core": {}}, "details": {}},
    ]
    text = "\n".join(summary.table(found))
    assert "S1: 1 wrong" in text and "wrong   bad: because" in text and "copy bandwidth: 4.3e+12 bytes/s" in text
    assert re.search(r"a fit +1 ms +2 ms +3 +3 +0\.25 +1\.0e-07", text) and "spills: a fit: k 7" in text
    skipped = {"stage": "S2", "case": "late", "state": "skipped"}
    assert summary.status(found) == 1 and summary.status([timed, skipped]) == 0
    assert summary.status([]) == 1 and summary.status([skipped]) == 1


# --- the table of the docs ---


def timed(case, run="1", sources="a", ours=2e-3, stock=1e-3, state="ok", **more):
    contenders = {
        "rewrite_core": {"p50": ours, "wall": {"p50": 2 * ours}, "timed_by": "replays of a graph", "aside": False},
        "stock": {"p50": stock, "wall": {"p50": stock}, "part": 0.5, "timed_by": "events", "aside": False},
        "bare": {"p50": stock / 4, "wall": {"p50": stock}, "timed_by": "events", "aside": True},
    }
    contenders["rewrite_core"]["error"] = 1e-7
    common = {"stage": "S2", "case": case, "run": run, "sources": sources, "state": state, "gpu": "G"}
    common |= {"torch": "2", "triton": "3", "best_stock": "stock", "ratio": 2 * stock / ours, "contenders": contenders}
    return {**common, "details": {"floor_seconds": ours / 4}, **more}


def test_a_table_of_lines():
    rate = {**timed("rate tf32"), "stage": "S0", "rate": 4e14, "unit": "operations/s"}
    crashed = {**timed("solve 2 of n 64, 8", "2", "b", state="crashed"), "reason": "killed | by", "contenders": {}}
    found = tables.markdown(
        [
            rate,
            timed("collect it, batch 32"),
            timed("collect it, batch 32", "2", "b", ours=4e-3),
            timed("fit x, 1 edit"),
            crashed,
            {**timed("fit x, 1 edit", "2", "b"), "state": "skipped"},
        ]
    )
    assert "sources `b` (rows with \\*: earlier sources, run of 1)" in found and "tf32 400 Top/s" in found
    collect = "| collect it, batch 32 | 4 ms | 8 ms | about 2 ms (stock); 250 us (bare) | 0.5 | 0.25 | 25 % | 1.0e-07 |"
    assert collect in found.splitlines()
    assert "| fit x, 1 edit \\* | 2 ms | 4 ms | about 2 ms (stock); 250 us (bare) | 1 | 0.5 | 25 % | 1.0e-07 |" in found
    assert "| solve 2 of n 64, 8 | crashed: killed / by | - |" in found
    assert "- S2 `solve 2 of n 64, 8`: crashed" in found
    assert "| collection: times the bare forward pass | at most 1.05 | 16 |" in found
    assert "| fit of one edit: ms | below 1 | 2 |" in found


def test_every_goal_is_of_some_case():
    cases = [case.name for stage in all_stages(HERE, 16) if stage.name == "S2" for case in stage.cases]
    for what, _, which, _ in tables.ASKED:
        assert any(re.match(which, name) for name in cases), what


def test_the_table_is_put_into_a_page(tmp_path, capsys):
    path, page = tmp_path / "g.jsonl", tmp_path / "page.md"
    assert command.main(["--table", str(path)]) == 2
    path.write_text("{}\n")
    assert command.main(["--table", str(path)]) == 2
    lines.append(path, timed("fit x, 1 edit"))
    page.write_text("no place\n")
    assert command.main(["--table", str(path), "--into", str(page)]) == 2 and page.read_text() == "no place\n"
    assert capsys.readouterr().err.count(".\n") == 3
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    for _ in range(2):
        assert command.main(["--table", str(path), "--into", str(page)]) == 0
    table = tables.markdown(lines.read(path))
    assert page.read_text() == f"before\n{tables.BEGIN}\n{table}\n{tables.END}\nafter\n"
    assert command.main(["--table", str(path)]) == 0 and capsys.readouterr().out == table + "\n"


def test_the_docs_have_the_table_of_the_results():
    """If not: python -m benchmarks.gpu --table benchmarks/results/nvidia-h200.jsonl --into docs/gpu.md"""
    table = tables.markdown(lines.read(ROOT / "benchmarks" / "results" / "nvidia-h200.jsonl"))
    assert f"{tables.BEGIN}\n{table}\n{tables.END}" in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
