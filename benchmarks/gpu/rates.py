"""S0: what this machine is, and what it does at most: bytes copied and operations of large matrix products a second."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .timing import event_seconds, peak_bytes, sound, there
from .worker import Setting, Skipped, why

__all__ = ["run", "sound"]

COPIED = 1 << 30  # bytes; several times a level-2 cache
SIZES = {"tf32": 8192, "bfloat16": 8192, "float64": 4096, "float32": 8192}  # of the matrices
SMALL = 64
ASKED = (
    *("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "temperature.gpu", "memory.total", "compute_mode", "mig.mode.current"),
)
PROPERTIES = (
    *("name", "total_memory", "multi_processor_count", "L2_cache_size", "shared_memory_per_block_optin"),
    *("shared_memory_per_multiprocessor", "regs_per_multiprocessor", "max_threads_per_multi_processor"),
)


def run(name: str, arguments: dict[str, Any], setting: Setting) -> dict[str, Any]:
    if setting.device == "cuda" and not there():
        raise Skipped(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU")
    if name == "environment":
        return environment()
    if name == "driver and clocks":  # the clocks just after the products
        return {"driver": nvidia_smi(ASKED)}
    if name == "copy bandwidth":
        return copy_bandwidth(setting)
    return matrix_rate(arguments["rate"], setting)


def environment() -> dict[str, Any]:
    """What torch says; None where it does not say it."""
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": _or_none(torch.backends.cudnn.version)}
    if there():
        properties = torch.cuda.get_device_properties(0)
        facts["properties"] = {item: getattr(properties, item, None) for item in PROPERTIES}
        facts["capability"] = list(torch.cuda.get_device_capability(0))
    return {"environment": facts, "peak_bytes": peak_bytes()}


def nvidia_smi(names: Sequence[str]) -> dict[str, str] | str:
    """What nvidia-smi says of the first GPU, one question at a time where it does not know one of them; or why not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "there is no nvidia-smi"
    try:
        command = [tool, "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return why(error)
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())[:300]
        return words if len(names) == 1 else {item: str(nvidia_smi([item])) for item in names[:4]}
    parts = done.stdout.strip().splitlines()[0].split(",")
    return dict(zip(names, (part.strip() for part in parts)))


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:
        return None


def least_seconds(call: Callable[[], object], rounds: int = 10) -> float:
    for _ in range(3):
        call()
    return min(event_seconds(call) for _ in range(rounds))


def copy_bandwidth(setting: Setting) -> dict[str, Any]:
    """From device memory to device memory, counting bytes read and bytes written."""
    count = (1 << 16 if setting.small else COPIED) // 4
    source = torch.rand(count, device=setting.device)
    target = torch.empty_like(source)
    rate = 2.0 * source.nbytes / least_seconds(lambda: target.copy_(source))
    assert torch.equal(source[-7:], target[-7:])
    return {"rate": rate, "unit": "bytes/s (read and written)"}


def matrix_rate(name: str, setting: Setting) -> dict[str, Any]:
    """Of a square product of random numbers."""
    size = SMALL if setting.small else SIZES[name]
    dtype = {"tf32": torch.float32, "float32": torch.float32}.get(name) or getattr(torch, name)
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    left, right = (torch.randn(size, size, device=setting.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = least_seconds(lambda: torch.mm(left, right, out=out), rounds=5 if name in ("float64", "float32") else 10)
    return {"rate": 2.0 * size**3 / seconds, "unit": "operations/s", "size": size}
