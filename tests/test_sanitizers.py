"""The C++ kernels under sanitizers and valgrind: tests/csrc/check_kernels.cpp, without torch and Python around it."""

import os
import platform
import re
import shutil

import pytest
from helpers.kernels import compile_checks, run

# -O1 compiles fast and keeps the vector code.
FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer"]
BUILDS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],  # and undefined behaviour
    "thread": ["-fsanitize=thread"],
    "valgrind": [],
}


def compiler():
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name):
            return name
    pytest.skip("there is no C++ compiler")


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """A kind of build and the program: csrc/ but for the bindings, compiled as CMakeLists.txt does, and a main()."""
    flags, folder = BUILDS[request.param], tmp_path_factory.mktemp(request.param)
    cxx = compiler()
    if request.param == "valgrind" and not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = run([cxx, *FLAGS, *flags, probe, "-o", folder / "probe"], folder)
    if linked.returncode or run([folder / "probe"], folder).returncode:
        pytest.skip(f"programs that {cxx} makes with {' '.join(flags)} do not link or run here")
    return request.param, compile_checks(cxx, [*FLAGS, *flags], folder, platform.machine())


def checked(build, *words):
    kind, program = build
    if kind == "valgrind":
        # definite: threads that run until the end keep what is "possibly lost"
        leaks = ["--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]
        program = ["valgrind", "-q", "--error-exitcode=9", *leaks, program]
        return run([*program, *words], build[1].parent)
    return run([program, *words], program.parent, UBSAN_OPTIONS="print_stacktrace=1")


def test_the_kernels_are_clean(build):
    """Valgrind: the smallest cases, and no AVX-512, which it does not know."""
    done = checked(build, *(["smallest", "portable", "avx2"] if build[0] == "valgrind" else []))
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert re.fullmatch(r"[1-9]\d* checks, 0 wrong, on portable.*\n", done.stdout), done.stdout


MISTAKES = {
    "address": ("overrun", "heap-buffer-overflow"),
    "thread": ("race", "data race"),
    "valgrind": ("unwritten", "uninitialised"),
}


def test_a_mistake_is_caught(build):
    mistake, words = MISTAKES[build[0]]
    done = checked(build, mistake)
    assert done.returncode != 0 and words in done.stderr, done.stdout + done.stderr
