"""What ``make gpu-check`` runs on a machine with an NVIDIA GPU: the tests that need one, compute-sanitizer where it is
installed, then an edit's kernels against stock PyTorch (gpu_edit.py), collection against the bare forward pass, and the second
moment over a grid of shapes, beside floors from what this GPU was just measured to do. Lines are appended to
``benchmarks/results/<gpu>.jsonl``. Needs no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
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
TESTED = ("test_second_moment.py", "test_moments_gpu.py", "test_fit_low_rank.py", "test_fit_projected.py")
SANITISED = "test_gpu_small"  # the tests that compute-sanitizer watches
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
    name: str, floors: Floors, device: str, batch_size: int, backend: str,
    build: Callable[[], torch.nn.Module] = bench_collect.stylegan2_256, size: int = 512,
) -> Problem:  # fmt: skip
    """Its floor is that of all the updates, which is what comes on top of the forward passes."""
    problem = bench_collect.make(build, name, size, backend, device, batch_size)
    floor = floors.seconds(KINDS[0], problem.operations, problem.traffic)
    details = {"floor_seconds": floor, "copy_gbytes_per_second": floors.bandwidth / 1e9}
    return dataclasses.replace(problem, details=details)


def overhead(race: Race) -> float:
    """By how much a collection takes longer than the bare forward passes, in the median over the rounds."""
    return statistics.median(
        ours / bare - 1
        for ours, bare in zip(race.times["rewrite_core"], race.times["bare forward pass"], strict=True)
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


def run_tests(folder: Path, words: Sequence[str], before: Sequence[str] = (), timeout: float = 300) -> str | None:
    """None where the marked tests pass, else one line that says what happened."""
    variables = {key: value for key, value in os.environ.items() if key not in ("REWRITE_CORE_BACKEND", "PYTEST_ADDOPTS")}
    variables["PYTHONPATH"] = str(Path(rewrite_core.__file__).resolve().parent.parent)
    command = [*before, sys.executable, "-P"] if sys.version_info >= (3, 11) else [*before, sys.executable]
    files = [str(folder / "tests" / name) for name in TESTED if (folder / "tests" / name).exists()]
    command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *words]
    try:
        done = subprocess.run(
            command, cwd=folder / "tests", env=variables, capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout:.0f} s"
    lines = done.stdout.strip().splitlines() + done.stderr.strip().splitlines()
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "========= ERROR"))]
        return (failed or lines or ["nothing was said"])[-1]
    return None if re.search(r"\d+ passed", done.stdout) else f"all tests were skipped: {lines[-1]}"


def sanitise(folder: Path) -> str | None:
    """compute-sanitizer's finding on the small tests, or None."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: memory accesses and races were not checked.", flush=True)
        return None
    for check_name in ("memcheck", "racecheck"):
        before = [tool, f"--tool={check_name}", "--error-exitcode=9", "--target-processes=all"]
        problem = run_tests(folder, ["-m", "gpu", "-k", SANITISED], before, timeout=60)
        if problem is not None and problem.startswith("stopped after"):
            print(f"{check_name}: {problem}, without a finding", flush=True)
        elif problem is not None:
            return f"{check_name}: {problem}"
        else:
            print(f"{check_name}: no finding", flush=True)
    return None


def main(words: Sequence[str] | None = None) -> int:
    """0: measured. 1: wrong here, or tests fail. 2: no GPU, no checkout, or bad arguments."""
    started = time.monotonic()
    parser = argparse.ArgumentParser("gpu_check", description="Test and time the GPU kernels on this machine.")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results (benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start no case after so many, less one")
    given = parser.parse_args(words)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("make gpu-check needs an NVIDIA GPU and a torch that sees it, and there is none here.", file=sys.stderr)
        return 2
    folder = checkout()
    if folder is None or not (folder / "tests").is_dir():
        print("make gpu-check runs in a source checkout, where the tests are: clone the repository.", file=sys.stderr)
        return 2
    for problem in (run_tests(folder, ["-m", "gpu"]), sanitise(folder)):
        if problem is not None:
            print(f"The kernels are wrong on this GPU, so nothing is timed: {problem}", file=sys.stderr)
            return 1
    gpu = torch.cuda.get_device_name()
    floors = measure_floors()
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in floors.rates.items())
    print(f"{gpu}: copies {floors.bandwidth / 1e9:.0f} GB/s (read and written), {rates}", flush=True)
    sheet = GPUReport(given.out or folder / "benchmarks" / "results", gpu)
    sheet.start()
    kinds = {f"gpu {kind.name}": kind for kind in KINDS} | {"gpu collect": KINDS[0]}
    todo, left = collection_cases(floors) + cases(floors), []
    try:
        now = time.monotonic()
        left = gpu_edit.run(sheet, GPURace, now + EDITS * (60 * (given.minutes - 1) - (now - started)))
        while todo and time.monotonic() - started < 60 * (given.minutes - 1):
            case = todo.pop(0)
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
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    finally:
        sheet.finish()
    todo = left + todo
    if todo:
        print(f"{len(todo)} cases were left out for want of time (--minutes): {todo[0].name} and what follows it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
