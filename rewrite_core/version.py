"""What is installed and on what: the version (only pyproject.toml states it), the sources it was built from, the CPU."""

import hashlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("rewrite_core")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0+source"


def source_digest(folder: Path) -> str:
    """Of the C++ and Python sources of a checkout: what the extension remembers it was built with."""
    digest = hashlib.sha256()
    for pattern in ("csrc/*", "kernels/*.py", "rewrite_core/**/*.py", "CMakeLists.txt"):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cpu_name() -> str:
    """The CPU's model name; never the machine's own name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()
