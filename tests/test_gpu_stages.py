"""The stages of ``make gpu-check`` run here, small, on the CPU; what only a GPU has is played by stand-ins."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import needs_triton, needs_triton_interpreter

from rewrite_core.benchmarks import lines
from rewrite_core.benchmarks.gpu import modes, problems, processes, rates, sanitiser, schedule, targets, timing, worker
from rewrite_core.benchmarks.gpu.stages import SANITISED, Case, Stage, all_stages
from rewrite_core.benchmarks.harness import Contender, Problem
from rewrite_core.ops import fit_low_rank, fit_projected

HERE = Path(__file__).resolve().parent
CASES = {stage.name: {case.name: case.arguments for case in stage.cases} for stage in all_stages(HERE, 4)}
MODULES = {"S0": rates, "S1": modes, "S2": targets}


@pytest.fixture
def setting(tmp_path):
    """Of a rehearsal; its words go nowhere."""
    reading, writing = os.pipe()
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 1 << 16), b"")])
    reader.start()
    common = {"gpu": "none", "sources": "these", "run": "now", "cpu": "a CPU", "threads": 1, "load": 0.0}
    yield worker.Setting(
        device="cpu",
        small=True,
        stage="S1",
        common=common,
        lines=tmp_path / "lines.jsonl",
        tests=HERE,
        folder=tmp_path,
        installed=str(HERE.parent),
        events=writing,
    )
    os.close(writing)
    reader.join()
    os.close(reading)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    before = torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(timing, "BUDGET", 1e-3)
    monkeypatch.setattr(targets, "DeviceRace", lambda *given: timing.DeviceRace(*given, budget=1e-3))
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def run(setting, stage, *names):
    """The lines of cases of a stage."""
    cases = [(name, arguments) for name, arguments in CASES[stage].items() if not names or name in names]
    assert len(cases) == len(names) or not names
    at = worker.Setting(**{**vars(setting), "stage": stage})
    worker.run_cases(MODULES[stage], cases, at)
    found = lines.read(setting.lines)[-len(cases) :]
    assert [line["case"] for line in found] == [name for name, _ in cases]
    return found


def skipped_kernel(line):
    """Whether it is a case of the CUDA kernel, which is skipped with the reason where there is no GPU."""
    if CASES[line["stage"]][line["case"]].get("backend") != "cuda":
        return False
    assert line["state"] == "skipped" and "it works on GPU tensors" in line["reason"], line
    return True


# --- every case, on the CPU's own backends ---


def test_rates(setting):
    for line in run(setting, "S0"):
        assert line["state"] == "ok", line
        if line["case"] == "environment":
            assert "cudnn" in line["environment"] and line["peak_bytes"] is None
        elif line["case"] == "driver and clocks":
            assert line["driver"]
        else:
            assert line["rate"] > 1e3 and "/s" in line["unit"]


def test_every_mode(setting):
    for line in run(setting, "S1"):
        if skipped_kernel(line):
            continue
        assert line["state"] == "ok", line
        assert 0 <= line["error"] <= line["tolerance"] < 1 and line["first_call_seconds"] > 0
        assert line["kernels"] == [] and line["kernels_reason"]
        assert line["op"] in line["case"] and line["shapes"] and line["backend"]


def test_every_target(setting):
    run(setting, "S0")
    found = [line for line in run(setting, "S2") if not skipped_kernel(line)]
    for line in found:
        assert line["state"] == "ok", line
        ours = line["contenders"]["rewrite_core"]
        assert ours["wall"]["p50"] > 0 and ours["p50"] > 0 and len(line["contenders"]) >= 2 and line["ratio"] > 0
        assert all("no graph" in times["timed_by"] for times in line["contenders"].values())
        assert 0 <= ours["error"] <= line["tolerance"] and line["candidates"] == []
        assert line["details"]["floor_seconds"] > 0, line["details"]
    assert {line["op"]: line["backend"] for line in found}["spd_solve"] == "reference"


@needs_triton_interpreter
def test_some_modes_in_the_interpreter(tmp_path):
    """In a process of its own, as a stage's: the kernels themselves, from the same arguments."""
    names = [
        "second_moment float32 x3, cropped maps",
        "fit_low_rank l2, linear: closed form",
        "fit_projected l2, demodulated",
    ]
    found = in_processes(tmp_path, "modes", "S1", {name: CASES["S1"][name] for name in names}, TRITON_INTERPRET="1")
    assert {name: found[name]["state"] for name in names} == dict.fromkeys(names, "ok"), found
    assert {line["backend"] for line in found.values()} == {"triton"}


def in_processes(folder, module, stage, cases, tests=HERE, limit=240.0, **variables):
    """Cases in processes of their own, by way of the schedule: the last line of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    common = {"gpu": "none", "sources": "these", "run": "now"}
    task = {
        "package": "rewrite_core.benchmarks.gpu",
        "library": str(HERE.parent),
        "device": "cpu",
        "small": True,
        "common": common,
        "lines": str(folder / "lines.jsonl"),
        "tests": str(tests),
        "folder": str(folder),
    }
    launcher = processes.Processes(sys.executable, HERE.parent, folder, folder / "log", lambda stage: environment, task)

    def tell(case, state, seconds, reason):
        lines.append(folder / "lines.jsonl", {**common, "stage": stage, "case": case, "state": state, "reason": reason})

    group = tuple(Case(name, limit, 1.0, arguments) for name, arguments in cases.items())
    schedule.run_stage(Stage(stage, "", module, (group,)), set(), launcher, launcher.now() + 600.0, tell)
    return {line["case"]: line for line in lines.read(folder / "lines.jsonl")}


# --- what is wrong is told ---


def scaled(function, *fields):
    """A function whose results are off by 1 in 1000."""

    def off(*arguments, **how):
        found = function(*arguments, **how)
        if not fields:
            return 1.001 * found
        return found._replace(**{name: 1.001 * getattr(found, name) for name in fields})

    return off


@pytest.mark.parametrize(
    ("name", "function", "fields"),
    [
        ("second_moment float32 x3, 64 channels", "second_moment", ()),
        ("fit_low_rank l2, linear: closed form", "fit_low_rank", ("coefficients",)),
        ("fit_low_rank l1, demodulated", "fit_low_rank", ("loss",)),
        ("fit_projected l2, demodulated", "fit_projected", ("losses",)),
    ],
)
def test_a_kernel_that_is_wrong(name, function, fields, setting, monkeypatch):
    right = getattr(modes, function)

    def ours_alone(*arguments, backend, **how):
        run = right if backend == "reference" else scaled(right, *fields)
        return run(*arguments, backend=backend, **how)

    monkeypatch.setattr(modes, function, ours_alone)
    (line,) = run(setting, "S1", name)
    assert line["state"] == "wrong" and re.search(r"e[-+]\d\d, above \de-", line["reason"]), line
    assert line["error"] > line["tolerance"]


def test_one_wrong_coefficient_where_the_goal_is_met():
    """The final loss is then at rounding: of it any difference is a multiple. The coefficients are float32's."""
    name = "fit_low_rank l1, linear, 16 directions, 4x4: dual form"
    launches, judge = modes.case(CASES["S1"][name], "cpu", small=False)
    found = launches()
    assert found.loss.max() < 1e-9 * found.initial_loss.min()
    right = judge(found)
    assert right["error"] < right["tolerance"] / 2
    coefficients = found.coefficients.clone()
    coefficients[17] *= 1 + 1e-4
    wrong = judge(found._replace(coefficients=coefficients))
    assert wrong["error"] > wrong["tolerance"] and "really leave" in wrong["error_kind"]
    worse = judge(found._replace(loss=found.loss + 1e-4 * found.initial_loss))
    assert worse["error"] > worse["tolerance"]


def test_what_is_wrong_is_not_timed(setting, monkeypatch):
    monkeypatch.setattr(targets, "spd_solve", scaled(targets.spd_solve))
    (line,) = run(setting, "S2", "solve n 64, 8 right-hand sides")
    assert line["state"] == "wrong" and "so it is not timed" in line["reason"] and "contenders" not in line
    assert set(line["errors"]) >= {"rewrite_core", "linalg.solve"}


def test_stock_that_does_not_run_is_left_out(setting, monkeypatch):
    def broken(*arguments, **how):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.linalg, "inv", broken)
    (line,) = run(setting, "S2", "solve n 64, 8 right-hand sides")
    assert line["state"] == "ok" and "linalg.inv" not in line["contenders"]
    assert "RuntimeError: not here" in line["failed_contenders"]["linalg.inv"]
    monkeypatch.setattr(targets, "spd_solve", broken)
    (line,) = run(setting, "S2", "solve n 64, 8 right-hand sides")
    assert line["state"] == "failed" and "not here" in line["reason"]


def test_a_result_that_cannot_be_written(setting):
    module = SimpleNamespace(run=lambda *given: {"value": object()}, sound=lambda: True)
    worker.run_cases(module, [("odd", {})], setting)
    (line,) = lines.read(setting.lines)
    assert line["state"] == "failed" and "cannot be written: TypeError" in line["reason"]


def test_a_floor_needs_the_rates(setting):
    (line,) = run(setting, "S2", "solve n 64, 8 right-hand sides")
    assert line["details"] == {"floor_reason": "S0 has no copy bandwidth, float64"}


def test_without_a_gpu_cases_are_skipped(setting):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    on_gpu = worker.Setting(**{**vars(setting), "device": "cuda"})
    for stage, module in MODULES.items():
        name, arguments = next(iter(CASES[stage].items()))
        with pytest.raises(worker.Skipped, match=r"torch .* sees no GPU"):
            module.run(name, arguments, on_gpu)


# --- a GPU played by stand-ins ---


class FakeEvent:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at) + 1e-3


class FakeGraph:
    """What is called while it is captured is called once; a replay only counts."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as the stages use it, for tensors that lie on the CPU."""
    state = SimpleNamespace(capturing=False, graphs=[], broken=False, left_broken=False)

    @contextlib.contextmanager
    def graph(made, stream=None):
        state.graphs.append(made)
        state.capturing = True
        try:
            yield
        finally:
            state.capturing = False

    def synchronize(*given):
        assert not state.capturing, "a wait while a graph is captured"
        if state.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=1 << 37, multi_processor_count=132, L2_cache_size=1 << 25
    )
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "is_available": lambda: True,
        "synchronize": synchronize,
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda given: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda: 123,
        "reset_peak_memory_stats": lambda: None,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda device: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return state


def test_graphs_and_events(gpu):
    """Ours goes into a graph; what waits for the GPU does not; what is said not to is not tried; and what does not run
    after it was tried has its times by the wall clock."""
    calls = []

    def waits():
        torch.cuda.synchronize()
        time.sleep(1e-3)

    def is_left_broken():
        if gpu.capturing:
            gpu.left_broken = True
        if gpu.left_broken:
            raise RuntimeError("library state")

    problem = Problem(
        ours=Contender("rewrite_core", lambda: calls.append(time.sleep(1e-4))),
        stock=[
            Contender("waits", waits, rounds=7),
            Contender("told", lambda: time.sleep(1e-3)),
            Contender("broken", is_left_broken),
        ],
        shapes={}, dtype="", operations=1.0, traffic=1.0, error=lambda result: 0.0, error_kind="", tolerance=0.0,
    )  # fmt: skip
    race = timing.DeviceRace(problem, {"told": "it is so"}, budget=0.05)
    race.run(False)
    assert len(gpu.graphs) == 3 and gpu.graphs[0].replays == len(race.times["rewrite_core"]) >= 5
    assert re.fullmatch(r"replays of a graph of \d+ calls", race.by["rewrite_core"])
    assert "AssertionError: a wait while a graph is captured" in race.by["waits"]
    assert "the wall clock: RuntimeError: library state" in race.by["broken"]
    assert race.times["broken"] == race.walls["broken"]
    assert race.by["told"] == "events; no graph: it is so"
    assert len(race.times["waits"]) == len(race.walls["waits"]) <= 7
    assert min(race.walls["told"]) >= 1e-3 and min(race.times["told"]) >= 1e-3
    record = race.more({"contenders": {name: {} for name in race.times}})
    assert all(times["wall"]["p20"] <= times["wall"]["p80"] for times in record["contenders"].values())


def test_a_target_on_a_gpu(gpu, setting, monkeypatch):
    """Its record has the graph's times, the candidates' times and the peak of memory."""
    tuning = importlib.import_module("rewrite_core.kernels.tuning")
    second_moment = importlib.import_module("rewrite_core.kernels.second_moment")
    trials = tuple(
        tuning.Trial(config, *rest)
        for config, rest in zip(second_moment.candidates(9, "x3", 512), [(1e-3, None), (None, "it does not fit")])
    )
    asked = []

    def measured(op):
        asked.append(op)
        return {"old": trials} | ({"new": trials} if len(asked) > 3 and op == "second_moment" else {})

    monkeypatch.setattr(tuning, "measured", measured)
    run(setting, "S0")
    (line,) = run(setting, "S2", "second_moment x3, 64 @ 16x16, batch 8")
    assert line["state"] == "ok" and line["peak_bytes"] == 123
    assert "replays of a graph" in line["contenders"]["rewrite_core"]["timed_by"]
    assert [(trial["class"], trial["seconds"], trial["reason"]) for trial in line["candidates"]] == [
        ("new", 1e-3, None),
        ("new", None, "it does not fit"),
    ][: len(trials)]
    assert "block" in line["candidates"][0]["config"]


def test_the_environment_of_a_gpu(gpu, setting, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\ncase $3 in *compute_mode*) echo 'not a valid field'; exit 2;; esac\necho '580.1, 345 MHz'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    line, last = run(setting, "S0", "environment", "driver and clocks")
    found = line["environment"]
    assert found["properties"]["multi_processor_count"] == 132 and found["capability"] == [9, 0]
    assert found["properties"]["regs_per_multiprocessor"] is None  # an attribute that this torch lacks
    assert set(last["driver"]) == {"name", "driver_version", "clocks.sm", "clocks.mem"}
    assert rates.nvidia_smi(["driver_version", "clocks.sm"]) == {"driver_version": "580.1", "clocks.sm": "345 MHz"}


def test_a_gpu_that_does_not_answer(gpu, setting, monkeypatch):
    """A case that breaks it ends its process, after its line is written."""
    assert modes.sound() and targets.sound() and rates.sound()

    def breaks(name, arguments, setting):
        gpu.broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    module = SimpleNamespace(run=breaks, sound=timing.sound)
    with pytest.raises(SystemExit) as left:
        worker.run_cases(module, [("first", {}), ("second", {})], setting)
    assert left.value.code == worker.UNSOUND
    assert [(line["case"], line["state"]) for line in lines.read(setting.lines)] == [("first", "failed")]


@needs_triton
def test_registers_spills_and_shared_memory(tmp_path):
    """Triton's own compiler and launch path, for a GPU that is not there: kernels are compiled and not launched."""
    code = f"""
        import sys; sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE / "helpers")!r}]
        import json, torch
        from compiling_only import compile_only
        compile_only()
        from rewrite_core.backends import backends_of
        from rewrite_core.benchmarks.gpu import modes, timing
        (kernel,) = (record.load() for record in backends_of("second_moment") if record.name == "triton")
        out = torch.zeros(100, 100, dtype=torch.float64)
        modes.second_moment = lambda features, **how: (kernel(features, out), out)[1]
        launches, judge = modes.case({{"op": "second_moment", "channels": 100}}, "cpu", False, few=True)
        result = launches()
        found = timing.compiled([])
        again = timing.compiled(timing.so_far())
        print(json.dumps([found, again, judge(result)["error"]]))
    """
    script = tmp_path / "script.py"
    script.write_text("\n".join(line.strip() for line in code.splitlines()))
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    found, again, error = json.loads(done.stdout.splitlines()[-1])
    assert {kernel["name"] for kernel in found["kernels"]} == {"second_moment_kernel", "add_partials_kernel"}
    for kernel in found["kernels"]:
        assert 16 <= kernel["registers"] <= 255 and kernel["spills"] == 0 and kernel["warps"] in (4, 8)
        assert 0 < kernel["shared"] <= 227 << 10 and kernel["stages"] >= 1
    assert again == {"kernels": [], "kernels_reason": "nothing was compiled for this case"}
    assert error > 0.1  # of a kernel that did not run


# --- problems and their goals ---


@pytest.mark.parametrize("kind", problems.KINDS)
def test_goals_are_those_of_these_edits(kind):
    for rank in problems.RANKS:
        edit = problems.make(kind, rank)
        kept = problems.goal(f"fit {kind}, rank {rank}", edit)
        assert kept.shape == (problems.SAMPLE,)
        np.testing.assert_allclose(problems.fit_goal(edit, 3), kept[:3], rtol=1e-6)
        if rank == 1:
            curve = problems.goal(f"projected {kind}", edit)
            assert curve.shape == (problems.STEPS,) and curve[-1] < curve[0] / 2
            arguments, options = problems.projected_arguments(edit)
            found = fit_projected(*arguments, **options, steps=3).losses
            np.testing.assert_allclose(found, curve[:3], rtol=1e-4)
    with pytest.raises(RuntimeError, match="is of another edit: make goals.npz anew"):
        problems.goal(f"fit {kind}, rank 1", problems.make(kind, 1, seed=1))


@pytest.mark.parametrize("kind", problems.KINDS)
def test_both_solvers_are_given_the_same_edit(kind):
    edit = problems.make(kind, 2, 6, 5, 6)
    fit = fit_low_rank(**problems.fit_arguments(edit), loss="l1")
    arguments, options = problems.projected_arguments(edit)
    first = fit_projected(*arguments, **options, loss="l1", steps=1).losses[0].item()
    assert fit.initial_loss.mean().item() == pytest.approx(first, rel=1e-5)
    own = np.abs(edit.value(edit.weight) - edit.target).mean()
    assert first == pytest.approx(own, rel=1e-5)
    changed = edit.weight + np.einsum("ort,ri->oit", fit.coefficients.double().numpy().reshape(5, 2, 9), edit.rows)
    assert np.abs(edit.value(changed) - edit.target).mean() == pytest.approx(fit.loss.mean().item(), rel=1e-5)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_what_coefficients_leave(loss, segments):
    inputs = problems.fit_arguments(problems.make("stylegan2", 1, 6, 5, 4))
    inputs = modes._segmented(inputs) if segments else inputs
    fit = fit_low_rank(**inputs, loss=loss)
    torch.testing.assert_close(problems.losses_of(inputs, fit.coefficients, loss), fit.loss, rtol=1e-5, atol=1e-9)
    nothing = torch.zeros_like(fit.coefficients)
    torch.testing.assert_close(problems.losses_of(inputs, nothing, loss), fit.initial_loss, rtol=1e-6, atol=1e-9)


def test_a_batch_of_solves_is_never_captured():
    """MAGMA's would end the process, not the case."""
    assert set(targets.solve("cpu", True, 24, 1, 2).uncaptured) < set(targets.solve("cpu", True, 24, 2, 2).uncaptured)
    batch = targets.solve("cpu", True, 24, 2, 2)
    assert set(batch.uncaptured) == {contender.name for contender in batch.problem.contenders}


# --- tests and compute-sanitizer ---

TESTS = """
import os, time, signal
import pytest

pytestmark = pytest.mark.gpu

def test_one(): pass
def test_two(): assert 1 == 2, "one is not two"
def test_three(): os.kill(os.getpid(), signal.SIGSEGV)
def test_four(): pytest.skip("not today")
def test_five(): time.sleep(600)
def test_six(): pass
"""


def test_a_test_that_hangs_or_crashes_costs_no_other_its_line(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_broken.py").write_text("import nothing_of_the_kind\n")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: x"]\n')
    shard = {"part": 0, "parts": 1}
    cases = {
        "it 1/1": {"files": ["test_it.py"], **shard},
        "broken 1/1": {"files": ["test_broken.py"], **shard},
        "alone": {"files": ["test_it.py"], "alone": True},
    }
    found = in_processes(tmp_path, "tests", "S3", cases, tests=folder, limit=8.0)
    names = {f"tests/test_it.py::test_{name}": name for name in ("one", "two", "three", "four", "five", "six")}
    states = {names.get(case, case): line["state"] for case, line in found.items()}
    assert states == {
        "one": "ok", "two": "failed", "three": "crashed", "four": "skipped", "five": "timeout", "six": "ok",
        "it 1/1": "wrong", "broken 1/1": "failed", "alone": "ok",
    }, found  # fmt: skip
    assert "one is not two" in found["tests/test_it.py::test_two"]["reason"]
    assert found["tests/test_it.py::test_four"]["reason"].endswith("not today")
    assert found["tests/test_it.py::test_three"]["reason"] == "killed by SIGSEGV"
    assert "nothing_of_the_kind" in found["broken 1/1"]["reason"]
    assert found["it 1/1"]["reason"] == "3 of 6 tests are not right"
    assert "one is not two" in (tmp_path / "log").read_text()


def test_what_compute_sanitizer_finds(tmp_path, setting, monkeypatch):
    """A race is told of, and a false alarm there stops nothing; memory that is not the kernel's is an error."""
    said = tmp_path / "said"
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/words\ncat {said}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    api = "========= Program hit cudaErrorNotSupported on CUDA API call\n"
    race = "========= Error: Race reported between Write access at fit_kernel+0x10 and Write access\n"
    read = "========= Invalid __global__ read of size 4 bytes\n"

    def watched(kind, text):
        said.write_text(text)
        found = sanitiser.run("a case", {"tool": kind, "launches": SANITISED["second_moment"]}, setting)
        return found.get("state", "ok"), found.get("findings"), found.get("reason", "")

    assert watched("memcheck", f"{api}launched\n") == ("ok", 0, "")
    assert watched("racecheck", f"{race}launched\n") == ("ok", 1, "")
    assert watched("memcheck", f"{read}launched\n") == ("wrong", 1, read.strip())
    assert watched("memcheck", "========= Error: no such device") == (
        "failed", 0, "the kernel was not launched: ========= Error: no such device",
    )  # fmt: skip
    said.write_text("skipped: the GPU cannot hold it\n")
    with pytest.raises(worker.Skipped, match="^the GPU cannot hold it$"):
        sanitiser.run("a case", {"tool": "memcheck", "launches": SANITISED["second_moment"]}, setting)
    words = (tmp_path / "words").read_text()
    assert "--tool=memcheck" in words and "--report-api-errors=no" in words and '"op": "second_moment"' in words
    tool.write_text(f"#!/bin/sh\necho '{read.strip()}'\nexec sleep 60\n")
    monkeypatch.setattr(sanitiser, "TIMEOUT", 0.5)
    assert (
        sanitiser.run("a case", {"tool": "racecheck", "launches": SANITISED["fit_projected"]}, setting)["state"]
        == "timeout"
    )
    monkeypatch.setattr(sanitiser, "tool", lambda: (_ for _ in ()).throw(worker.Skipped("not installed")))
    with pytest.raises(worker.Skipped):
        sanitiser.run("a case", {"tool": "memcheck", "launches": SANITISED["fit_projected"]}, setting)


@pytest.mark.parametrize("kernel", SANITISED)
def test_what_is_launched_for_compute_sanitizer(kernel, capfd, monkeypatch):
    monkeypatch.setattr(modes, "die_with_parent", lambda: None)
    modes.launch(json.dumps(CASES["S1"][SANITISED[kernel]]))
    said = capfd.readouterr().err
    if CASES["S1"][SANITISED[kernel]].get("backend") == "cuda":
        assert said.startswith("skipped: ") and "it works on GPU tensors" in said
    else:
        assert "launched" in said
