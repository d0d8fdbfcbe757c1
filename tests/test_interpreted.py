"""The Triton kernels' numbers, in Triton's interpreter: the tests of tests/interpreted, each file in its own process.

TRITON_INTERPRET must be set before Triton decorates a kernel, so these cannot run beside the others. The interpreter
multiplies in full float32, so it cannot show what tensor cores cut off: tests/test_second_moment_triton.py emulates it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs_triton_interpreter

FILES = sorted((Path(__file__).parent / "interpreted").glob("*.py"))


@needs_triton_interpreter
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_there_are_some():
    assert {"fit_low_rank", "fit_projected", "second_moment"} <= {file.stem for file in FILES}
