"""The machine of ``make gpu-check``: its GPU, the library that is measured, and what processes are given.

Imports nothing but the standard library, and asks the GPU's driver in a process of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .processes import run
from .stages import Stage

CHECKOUT = Path(__file__).resolve().parents[2]
BUILDING = 120.0  # seconds for the library, where a GPU waits for it
ASKING = 20.0  # seconds for the driver, which may be waking the GPU
PACKED = ("rewrite_core", "kernels", "csrc", "benchmarks")  # folders that the library is built from
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt")
KINDS = (".py", ".pyi", ".cpp", ".cu", ".h", ".npz", ".json", ".safetensors")
TO_BUILD = ("pip", "setuptools", "pybind11")
TO_RUN = ("torch", "triton", "numpy", "safetensors", "PIL", "tqdm", "matplotlib", "xxhash", "pytest")
STAMP = "built.json"  # in the library: what it was built from
DROPPED = ("REWRITE_CORE_BACKEND", "REWRITE_CORE_TUNING", "TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")

_ASK = """
import ctypes
driver, name = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(200)
count, device = ctypes.c_int(), ctypes.c_int()
for status in (
    driver.cuInit(0),
    driver.cuDeviceGetCount(ctypes.byref(count)),
    driver.cuDeviceGet(ctypes.byref(device), 0),
    driver.cuDeviceGetName(name, len(name), device),
):
    assert status == 0, status
print(name.value.decode())
"""
_version = runpy.run_path(str(CHECKOUT / "rewrite_core" / "version.py"))  # without the package, which imports torch
cpu_name = _version["cpu_name"]


def find_gpu() -> str | None:
    """The name of this machine's first NVIDIA GPU, or None: by its driver, or by nvidia-smi."""
    smi = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    for command in ([sys.executable, "-c", _ASK], smi):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=ASKING, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0].strip()
    return None


def stem(gpu: str) -> str:
    """A file name made of a GPU's name, such as "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "gpu"


def missing(names: Sequence[str]) -> list[str]:
    """Of these modules those that this Python lacks."""
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if "setuptools" in names and "setuptools" not in lacking:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
                lacking.append("setuptools 77 or newer")
    return lacking


def blind_torch() -> str | None:
    """None where this Python's torch sees a GPU (or does not say), else what that torch is."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60.0, check=False)
        version, cuda, sees = done.stdout.split()[-3:]
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None  # the stages say why
    return None if sees == "True" else f"torch {version} (CUDA {cuda}) of {sys.executable}"


def digest(folders: Sequence[str], checkout: Path = CHECKOUT) -> str:
    """Of all sources in some folders of the checkout, and of the files that the library is built with."""
    files = [checkout / name for name in FILES]
    for name in folders:  # resolved, as rewrite_core holds links to the others
        inside = (checkout / name).rglob("*")
        files += [path for path in inside if path.suffix in KINDS and "__pycache__" not in path.parts]
    total = hashlib.sha256()
    for path in sorted({path.resolve() for path in files}):
        total.update(path.relative_to(checkout.resolve()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of the checkout, "+" added where files differ from it; None without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(CHECKOUT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20.0).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def commit(library: Path) -> str | None:
    """The commit that is measured. Without git: what a library that fits was stamped with, or None."""
    found = git_commit()
    return found if found is not None or misfit(library) is not None else stamp(library).get("commit")


def find_nvcc() -> str | None:
    """CUDA's compiler, as CMake looks for it; without it the library is built without csrc/*.cu."""
    named = os.environ.get("CUDACXX")
    found = shutil.which(named or "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if not named and usual.is_file() else None)


# --- the library ---


def stamp(library: Path) -> dict[str, str]:
    try:
        found = json.loads((library / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_stamp(library: Path) -> None:
    """Of these sources; also where the library fits, as the commit may have come after it."""
    known = git_commit() or stamp(library).get("commit")
    about = {"sources": digest(PACKED), "python": sys.implementation.cache_tag, "commit": known}
    (library / STAMP).write_text(json.dumps(about) + "\n", encoding="utf-8")


def misfit(library: Path) -> str | None:
    """None where a library is one of these sources for this Python whose compiled part loads, else why not."""
    found = stamp(library)
    if not found:
        return "there is none"
    if found.get("sources") != digest(PACKED):
        return "it was built from other sources"
    if found.get("python") != sys.implementation.cache_tag:
        return f"it was built for {found.get('python')}, and this is {sys.implementation.cache_tag}"
    compiled = sorted((library / "rewrite_core").glob("_C.*.so"))
    if not compiled:
        return "it has no compiled part"
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"  # in a process of its own: it may end it
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(compiled[0])], capture_output=True, text=True, timeout=60.0, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its compiled part does not load ({error})"
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return f"its compiled part does not load here ({said})"
    return None


def build(library: Path, log: Path, seconds: float = BUILDING) -> str | None:
    """Build the library from the checkout with this Python's own packages: None, or what went wrong.

    The folder is put in place when it is whole. Nothing is downloaded."""
    partial = library.with_name(f"{library.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    nvcc = find_nvcc()
    environment = {**os.environ, "REWRITE_CORE_CUDA": "1" if nvcc else "", **({"CUDACXX": nvcc} if nvcc else {})}
    environment.pop("PYTHONPATH", None)
    beside = os.path.dirname(sys.executable)  # CMake and Ninja may be packages of this Python's
    environment["PATH"] = os.pathsep.join([beside, environment.get("PATH", os.defpath)])
    words = (
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--no-cache-dir",
        "--disable-pip-version-check",
    )
    command = [sys.executable, "-m", "pip", "install", *words, "--target", str(partial), str(CHECKOUT)]
    wrong = run(command, CHECKOUT, environment, log, seconds)
    if wrong is not None:
        shutil.rmtree(partial, ignore_errors=True)
        return wrong
    write_stamp(partial)
    shutil.rmtree(library, ignore_errors=True)
    partial.rename(library)
    return None


# --- what processes are given ---


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for caches: in the checkout, so that a second run finds what the first compiled, or where that cannot be
    written a temporary one."""
    folder = CHECKOUT / "build" / "gpu-check"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
            yield Path(temporary)
        return
    yield folder


def environment(stage: Stage, library: Path, folder: Path, interpreted: bool = False) -> dict[str, str]:
    """The variables of a stage's processes: no home is written to, and nothing that was tuned before is read."""
    variables = {name: value for name, value in os.environ.items() if name not in DROPPED}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(library), variables.get("PYTHONPATH")]))
    variables |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "", "REWRITE_CORE_TUNING": str(int(stage.tuning))}
    variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // stage.parallel))
    for name, inside in (
        ("TRITON_CACHE_DIR", "triton"),
        ("XDG_CACHE_HOME", "cache"),
        ("CUDA_CACHE_PATH", "cuda"),
        ("MPLCONFIGDIR", "matplotlib"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
    ):
        variables[name] = str(folder / inside)
    if interpreted:
        variables["TRITON_INTERPRET"] = "1"
    return variables
