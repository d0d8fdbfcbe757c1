"""What ``make gpu-check`` runs on a machine with an NVIDIA GPU: the tests that need one, then an edit's kernels against
stock PyTorch (gpu_edit.py), collection against the bare forward pass, and the second moment over a grid of shapes, beside floors
from what this GPU was just measured to do; last compute-sanitizer where it is installed. Lines are appended to
``benchmarks/results/<gpu>.jsonl``, and what the tests said goes to ``<gpu>.*.log`` beside it. Needs no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import rewrite_core
from rewrite_core.ops import second_moment

from . import bench_collect, gpu_edit
from .harness import Case, Checked, Contender, Problem, Race, Refused, measurement
from .report import Report, checkout

CHANNELS = (64, 128, 256, 512, 1024, 2048)
SIDES = (4, 8, 16, 32, 64, 128, 256)
BATCH = 8
MOST = 1 << 28  # numbers in a batch; of larger maps there are fewer than BATCH, so that small GPUs can hold them
MINUTES = 8.0
EDITS = 0.4  # share of the time for timing that an edit's kernels may take
TESTED = {  # files of tests, and the groups of cases that are not timed where one of theirs fails
    "test_second_moment.py": ("gpu float32", "gpu tf32", "gpu bfloat16", "gpu collect"),
    "test_moments_gpu.py": ("gpu collect",),
    "test_fit_low_rank.py": ("fit_low_rank",),
    "test_fit_projected.py": ("fit_projected",),
}
TESTING = 300.0  # seconds for all tests
PROCESSES = 8  # at most, that test side by side (pytest-xdist): most of the time kernels are compiled
# tests that must not share the GPU: what they measure or need would depend on the others
ALONE = "test_memory_is_constant or test_no_host_synchronisation or test_gpu_more_than_2_31_numbers"
SANITISED = "test_gpu_small"  # the tests that compute-sanitizer watches
SANITISING = 60.0  # seconds for each of its tools
TOOLS = {
    "memcheck": ("--report-api-errors=no",),
    "racecheck": (),
}  # torch asks for what may fail, and looks whether it did
COLLECTED = ("convs.6.conv", "convs.11.conv")  # of a StyleGAN2-256: 512 channels at 32x32, 128 at 256x256
COLLECTED_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input, precision of ours, and what stock may do for the same.

    allowed   the largest error of ours, or there is no speed
    rivals    the largest error of stock that counts: what TF32 or bfloat16 sums are expected to have
    products  multiplications in place of each one of the job, at the rate `rate`
    """

    name: str
    dtype: torch.dtype
    precision: str
    allow_tf32: bool
    allowed: float
    rivals: float
    products: int
    rate: str


KINDS = (
    Kind("float32", torch.float32, "x3", False, 2e-6, 2e-6, 3, "tf32"),
    Kind("tf32", torch.float32, "tf32", True, 3e-3, 3e-3, 1, "tf32"),
    Kind("bfloat16", torch.bfloat16, "x3", False, 2e-6, 1e-2, 1, "bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class Floors:
    """What this GPU was measured to do: bytes copied (read and written) and operations of large products a second."""

    bandwidth: float
    rates: dict[str, float]

    def seconds(self, kind: Kind, operations: float, traffic: float) -> float:
        return max(traffic / self.bandwidth, operations * kind.products / self.rates[kind.rate])


def batch_of(channels: int, side: int) -> int:
    return max(1, min(BATCH, MOST // (channels * side * side)))


def cases(floors: Floors, device: str = "cuda") -> list[Case]:
    return [
        Case(
            f"{channels}@{side}x{side} batch {batch_of(channels, side)} {kind.name} gpu",
            functools.partial(make, channels, side, kind, floors, device),
            f"gpu {kind.name}",
        )
        for kind in KINDS
        for channels in CHANNELS
        for side in SIDES
    ]


def make(channels: int, side: int, kind: Kind, floors: Floors, device: str, backend: str) -> Problem:
    generator = torch.Generator(device).manual_seed(channels + side)
    batch = batch_of(channels, side)
    features = torch.randn(batch, channels, side, side, generator=generator, device=device)
    features = torch.nn.functional.leaky_relu(features, 0.2).to(kind.dtype)
    exact = torch.zeros(channels, channels, dtype=torch.float64, device=device)
    for image in features:  # float64 copies of all of them would fill the GPU
        flat = image.flatten(1).double()
        exact.addmm_(flat, flat.T)
    count = batch * side * side

    def addmm(total: Tensor) -> Tensor:
        keys = features.permute(0, 2, 3, 1).reshape(-1, channels)
        if keys.dtype == total.dtype:
            return total.addmm_(keys.T, keys)
        return total.add_(keys.T @ keys)

    def bmm(total: Tensor) -> Tensor:
        flat = features.flatten(2)
        return total.add_(torch.bmm(flat, flat.mT).sum(0))

    def einsum(total: Tensor) -> Tensor:
        return total.add_(torch.einsum("nchw,ndhw->cd", features, features))

    def contender(name: str, run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Contender:
        total = torch.zeros(channels, channels, dtype=dtype, device=device)

        def prepare() -> None:
            torch.backends.cuda.matmul.allow_tf32 = kind.allow_tf32
            total.zero_()

        return Contender(name, lambda: run(total), prepare)

    def ours(total: Tensor) -> Tensor:
        return second_moment(features, out=total, backend=backend, precision=kind.precision)

    operations = float(count * channels * (channels + 1))
    traffic = float(features.nbytes + channels * (channels + 1) * 8)
    return Problem(
        ours=contender("rewrite_core", ours, torch.float64),
        stock=[
            contender("addmm, permuted copy", addmm, torch.float32),
            contender("bmm on NCHW", bmm, torch.float32),
            contender("einsum", einsum, torch.float32),
        ],
        shapes={"features": list(features.shape)},
        dtype=str(kind.dtype).removeprefix("torch."),
        operations=operations,
        traffic=traffic,
        error=lambda total: ((total.double() - exact).norm() / exact.norm()).item(),
        error_kind="relative Frobenius error",
        tolerance=kind.rivals,
        details={
            "floor_seconds": floors.seconds(kind, operations, traffic),
            "copy_gbytes_per_second": floors.bandwidth / 1e9,
            f"{kind.rate}_gflops": floors.rates[kind.rate] / 1e9,
        },
    )


def collection_cases(floors: Floors, device: str = "cuda", batch_size: int = COLLECTED_BATCH) -> list[Case]:
    return [
        Case(
            f"stylegan2_256 {name} batch {batch_size} gpu",
            functools.partial(make_collection, name, floors, device, batch_size),
            "gpu collect",
        )
        for name in COLLECTED
    ]


def make_collection(
    name: str,
    floors: Floors,
    device: str,
    batch_size: int,
    backend: str,
    build: Callable[[], torch.nn.Module] = bench_collect.stylegan2_256,
    size: int = 512,
) -> Problem:
    """Its floor is that of all the updates, which is what comes on top of the forward passes."""
    problem = bench_collect.make(build, name, size, backend, device, batch_size)
    floor = floors.seconds(KINDS[0], problem.operations, problem.traffic)
    details = {"floor_seconds": floor, "copy_gbytes_per_second": floors.bandwidth / 1e9}
    return dataclasses.replace(problem, details=details)


def overhead(race: Race) -> float:
    """By how much a collection takes longer than the bare forward passes, in the median over the rounds."""
    return statistics.median(
        ours / bare - 1 for ours, bare in zip(race.times["rewrite_core"], race.times["bare forward pass"], strict=True)
    )


def check(case: Case, kind: Kind, backend: str, tests: str) -> Checked:
    """Every contender's error; raises Refused where ours is too large."""
    problem = case.make(backend)
    errors = {}
    for contender in problem.contenders:
        contender.prepare()
        errors[contender.name] = problem.error(contender.run())
    if not errors[problem.ours.name] <= kind.allowed:  # also NaN
        raise Refused(
            f"second_moment is wrong here, so its speed is not reported: in case {case.name!r} the error is "
            f"{errors[problem.ours.name]:.2e}, above {kind.allowed:.0e}."
        )
    return Checked(case, problem, backend, tests, errors)


class GPURace(Race):
    """Timed by the GPU's own clock, from the first launch to the end of the last kernel."""

    def plan(self, quick: bool) -> int:
        for contender in self.problem.contenders:  # compiles and chooses
            contender.prepare()
            contender.run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for contender in self.problem.contenders:
            contender.prepare()
            contender.run()
        torch.cuda.synchronize()
        return min(max(round(0.5 / (time.perf_counter() - start)), 5), 51)

    def _time(self, contender: Contender, prepared: bool = False) -> None:
        if not prepared:
            contender.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()  # so that the first kernel does not wait for others, nor hide its launch behind them
        start.record()
        contender.run()
        end.record()
        end.synchronize()
        self.times[contender.name].append(start.elapsed_time(end) / 1e3)


def seconds_of(run: Callable[[], object], rounds: int = 10) -> float:
    """The least time of a call on the GPU."""
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times[3:])


def measure_floors() -> Floors:
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds_of(lambda: target.copy_(source))
    del source, target
    rates, size = {}, 8192
    for name, dtype, allow in (("tf32", torch.float32, True), ("bfloat16", torch.bfloat16, False)):
        torch.backends.cuda.matmul.allow_tf32 = allow
        left, right = torch.randn(2, size, size, device="cuda").to(dtype).unbind()
        rates[name] = 2.0 * size**3 / seconds_of(lambda: torch.mm(left, right))
    return Floors(bandwidth, rates)


class GPUReport(Report):
    """A file of the GPU's name, beside those of CPUs."""

    def __init__(self, out: Path, gpu: str) -> None:
        super().__init__(out, False, functools.partial(print, flush=True))
        self.environment["machine"] = self.stem = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        self.path = out / f"{self.stem}.jsonl"


def run_tests(
    folder: Path, words: Sequence[str], log: Path, before: Sequence[str] = (), timeout: float = TESTING
) -> tuple[str | None, set[str]]:
    """None where the tests pass, else one line that says what happened; and the files of tests that did not pass.

    log  where all that was said goes
    """
    dropped = ("REWRITE_CORE_BACKEND", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    variables = {key: value for key, value in os.environ.items() if key not in dropped}
    library = str(Path(rewrite_core.__file__).resolve().parent.parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [library, variables.get("PYTHONPATH")]))
    command = [*before, sys.executable, "-P"] if sys.version_info >= (3, 11) else [*before, sys.executable]
    files = [str(folder / "tests" / name) for name in TESTED if (folder / "tests" / name).exists()]
    command += ["-m", "pytest", "-q", "-rfE", "--tb=short", "--maxfail=30", "--durations=10", "-p", "no:cacheprovider"]
    with open(log, "w", encoding="utf-8") as file:
        run = subprocess.Popen(
            [*command, *files, *words],
            cwd=folder / "tests",
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = run.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # its own processes too
                run.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was said"]
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) .*\.py", line)]
    for line in failed:
        print(line, flush=True)
    if status is None:
        return f"stopped after {timeout:.0f} s (see {log})", set(TESTED)
    if status:
        named = {name for name in TESTED for line in failed if name in line.split("::")[0]}
        enough = any("stopping after" in line for line in lines)  # --maxfail: who knows of the rest
        return f"{(failed or lines)[-1]} (see {log})", named if named and not enough else set(TESTED)
    for line in lines[-12:]:  # the slowest, and how many passed
        print(line, flush=True)
    if not any(re.search(r"\d+ passed", line) for line in lines[-12:]):
        return f"all tests were skipped: {lines[-1]}", set(TESTED)
    return None, set()


def run_all_tests(folder: Path, log: Callable[[str], Path]) -> tuple[list[str], set[str]]:
    """Side by side where pytest-xdist is installed, but for those that need the GPU to themselves: what went wrong in one
    line each, and the files of tests that did not pass."""
    started, said, wrong = time.monotonic(), [], set()
    processes = min(PROCESSES, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    together = ["-n", str(processes)] if processes > 1 else []
    for name, words in (("tests", [*together, "-k", f"not ({ALONE})"]), ("tests-alone", ["-k", ALONE])):
        left = max(TESTING - (time.monotonic() - started), 1.0)
        problem, failed = run_tests(folder, ["-m", "gpu", *words], log(name), timeout=left)
        said += [] if problem is None else [problem]
        wrong |= failed
        if wrong == set(TESTED):
            break
    return said, wrong


def sanitise(folder: Path, log: Callable[[str], Path]) -> str | None:
    """memcheck's finding on the small tests, or None. racecheck's are only printed: threads that hold the same sum and write
    it twice are a race to it."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: memory accesses and races were not checked.", flush=True)
        return None
    found = None
    for name, more in TOOLS.items():
        before = [tool, f"--tool={name}", "--target-processes=application-only", "--print-limit=20", *more]
        problem, _ = run_tests(folder, ["-m", "gpu", "-k", SANITISED], log(name), before, SANITISING)
        lines = log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        kinds = r"=+ (Invalid|Misaligned|Out-of-range|(Error|Warning): (Race|Potential))"
        findings = [line for line in lines if re.match(kinds, line)]
        if findings:
            print("\n".join(findings[:20]), flush=True)
            print(f"{name}: {len(findings)} findings (see {log(name)})", flush=True)
            found = f"memcheck: {findings[0]}" if name == "memcheck" else found
        else:
            print(f"{name}: {'no finding' if problem is None else f'{problem}, without a finding'}", flush=True)
    return found


def each(cases: list[Case], deadline: float, measure: Callable[[Case], object]) -> tuple[int, int]:
    """Measure cases, and take them from the list, till the deadline (of ``time.monotonic``): how many were measured, and
    how many were wrong or did not run. The others go on, unless the GPU itself does not."""
    done = wrong = 0
    while cases and time.monotonic() < deadline:
        case = cases.pop(0)
        try:
            measure(case)
            done += 1
        except Refused as refusal:
            print(refusal, file=sys.stderr, flush=True)
            wrong += 1
        except Exception as error:
            traceback.print_exc()
            print(f"{case.name}: {type(error).__name__}, see above", file=sys.stderr, flush=True)
            wrong += 1
            if torch.cuda.is_available():
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:  # no call succeeds after that
                    print("The GPU does not answer any more: nothing else is timed.", file=sys.stderr, flush=True)
                    break
    return done, wrong


def main(words: Sequence[str] | None = None) -> int:
    """0: measured. 1: wrong here, tests fail, or nothing was measured. 2: no GPU, no checkout, or bad arguments."""
    started = time.monotonic()
    parser = argparse.ArgumentParser("gpu_check", description="Test and time the GPU kernels on this machine.")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results (benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start no case that would end after so many")
    given = parser.parse_args(words)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("make gpu-check needs an NVIDIA GPU and a torch that sees it, and there is none here.", file=sys.stderr)
        return 2
    folder = checkout()
    if folder is None or not (folder / "tests").is_dir():
        print("make gpu-check runs in a source checkout, where the tests are: clone the repository.", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name()
    out = (given.out or folder / "benchmarks" / "results").resolve()
    try:
        sheet = GPUReport(out, gpu)
    except OSError as error:
        print(f"Results cannot go to {out} ({error.strerror}): choose another folder.", file=sys.stderr)
        return 2

    def log(name: str) -> Path:
        return sheet.path.with_name(f"{sheet.stem}.{name}.log")

    problems, failed = run_all_tests(folder, log)
    closed = {group for name in failed for group in TESTED[name]}
    for problem in problems:
        print(
            f"The kernels are wrong on this GPU, so {', '.join(sorted(closed))} are not timed: {problem}",
            file=sys.stderr,
        )
    reserved = len(TOOLS) * SANITISING if shutil.which("compute-sanitizer") else 60.0
    done, wrong, left = measure(sheet, gpu, closed, started + 60 * given.minutes - reserved)
    torch.cuda.empty_cache()
    found = sanitise(folder, log)
    if found is not None:
        print(found, file=sys.stderr)
    if left:
        print(f"{len(left)} cases were left out for want of time (--minutes): {left[0].name} and what follows it.")
    if not done:
        print("Nothing was timed.", file=sys.stderr)
    return int(bool(problems or wrong or found or not done))


def measure(sheet: GPUReport, gpu: str, closed: set[str], deadline: float) -> tuple[int, int, list[Case]]:
    """Every case but those of closed groups: how many were measured, how many were wrong, and those left for want of time."""
    kinds = {f"gpu {kind.name}": kind for kind in KINDS} | {"gpu collect": KINDS[0]}
    edits = [case for case in gpu_edit.cases() if case.group not in closed]
    if time.monotonic() >= deadline or (not edits and closed >= set(kinds)):
        return 0, 0, []
    floors = measure_floors()
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in floors.rates.items())
    print(f"{gpu}: copies {floors.bandwidth / 1e9:.0f} GB/s (read and written), {rates}", flush=True)
    todo = [case for case in collection_cases(floors) + cases(floors) if case.group not in closed]

    def one(case: Case) -> None:
        checked = check(case, kinds[case.group], "triton", "passed")
        race = GPURace(checked.problem)
        race.run(False)
        collected = case.group == "gpu collect"
        record = measurement("collect" if collected else "second_moment", checked, race, False)
        record["tolerance"] = kinds[case.group].allowed  # ours'; stock was let pass up to `rivals`
        sheet.add(record)
        floor = record["details"]["floor_seconds"]
        if collected:
            least = floor / (record["p50"] / (1 + overhead(race)))
            print(f"    {overhead(race):.1%} over the bare forward pass; the floor is {least:.1%}", flush=True)
        else:
            print(f"    floor {floor * 1e6:.1f} us: {floor / record['p50']:.2f} of it reached", flush=True)

    sheet.start()
    try:
        now = time.monotonic()
        share = EDITS if todo else 1.0
        counts = [each(edits, now + share * (deadline - now), functools.partial(gpu_edit.measure, sheet, GPURace))]
        counts.append(each(todo, deadline, one))
    finally:
        sheet.finish()
    done, wrong = map(sum, zip(*counts, strict=True))
    return done, wrong, edits + todo


if __name__ == "__main__":
    sys.exit(main())
