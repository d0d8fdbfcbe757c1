"""The C++ kernels under sanitizers and valgrind: tests/csrc/check_kernels.cpp, without torch and Python around it."""

import concurrent.futures
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PROGRAM = Path(__file__).parent / "csrc" / "check_kernels.cpp"

# No OpenMP: libgomp is not instrumented, so ThreadSanitizer would see races where it waits. Plain threads run the same
# code. -O1 compiles fast and keeps the vector code.
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-pthread", f"-I{CSRC}"]
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


def run(command, cwd, **variables):
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=600)


def instruction_sets():
    """Their compiler flags, from the one place that has them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = {name: flags.split() for name, flags in re.findall(r"^set\(flags_(\w+) ([^)]*)\)", text, re.MULTILINE)}
    assert "portable" in found and found["portable"] == ['""'] and len(found) >= 3
    return found | {"portable": []}


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
    jobs = []
    for source in sorted(CSRC.glob("*.cpp")):
        if source.name == "bindings.cpp":
            continue
        if not source.stem.endswith("_isa"):
            jobs.append((source, [], source.stem))
            continue
        for isa, extra in instruction_sets().items():
            macros = [f"-DREWRITE_CORE_ISA={isa}", f"-DREWRITE_CORE_ISA_{isa}=1"]
            jobs.append((source, [*extra, "-fno-exceptions", *macros], f"{source.stem}_{isa}"))
    jobs.append((PROGRAM, [], PROGRAM.stem))

    def compile_one(job):
        source, extra, name = job
        return run([cxx, *FLAGS, *flags, *extra, "-c", source, "-o", folder / f"{name}.o"], folder)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in pool.map(compile_one, jobs):
            assert done.returncode == 0, done.stderr
    linked = run([cxx, *FLAGS, *flags, *(folder / f"{name}.o" for *_, name in jobs), "-o", folder / "check"], folder)
    assert linked.returncode == 0, linked.stderr
    return request.param, folder / "check"


def checked(build, *words):
    kind, program = build
    if kind == "valgrind":
        program = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", program]
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
