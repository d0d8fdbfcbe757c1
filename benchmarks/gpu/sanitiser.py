"""S4: compute-sanitizer watches the launch of a kernel.

memcheck's findings are errors. racecheck's are only told: threads that hold the same sum and write it twice are a race
to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .stages import Case, all_stages
from .worker import SKIPPED, Setting, Skipped, die_with_parent

TOOL = "compute-sanitizer"
WORDS = {
    "memcheck": ("--report-api-errors=no",),  # torch asks for what may fail, and looks whether it did
    "racecheck": (),
}
FINDING = r"=+ (Invalid|Misaligned|Out-of-range|(Error|Warning): (Race|Potential))"
LAUNCH = """import sys
sys.path.insert(0, sys.argv[1])
from rewrite_core.benchmarks.gpu.modes import launch
launch(sys.argv[2])"""
TIMEOUT = 55.0  # a little less than the case's limit, so that its findings until then are told


def sound() -> bool:
    return True  # nothing of the GPU is in this process


def tool() -> str:
    found = shutil.which(TOOL)
    places = sorted(place for place in Path("/usr/local").glob(f"cuda*/bin/{TOOL}") if place.is_file())
    if found is None and not places:
        raise Skipped(f"{TOOL} is not installed")
    return found or str(places[-1])


def launched(name: str, setting: Setting) -> dict[str, Any]:
    """The arguments of a case of S1."""
    cases: dict[str, Case] = {case.name: case for stage in all_stages(setting.tests, 1) for case in stage.cases}
    return cases[name].arguments


def run(name: str, arguments: dict[str, Any], setting: Setting) -> dict[str, Any]:
    kind = arguments["tool"]
    words = ["--target-processes=application-only", "--print-limit=20", *WORDS[kind]]
    launch = [sys.executable, "-c", LAUNCH, setting.installed, json.dumps(launched(arguments["launches"], setting))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [tool(), f"--tool={kind}", *words, *launch]
    output = setting.folder / f"sanitiser-{os.getpid()}.txt"  # no pipe: what outlives the tool would hold it open
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=setting.folder,
            env=environment,
            preexec_fn=die_with_parent,
        )
    late = False
    try:
        process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        late = True
    said = output.read_text(encoding="utf-8", errors="replace")
    output.unlink()
    print(said, flush=True)
    lines = said.splitlines()
    for line in lines:
        if line.startswith(SKIPPED):
            raise Skipped(line.removeprefix(SKIPPED))
    findings = [line for line in lines if re.match(FINDING, line)]
    record: dict[str, Any] = {"tool": kind, "findings": len(findings), "found": findings[:10]}
    if findings and kind == "memcheck":
        return record | {"state": "wrong", "reason": findings[0]}
    if late:
        return record | {
            "state": "timeout",
            "reason": f"ended after {TIMEOUT:.0f} s; {len(findings)} findings until then",
        }
    if "launched" not in said:
        last = (lines or ["nothing was said"])[-1]
        return record | {"state": "failed", "reason": f"the kernel was not launched: {last}"}
    return record
