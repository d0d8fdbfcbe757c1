"""What can be said of ``make gpu-check`` where there is no GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rewrite_core as rc
from rewrite_core.benchmarks import bench_collect, gpu_check, gpu_edit, harness

FLOORS = gpu_check.Floors(4e12, {"tf32": 4e14, "bfloat16": 8e14})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "NVIDIA GPU" in said.err and not said.out
    assert not (tmp_path / "out").exists()


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--minutes", "many"])
    assert stopped.value.code == 2 and "--minutes" in capsys.readouterr().err


def test_cases_cover_the_grid():
    cases = gpu_check.cases(FLOORS)
    assert len({case.name for case in cases}) == len(cases) == 3 * 6 * 7
    assert {case.group for case in cases} == {"gpu float32", "gpu tf32", "gpu bfloat16"}
    for channels in gpu_check.CHANNELS:
        for side in gpu_check.SIDES:
            batch = gpu_check.batch_of(channels, side)
            assert 1 <= batch <= 8 and batch * channels * side**2 <= max(gpu_check.MOST, channels * side**2)
    assert gpu_check.batch_of(64, 4) == 8 and gpu_check.batch_of(2048, 256) == 2


def test_floors():
    x3, tf32, half = gpu_check.KINDS
    assert FLOORS.seconds(x3, 4e12, 4e6) == pytest.approx(3e-2)  # three products
    assert FLOORS.seconds(tf32, 4e12, 4e6) == pytest.approx(1e-2)
    assert FLOORS.seconds(half, 4e12, 4e11) == pytest.approx(1e-1)  # bytes


@pytest.mark.parametrize("kind", [gpu_check.KINDS[0], gpu_check.KINDS[2]], ids=lambda kind: kind.name)
def test_a_case_on_the_cpu(kind):
    """The same code with ours on another backend: every contender does the job, and its record is whole."""
    before = torch.backends.cuda.matmul.allow_tf32
    case = harness.Case("small", lambda backend: gpu_check.make(24, 5, kind, FLOORS, "cpu", backend), "gpu")
    try:
        checked = gpu_check.check(case, kind, "cpp", "passed")
        assert torch.backends.cuda.matmul.allow_tf32 == kind.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert checked.errors["rewrite_core"] <= 2e-6 and max(checked.errors.values()) <= kind.rivals
    race = harness.Race(checked.problem)
    race.run(True)
    record = harness.measurement("second_moment", checked, race, False)
    assert record["details"]["floor_seconds"] > 0 and record["ratio"] > 0 and len(record["contenders"]) == 4
    assert record["shapes"] == {"features": [8, 24, 5, 5]}


def test_a_collection_on_the_cpu():
    """The same code on another device: its error, its floor and what it takes beyond the bare pass."""
    make = functools.partial(
        gpu_check.make_collection, "convs.1.conv", FLOORS, "cpu", 2, build=bench_collect.small_stylegan2, size=32
    )
    case = harness.Case("small", lambda backend: make(backend), "gpu collect")
    checked = gpu_check.check(case, gpu_check.KINDS[0], "cpp", "passed")
    assert checked.errors["rewrite_core"] <= 2e-6 and checked.errors["bare forward pass"] == 1
    race = harness.Race(checked.problem)
    race.run(True)
    times = race.times["bare forward pass"]
    race.times["rewrite_core"] = [1.25 * time for time in times]
    assert gpu_check.overhead(race) == pytest.approx(0.25)
    record = harness.measurement("collect", checked, race, False)
    assert record["details"]["floor_seconds"] > 0 and record["shapes"]["latents"] == [16, 32]
    names = [case.name for case in gpu_check.collection_cases(FLOORS)]
    assert names == ["stylegan2_256 convs.6.conv batch 32 gpu", "stylegan2_256 convs.11.conv batch 32 gpu"]
    channels = [rc.bind(bench_collect.stylegan2_256(), name).in_channels for name in gpu_check.COLLECTED]
    assert channels == [512, 128]


def test_what_is_wrong_is_refused(monkeypatch):
    kind = gpu_check.KINDS[0]
    right = gpu_check.second_moment
    monkeypatch.setattr(
        gpu_check, "second_moment", lambda *args, out, **how: right(*args, out=out, **how).mul_(1.00001)
    )
    case = harness.Case("small", lambda backend: gpu_check.make(24, 5, kind, FLOORS, "cpu", backend))
    with pytest.raises(harness.Refused, match="'small'.*1.00e-05, above 2e-06"):
        gpu_check.check(case, kind, "cpp", "passed")


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
ROOT = Path(__file__).resolve().parent.parent


def make(*words):
    """As from a shell, also where these tests were started by make."""
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "OUT", "VENV", "PYTHON", "TORCH", "TESTS"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@needs_make
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_line_of_the_makefile(tmp_path):
    """From the checkout, whose own rewrite_core/ has neither benchmarks nor a compiled extension."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    done = make("-o", f"{tmp_path}/.installed", f"VENV={tmp_path}", f"OUT={tmp_path}/out", "gpu-check")
    assert "needs an NVIDIA GPU and a torch that sees it" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "Error 2" in done.stderr


@needs_make
def test_with_what_the_system_has_nothing_is_downloaded(tmp_path):
    lines = make("-n", "-B", "gpu-check", "SYSTEM=1", "PYTHON=somewhere/python").stdout.splitlines()
    (install,) = (line for line in lines if "-m pip install" in line)
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(install.split())
    assert not any("venv" in line for line in lines)
    assert lines[-1].startswith("somewhere/python") and "--out 'benchmarks/results'" in lines[-1]
    bare = tmp_path / "python"  # has nothing installed
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    done = make("-B", "gpu-check", "SYSTEM=1", f"PYTHON={bare}", f"SYSTEM_LIBRARY={tmp_path}/library")
    assert re.match(r"make gpu-check SYSTEM=1 needs what .* lacks: torch, .*pybind11.*\.\n", done.stderr), done.stderr
    assert done.returncode and not (tmp_path / "library").exists()


def write_tests(folder, body):
    (folder / "tests").mkdir(exist_ok=True)
    file, *others = (folder / "tests" / name for name in gpu_check.TESTED)
    for other in others:
        other.write_text("")
    file.write_text(f"def test_it():\n    {body}\n")
    return file.name


def test_failing_skipped_and_slow_tests_are_told_apart(tmp_path, capsys):
    log, everything = tmp_path / "log", set(gpu_check.TESTED)
    for body, said, wrong in (
        ("assert True", None, set()),
        ("assert False", r"FAILED.*test_it.*log\)", None),
        ("import pytest; pytest.skip('no GPU')", "skipped", everything),
        ("import time; time.sleep(60)", "stopped after 2 s", everything),
    ):
        name = write_tests(tmp_path, body)
        problem, failed = gpu_check.run_tests(tmp_path, [], log, timeout=2 if "sleep" in body else 60)
        assert failed == ({name} if wrong is None else wrong)
        if said is None:
            assert problem is None
        else:
            assert problem is not None and re.search(said, problem), problem
        assert ("FAILED" in capsys.readouterr().out) == (wrong is None)


def test_a_run_that_is_stopped_leaves_no_process(tmp_path):
    """A tool around pytest is a process that starts others."""
    pid = tmp_path / "pid"
    write_tests(tmp_path, "assert True")
    before = ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]
    problem, _ = gpu_check.run_tests(tmp_path, [], tmp_path / "log", before, timeout=0.3)
    assert problem is not None and "stopped" in problem
    stat = Path(f"/proc/{pid.read_text().strip()}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("it still runs")


def test_the_path_is_added_to(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/some/where")
    write_tests(tmp_path, "import os; assert os.environ['PYTHONPATH'].split(os.pathsep)[1:] == ['/some/where']")
    assert gpu_check.run_tests(tmp_path, [], tmp_path / "log") == (None, set())


def test_what_compute_sanitizer_finds(tmp_path, monkeypatch, capsys):
    """A race is told of, and a false alarm there stops nothing; memory that is not the kernel's is an error."""
    said = tmp_path / "said"
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$1 $*" >> {tmp_path}/words\ncat {said}.${{1#--tool=}}\necho "1 passed in 0.01s"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    write_tests(tmp_path, "assert True")

    def log(name):
        return tmp_path / f"{name}.log"

    api = "========= Program hit cudaErrorNotSupported on CUDA API call\n"
    race = (
        "========= Error: Race reported between Write access at fit_kernel+0x10 and Write access at fit_kernel+0x10\n"
    )
    read = "========= Invalid __global__ read of size 4 bytes\n"
    for memory, races, found in ((api, "", None), ("", race, None), (read, "", "Invalid")):
        Path(f"{said}.memcheck").write_text(memory)
        Path(f"{said}.racecheck").write_text(races)
        result = gpu_check.sanitise(tmp_path, log)
        assert result is None if found is None else found in result
        assert ("Race reported" in capsys.readouterr().out) == bool(races)
    words = (tmp_path / "words").read_text()
    assert "--report-api-errors=no" in words and gpu_check.SANITISED in words


def test_the_tests_of_every_kernel_are_run():
    tests = gpu_check.checkout() / "tests"
    marked = {path.name: path.read_text() for path in tests.glob("test_*.py") if path.name != Path(__file__).name}
    marked = {name: text for name, text in marked.items() if re.search(r"pytest\.mark\.gpu", text, re.M)}
    assert set(marked) == set(gpu_check.TESTED)
    for name in [*gpu_check.ALONE.split(" or "), gpu_check.SANITISED]:
        assert any(f"def {name}" in text for text in marked.values()), name
    groups = {case.group for case in (*gpu_check.cases(FLOORS), *gpu_check.collection_cases(FLOORS), *gpu_edit.cases())}
    assert set().union(*gpu_check.TESTED.values()) == groups - {"spd_solve"}  # torch.linalg's own kernels


def test_one_case_that_fails_does_not_end_the_others(capsys):
    cases = [harness.Case(name, None) for name in ("right", "wrong", "broken", "right again", "late")]

    def measure(case):
        if case.name == "wrong":
            raise harness.Refused("It is wrong here.")
        if case.name == "broken":
            raise RuntimeError("CUDA error")
        if case.name == "right again":
            time.sleep(0.05)

    assert gpu_check.each(cases, time.monotonic() + 0.05, measure) == (2, 2)
    assert [case.name for case in cases] == ["late"]
    said = capsys.readouterr().err
    assert "It is wrong here." in said and "broken: RuntimeError" in said and "Traceback" in said


@pytest.mark.parametrize(
    ("failed", "measured", "status"), [(set(), 3, 0), (set(), 0, 1), ({"test_fit_low_rank.py"}, 3, 1)]
)
def test_what_fails_is_not_timed(tmp_path, monkeypatch, capsys, failed, measured, status):
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_check, "run_all_tests", lambda *args: (["FAILED it"] if failed else [], failed))
    monkeypatch.setattr(gpu_check, "sanitise", lambda *args: None)
    monkeypatch.setattr(gpu_check, "measure", lambda *args: given.append(args) or (measured, 0, []))
    assert gpu_check.main(["--out", str(tmp_path)]) == status
    ((sheet, _, closed, _),) = given
    assert closed == ({"fit_low_rank"} if failed else set()) and sheet.path == tmp_path / "nvidia-h200.jsonl"
    said = capsys.readouterr().err
    assert ("fit_low_rank are not timed: FAILED it" in said) == bool(failed)
    assert ("Nothing was timed" in said) == (not measured)


def test_edit_cases_on_the_cpu():
    """The same code, small, with ours on another backend: every contender does the job, and its record is whole."""
    cases = gpu_edit.cases("cpu", channels=8, side=5, steps=25)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.group for case in cases} == {"fit_low_rank", "fit_projected", "spd_solve"}
    some = [case for case in cases if (" n " not in case.name and "rank 4" not in case.name) or "1x n 64," in case.name]
    assert len(some) == 7
    for case in some:
        checked = gpu_edit.check(case, "reference" if case.group == "spd_solve" else "cpp", "passed")
        assert max(checked.errors.values()) <= checked.problem.tolerance, (case.name, checked.errors)
        race = harness.Race(checked.problem)
        race.run(True)
        record = harness.measurement(case.group, checked, race, False)
        assert record["ratio"] > 0 and record["p50"] > 0 and len(record["contenders"]) >= 2


def test_an_edit_that_is_wrong_is_refused(monkeypatch):
    right = gpu_edit.spd_solve
    monkeypatch.setattr(gpu_edit, "spd_solve", lambda *args, **how: 1.001 * right(*args, **how))
    case = next(case for case in gpu_edit.cases("cpu") if "n 64," in case.name)
    with pytest.raises(harness.Refused, match="spd_solve is wrong.*1e-10"):
        gpu_edit.check(case, "reference", "passed")
