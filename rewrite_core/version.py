"""What is installed and on what: the version (only pyproject.toml states it), the sources, the CPU."""

import hashlib
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("rewrite_core")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0+source"


def _digest(folder: Path, *patterns: str) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def source_digest(checkout: Path) -> str:
    """Of the compiled sources of a checkout: what the extension remembers it was built with."""
    return _digest(checkout, "csrc/**/*", "CMakeLists.txt")


def python_digest(package: Path) -> str:
    """Of the Python files of a package folder, installed or in a checkout; kernels/ and benchmarks/ may be links."""
    return _digest(package, "**/*.py", "kernels/**/*.py", "benchmarks/**/*.py")


def no_kernels() -> str | None:
    """Why this machine has no C++ kernels, or None where it can have them: 64-bit Linux on x86-64 and aarch64."""
    system, machine = platform.system(), platform.machine()
    bits = 64 if sys.maxsize > 1 << 32 else 32
    if system == "Linux" and machine.lower() in ("x86_64", "amd64", "aarch64", "arm64") and bits == 64:
        return None
    return f"they are for 64-bit Linux on x86-64 and aarch64, and this is {bits}-bit {system} on {machine}"


def cpu_name() -> str:
    """The CPU's model name; never the machine's own name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()
