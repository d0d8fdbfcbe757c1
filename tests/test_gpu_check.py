"""What can be said of ``make gpu-check`` where there is no GPU."""

from __future__ import annotations

import functools
import re

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
    monkeypatch.setattr(gpu_check, "second_moment", lambda *args, out, **how: right(*args, out=out, **how).mul_(1.00001))
    case = harness.Case("small", lambda backend: gpu_check.make(24, 5, kind, FLOORS, "cpu", backend))
    with pytest.raises(harness.Refused, match="'small'.*1.00e-05, above 2e-06"):
        gpu_check.check(case, kind, "cpp", "passed")


def test_failing_skipped_and_slow_tests_are_told_apart(tmp_path):
    (tmp_path / "tests").mkdir()
    file, *others = (tmp_path / "tests" / name for name in gpu_check.TESTED)
    for other in others:
        other.write_text("")
    for body, said in (
        ("assert True", None),
        ("assert False", "FAILED.*test_it"),
        ("import pytest; pytest.skip('no GPU')", "skipped"),
        ("import time; time.sleep(60)", "stopped after 5 s"),
    ):
        file.write_text(f"def test_it():\n    {body}\n")
        problem = gpu_check.run_tests(tmp_path, [], timeout=5 if "sleep" in body else 60)
        if said is None:
            assert problem is None
        else:
            assert problem is not None and re.search(said, problem), problem


def test_the_tests_of_every_kernel_are_run():
    tests = gpu_check.checkout() / "tests"
    marked = {path.name for path in tests.glob("test_*.py") if re.search(r"pytest\.mark\.gpu", path.read_text(), re.M)}
    assert marked == set(gpu_check.TESTED)


def test_edit_cases_on_the_cpu():
    """The same code, small, with ours on another backend: every contender does the job, and its record is whole."""
    cases = gpu_edit.cases("cpu", channels=8, side=5, steps=25)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.group for case in cases} == {"fit_low_rank", "fit_projected", "spd_solve"}
    some = [case for case in cases if " n " not in case.name and "rank 4" not in case.name or "1x n 64," in case.name]
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
