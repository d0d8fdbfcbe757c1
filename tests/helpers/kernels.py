"""csrc/ without Python: compiled as CMakeLists.txt does, with tests/csrc/check_kernels.cpp on top."""

import concurrent.futures
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PROGRAM = ROOT / "tests" / "csrc" / "check_kernels.cpp"

# No OpenMP: sanitizers do not know libgomp, and plain threads run the same code.
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-pthread", f"-I{CSRC}"]


def run(command, cwd, **variables):
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=600)


def instruction_sets(processor):
    """Their compiler flags, from the one place that has them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags = {name: words.split() for name, words in re.findall(r"^set\(flags_(\w+) ([^)]*)\)", text, re.MULTILINE)}
    sets = re.search(rf"^set\(isas_{processor} ([^)]*)\)", text, re.MULTILINE)[1].split()
    assert "portable" in sets and flags.pop("portable") == ['""']
    return {name: flags.get(name, []) for name in sets}


def compile_checks(cxx, flags, folder, processor):
    """The objects in `folder` and the program, which is returned."""
    jobs = []
    for source in sorted(CSRC.glob("*.cpp")):
        if source.name == "bindings.cpp":
            continue
        if not source.stem.endswith("_isa"):
            jobs.append((source, [], source.stem))
            continue
        for isa, extra in instruction_sets(processor).items():
            macros = [f"-DREWRITE_CORE_ISA={isa}", f"-DREWRITE_CORE_ISA_{isa}=1"]
            jobs.append((source, [*extra, "-fno-exceptions", *macros], f"{source.stem}_{isa}"))
    jobs.append((PROGRAM, ["-Wno-psabi"], PROGRAM.stem))

    def compile_one(job):
        source, extra, name = job
        return run([cxx, *FLAGS, *flags, *extra, "-c", source, "-o", folder / f"{name}.o"], folder)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in pool.map(compile_one, jobs):
            assert done.returncode == 0, done.stderr
    objects = [folder / f"{name}.o" for *_, name in jobs]
    linked = run([cxx, *FLAGS, *flags, *objects, "-o", folder / "check"], folder)
    assert linked.returncode == 0, linked.stderr
    return folder / "check"
