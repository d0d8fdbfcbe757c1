"""The kernels on aarch64: compiled by a cross compiler, run by qemu, and their inner loops read."""

import os
import re
import shutil

import pytest
from helpers.kernels import compile_checks, run

CXX, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
QEMU = next(filter(shutil.which, ("qemu-aarch64-static", "qemu-aarch64")), "qemu-aarch64-static")
REQUIRED = os.environ.get("CI") == "true"  # .ci/install-aarch64 installs the tools


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    missing = [tool for tool in (CXX, OBJDUMP, QEMU) if not shutil.which(tool)]
    if missing:
        reason = f"{', '.join(missing)} not installed: .ci/install-aarch64 does it on Debian"
        pytest.fail(reason) if REQUIRED else pytest.skip(reason)
    # as CMake's release build; static, so that qemu needs no system of that kind
    return compile_checks(CXX, ["-O3", "-DNDEBUG", "-static"], tmp_path_factory.mktemp("aarch64"), "aarch64")


def test_the_kernels_are_right(program):
    done = run([QEMU, program], program.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"[1-9]\d{2,} checks, 0 wrong, on portable\n", done.stdout), done.stdout


# The functions where nearly all of the time goes, and how many vector multiply-adds each holds at least.
LOOPS = {
    "second_moment": {"tile_of<float, 3, 8": 24, "tile_of<double, 3, 8": 24},
    "fit_low_rank": {"gram_of<4, float>": 16, "gram_of<3, double>": 9, "factorise": 8},
    "fit_projected": {"pull": 8, "push": 8},
    "spd_solve": {"subtract(": 12, "solve_rows": 8, "forward_rows<8": 16, "backward_rows<8": 16},
}


@pytest.mark.parametrize("op", LOOPS)
def test_inner_loops_are_vectors(program, op):
    """NEON's multiply-adds, and none of single numbers."""
    done = run([OBJDUMP, "-d", "-C", "--no-show-raw-insn", program.parent / f"{op}_isa_portable.o"], program.parent)
    functions = re.split(r"^[0-9a-f]+ <(?=.*>:$)", done.stdout, flags=re.MULTILINE)[1:]
    for name, least in LOOPS[op].items():
        found = [text for text in functions if re.search(rf"\b{re.escape(name)}", text.partition("\n")[0])]
        assert found, f"no function {name} in {op}"
        for text in found:
            vectors = len(re.findall(r"\bfml[as]\tv\d+\.(?:2d|4s)", text))
            single = len(re.findall(r"\bfn?m(?:add|sub)\t[sd]\d+", text))
            assert vectors >= least and not single, f"{name}: {vectors} of vectors, {single} of single numbers"
