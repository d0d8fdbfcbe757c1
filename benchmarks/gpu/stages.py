"""The stages of ``make gpu-check`` and their cases: what runs, in which order and processes, and how long it may take.

Only data. Imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STARTING = 60.0  # seconds that a process may take before its first case: importing torch, and waking the GPU


@dataclass(frozen=True)
class Case:
    """One line of results.

    limit      seconds after which its process is ended (S3: of each test)
    expected   seconds that it was guessed to take on an H100, compilation included; only the plan uses it
    arguments  for the stage's module
    """

    name: str
    limit: float = 30.0
    expected: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Groups of cases; each group has a process of its own, which runs its cases one after the other.

    seconds   that all of it may take, from the first case on; None: what is left
    reserved  seconds that it leaves to the stages after it, where `seconds` is None
    parallel  groups that run at a time; the others wait
    alone     the last so many groups run while no other does
    module    the file beside this one that runs the cases
    tuning    whether kernels are tuned; else default configurations
    starting  seconds that a process was guessed to take to its first case; only the plan uses it
    """

    name: str
    what: str
    module: str
    groups: tuple[tuple[Case, ...], ...]
    seconds: float | None = None
    reserved: float = 0.0
    parallel: int = 1
    alone: int = 0
    tuning: bool = False
    starting: float = 5.0

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(case for group in self.groups for case in group)


# --- S0 ---

RATES = ("tf32", "bfloat16", "float64", "float32")


def _s0() -> Stage:
    cases = [Case("environment", 20.0, 0.5), Case("copy bandwidth", 10.0, 0.5)]
    cases += [Case(f"rate {name}", 10.0, 0.5, {"rate": name}) for name in RATES]
    cases.append(Case("driver and clocks", 20.0, 0.5))
    return Stage(
        "S0", "environment, copy bandwidth, matrix rates", "rates", (tuple(cases),), seconds=10.0, starting=8.0
    )


# --- S1 ---

# name, op's arguments: see modes.py
Rows = tuple[tuple[str, dict[str, Any]], ...]
MOMENTS: Rows = (
    ("float32 x3, 512 channels", {"channels": 512}),
    ("bfloat16, 512 channels", {"channels": 512, "dtype": "bfloat16"}),
    ("float32 x3, 64 channels", {"channels": 64}),
    ("bfloat16, 64 channels", {"channels": 64, "dtype": "bfloat16"}),
    ("float32 x3, 100 channels", {"channels": 100}),
    ("float32 x3, channels_last", {"channels": 256, "layout": "channels_last"}),
    ("float32 x3, cropped maps", {"channels": 256, "layout": "cropped"}),
    ("float16, 256 channels", {"channels": 256, "dtype": "float16"}),
    ("float32 tf32, 256 channels", {"channels": 256, "precision": "tf32"}),
    ("float32 ieee, 256 channels", {"channels": 256, "precision": "ieee"}),
)
FITS: tuple[Rows, ...] = (
    (
        ("l1, linear", {}),
        ("l2, linear: closed form", {"loss": "l2"}),
        ("l1, leaky", {"slope": 0.2}),
        ("l2, leaky", {"slope": 0.2, "loss": "l2"}),
        ("l2, linear, preserve: closed form", {"loss": "l2", "preserve": True}),
        ("l1, linear, 16 directions, 4x4: dual form", {"rank": 16, "side": 4}),
    ),
    (
        ("l1, demodulated", {"slope": 0.2, "demodulated": True}),
        ("l2, demodulated", {"slope": 0.2, "demodulated": True, "loss": "l2"}),
        ("l1, demodulated, preserve", {"slope": 0.2, "demodulated": True, "preserve": True}),
        ("l1, demodulated, 4 directions", {"slope": 0.2, "demodulated": True, "rank": 4}),
        ("l1, demodulated, segments", {"slope": 0.2, "demodulated": True, "segments": True}),
    ),
)
DESCENTS: Rows = (
    ("l1, linear", {}),
    ("l1, demodulated", {"slope": 0.2, "demodulated": True}),
    ("l2, demodulated", {"slope": 0.2, "demodulated": True, "loss": "l2"}),
    ("l1, leaky, projected gradient", {"slope": 0.2, "project_gradient": True}),
    ("l1, demodulated, projected gradient", {"slope": 0.2, "demodulated": True, "project_gradient": True}),
    ("l1, linear, 13x13: several tiles", {"side": 13}),
    ("l1, linear, no directions", {"rank": 0}),
)
SOLVES: Rows = (
    ("n 512", {"n": 512}),
    ("8 of n 64", {"n": 64, "batch": 8}),
    ("n 96, rank-deficient", {"n": 96, "keys": 40}),
)
# by the CUDA kernel of csrc/fit_projected.cu: a cluster, one block, and more directions than are done at a time
KERNEL_DESCENTS: Rows = tuple(
    (f"kernel, {name}", {**size, "backend": "cuda"})
    for name, size in (
        *(row for row in DESCENTS if "tiles" not in row[0]),
        ("l1, demodulated, 16 directions", {"slope": 0.2, "demodulated": True, "rank": 16}),
        ("l1, demodulated, 8 channels", {"slope": 0.2, "demodulated": True, "channels": 8}),
    )
)
# by the CUDA kernel of csrc/spd_solve.cu, in one launch: a block a matrix, then a cluster
KERNEL_SOLVES: Rows = tuple(
    (f"kernel, {name}", {**size, "backend": "cuda"})
    for name, size in (*SOLVES, ("n 1", {"n": 1}), ("n 203", {"n": 203}), ("n 300", {"n": 300, "batch": 3}))
)


def _s1() -> Stage:
    def group(kind: str, rows: Rows, expected: float) -> tuple[Case, ...]:
        return tuple(Case(f"{kind} {name}", 25.0, expected, {"op": kind, **more}) for name, more in rows)

    groups = (
        group("second_moment", MOMENTS, 1.5),
        group("fit_low_rank", FITS[0], 4.5),
        group("fit_low_rank", FITS[1], 5.0),
        group("fit_projected", DESCENTS, 3.0)
        + group("fit_projected", KERNEL_DESCENTS, 0.5)
        + group("spd_solve", (*SOLVES, *KERNEL_SOLVES), 0.5),
    )
    return Stage("S1", "every kernel and mode against float64", "modes", groups, seconds=40.0, parallel=len(groups))


# --- S2 ---


def _moment(channels: int, kind: str, side: int = 0, batch: int = 0) -> Case:
    """2^26 numbers, several times a level-2 cache, unless side and batch are given."""
    if not side:
        side = {64: 256, 128: 128, 256: 128, 512: 64, 1024: 32, 2048: 32}[channels]
        batch = (1 << 26) // (channels * side * side)
    size = {"channels": channels, "side": side, "batch": batch, "kind": kind}
    return Case(f"second_moment {kind}, {channels} @ {side}x{side}, batch {batch}", 30.0, 2.5, {"of": "moment", **size})


def _fit(kind: str, rank: int, edits: int) -> Case:
    name = f"fit {kind}, rank {rank}, {edits} edit{'s' * (edits > 1)}"
    return Case(name, 45.0, 10.0 if edits == 1 else 7.0, {"of": "fit", "kind": kind, "rank": rank, "edits": edits})


def _projected(kind: str, backend: str = "") -> Case:
    by, how = ("by the CUDA kernel, ", {"backend": backend}) if backend else ("", {})
    name = f"projected {by}{kind}, 201 steps"
    return Case(name, 45.0, 3.0 if backend else 9.0, {"of": "projected", "kind": kind, "steps": 201, **how})


def _solve(n: int, batch: int = 1, sides: int = 8, backend: str = "reference") -> Case:
    by = "by the CUDA kernel, " if backend == "cuda" else ""
    name = f"solve {by}{f'{batch} of ' if batch > 1 else ''}n {n}, {sides} right-hand sides"
    expected = 1.5 if n > 512 else 0.8  # an H200 took 1.3 s at n 1024, and 0.8 s at 512
    return Case(name, 20.0, expected, {"of": "solve", "n": n, "batch": batch, "sides": sides, "backend": backend})


def _collect(layer: str) -> Case:
    return Case(f"collect StyleGAN2-256 {layer}, batch 32", 30.0, 5.0, {"of": "collect", "layer": layer})


def _s2() -> Stage:
    """A run that is cut off has the most informative ones: one of each target first, then the ends of the ranges."""
    cases = (
        _moment(512, "x3"),
        _fit("stylegan2", 1, 1),
        _projected("stylegan2"),
        _moment(512, "bfloat16"),
        _solve(512, backend="cuda"),
        _solve(512),
        _projected("stylegan2", backend="cuda"),
        _moment(64, "x3"),
        _moment(64, "bfloat16"),
        _fit("stylegan2", 1, 64),
        _moment(2048, "x3"),
        _moment(2048, "bfloat16"),
        _solve(64, backend="cuda"),
        _solve(64),
        _solve(2048),
        _collect("convs.6.conv"),
        _moment(128, "x3"),
        _moment(128, "bfloat16"),
        _moment(256, "x3"),
        _moment(256, "bfloat16"),
        _moment(1024, "x3"),
        _moment(1024, "bfloat16"),
        _solve(128),
        _solve(256),
        _solve(1024),
        _solve(64, batch=64),
        *(_solve(n, backend="cuda") for n in (128, 256)),
        _solve(64, batch=64, backend="cuda"),
        _fit("linear", 1, 1),
        _projected("linear"),
        _projected("linear", backend="cuda"),
        _moment(512, "x3", 4, 8),
        _moment(64, "x3", 16, 8),
        _moment(2048, "x3", 4, 8),
        _collect("convs.11.conv"),
        _fit("stylegan2", 4, 64),
        _fit("linear", 1, 64),
    )
    return Stage("S2", "the targets, timed", "targets", (cases,), seconds=125.0, tuning=True)


# --- S3 and S4 ---

SHARDS = 3  # processes that share the tests of a file: most of their time they compile
# tests that must not share the GPU: what they measure or need would depend on the others
ALONE = ("test_memory_is_constant", "test_no_host_synchronisation_between_batches", "test_gpu_more_than_2_31_numbers")


def marked(folder: Path) -> list[str]:
    """The files of tests that need a GPU, relative to their folder."""
    files = sorted(folder.rglob("test_*.py"))
    return [
        file.relative_to(folder).as_posix()
        for file in files
        if "pytest.mark.gpu" in file.read_text(encoding="utf-8") and not file.name.startswith("test_gpu_")
    ]


def _s3(tests: Path, cores: int) -> Stage:
    files = marked(tests) if tests.is_dir() else []
    shards = [
        Case(f"{file} {part + 1}/{SHARDS}", 120.0, 45.0, {"files": [file], "part": part, "parts": SHARDS})
        for part in range(SHARDS)
        for file in files
    ]
    alone = Case("tests that share the GPU with no others", 60.0, 15.0, {"files": files, "alone": True})
    groups = tuple((case,) for case in [*shards, alone]) if files else ()
    parallel = max(1, min(len(shards), cores))
    return Stage("S3", "the tests", "tests", groups, reserved=45.0, parallel=parallel, alone=1, starting=8.0)


# by kernel: S1's case that launches it
SANITISED = {
    "second_moment": "second_moment float32 x3, 100 channels",
    "fit_low_rank": "fit_low_rank l1, demodulated",
    "fit_low_rank, dual form": "fit_low_rank l1, linear, 16 directions, 4x4: dual form",
    "fit_low_rank, closed form": "fit_low_rank l2, linear: closed form",
    "fit_projected": "fit_projected l1, demodulated",
    "fit_projected, CUDA kernel": "fit_projected kernel, l1, demodulated",
    "spd_solve, CUDA kernel": "spd_solve kernel, n 300",
}


def _s4() -> Stage:
    cases = [
        Case(f"{tool} {kernel}", 60.0, 15.0, {"tool": tool, "launches": launched})
        for tool in ("memcheck", "racecheck")
        for kernel, launched in SANITISED.items()
    ]
    groups = tuple((case,) for case in cases)
    return Stage("S4", "compute-sanitizer", "sanitiser", groups, parallel=5, starting=0.2)


def all_stages(tests: Path, cores: int) -> list[Stage]:
    """All of them, in order. `tests`: the folder of the tests."""
    return [_s0(), _s1(), _s2(), _s3(tests, cores), _s4()]


# --- a dry run ---

HARM = ("raise", "refuse", "hang", "abort", "segfault", "kill", "exit", "garbage", "close")


def dry_stages() -> list[Stage]:
    """Stand-ins that do what goes wrong, between others that do not: what is around them must survive."""

    def case(name: str, does: str, limit: float = 1.0) -> Case:
        return Case(name, limit, 0.1, {"does": does})

    bad = tuple(case(f"{does} {number}", does) for number, does in enumerate(HARM))
    good = tuple(case(f"good {number}", "well") for number in range(len(HARM) + 1))
    mixed = tuple(one for pair in zip(good, bad) for one in pair) + good[-1:]
    return [
        Stage("D0", "all is well", "dry", ((case("first", "well"),),), seconds=20.0),
        Stage("D1", "every harm, in one process after the other", "dry", (mixed,), seconds=60.0),
        Stage(
            "D2",
            "side by side",
            "dry",
            tuple((one, case(f"after {one.name}", "well")) for one in bad),
            60.0,
            parallel=3,
        ),
        Stage("D3", "a module that cannot be imported", "dry_missing", ((case("never", "well"),),), seconds=20.0),
        Stage(
            "D4", "too slow", "dry", ((case("in time", "well"), case("slow", "wait", 60.0), case("left", "well")),), 2.0
        ),
        Stage("D5", "what is left", "dry", ((case("last", "well"),),)),
    ]
