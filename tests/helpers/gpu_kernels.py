"""CUDA kernels (csrc/*.cu) without a GPU: built by g++ and run on the CPU; compiled by nvcc and looked at."""

import contextlib
import ctypes
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rewrite_core import backends
from rewrite_core.ops import cuda_kernels

from .kernels import CSRC, ROOT, run

# every loop of the fibers is one thread's; -O1 keeps AddressSanitizer fast
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-fno-omit-frame-pointer", f"-I{CSRC}"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(name, flags, folder):
    """The program of tests/csrc/run_<name>.cpp, in `folder`."""
    cxx = shutil.which("g++") or pytest.skip("there is no g++")
    source = ROOT / "tests" / "csrc" / f"run_{name}.cpp"
    done = run([cxx, *FLAGS, *flags, source, "-o", folder / "run"], folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder / "run"


class Failed(Exception):
    """The program ended with these words."""


def launch(program, calls, folder):
    """What each call reads of what comes out; a call has write(file) and read(file)."""
    with open(folder / "in", "wb") as file:
        for call in calls:
            call.write(file)
    words = [str(program), str(folder / "in"), str(folder / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        raise Failed(done.stderr)
    assert not done.stderr, done.stderr
    with open(folder / "out", "rb") as file:
        return [call.read(file) for call in calls]


def barriers_of(header):
    """The names in its `enum Barrier`, in their order."""
    words = re.search(r"enum Barrier.*?};", (CSRC / header).read_text(), re.S)[0]
    return re.findall(r"^  (\w+),$", words, re.M)


def numbers(address, *shape, dtype=np.float64):
    """What an address holds, as an array that writes there."""
    count = int(np.prod(shape))
    if not count:
        return np.empty(shape, dtype)
    size = np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * (size * count)).from_address(address), dtype=dtype).reshape(shape)


def stand_in(monkeypatch, op, module, extension):
    """CPU tensors stand for a GPU's: `extension` is what REWRITE_CORE_CUDA=1 builds, in a module of the backend."""
    monkeypatch.setattr(module, "extension", lambda: extension)
    monkeypatch.setattr(module, "index_of", lambda data: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0))
    records = tuple(
        backends.Backend(record.op, record.name, record.target, lambda *given: None)
        if record.name == "cuda"
        else record
        for record in backends.backends_of(op)
    )
    monkeypatch.setattr(backends, "backends_of", lambda op: records)


class Looks(TorchDispatchMode):
    """No operation that waits for a GPU, which a capture could not hold."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return operation(*args, **(kwargs or {}))


def imagined(monkeypatch, module, extension, capability=(9, 0)):
    """A GPU that is there as far as the choice of a backend looks."""
    monkeypatch.setattr(cuda_kernels, "extension_reason", lambda: None)
    monkeypatch.setattr(cuda_kernels, "extension", lambda: extension)
    for place in (cuda_kernels, module):
        monkeypatch.setattr(place, "capability", lambda index: capability)


def compile_by_nvcc(name, arch, folder):
    """The machine code of csrc/<name>.cu, and ptxas's words of its kernels."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    target = folder / f"{name}.cubin"
    words = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin", "-o", target, CSRC / f"{name}.cu"]
    done = subprocess.run(["nvcc", *map(str, words)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return target, done.stderr


def resources(said):
    """Of each kernel: bytes of stack, spill stores and spill loads; registers."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.findall(r"Used (\d+) registers", said)
    assert len(spills) == len(registers), said
    return [tuple(map(int, found)) for found in spills], [int(count) for count in registers]


def instructions(cubin):
    """SASS by the name of the kernel."""
    tool = shutil.which("cuobjdump")
    if not tool:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with the CUDA toolkit, or with triton")
        tool = f"{triton.__path__[0]}/backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True, timeout=120)
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s+Function :|\Z)", done.stdout, re.S))
