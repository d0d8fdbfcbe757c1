"""The memory that the command line keeps for its next pictures."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "kept_memory.py"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep it")
def test_freed_memory_stays_with_the_process():
    def kept(*words: str) -> int:
        return int(subprocess.run([sys.executable, PROGRAM, *words], check=True, capture_output=True, text=True).stdout)

    assert kept() < 100 < 180 < kept("kept")
