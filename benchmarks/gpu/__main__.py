"""``python -m benchmarks.gpu`` in a checkout: what ``make gpu-check`` runs.

Never imports torch: whatever happens to a GPU happens to processes that this one started."""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..lines import Record, append
from . import host, summary, tables
from .plan import timetable
from .processes import Processes, run
from .schedule import run_stage
from .stages import Stage, all_stages, dry_stages

SCHEMA = 2  # of a line: report.py's, with stage, case, state and seconds
MINUTES = 5.0  # for the stages
DRAWING = 40.0  # seconds for the picture, after them
DRAW = "import sys; sys.path.insert(0, sys.argv[1]); from rewrite_core.benchmarks.gpu.summary import main; main()"
NO_GPU = "make gpu-check needs an NVIDIA GPU, and this machine shows none (no driver answers, and no nvidia-smi)."


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu-check", description="Check and time the GPU kernels on this machine, in stages."
    )
    results = host.CHECKOUT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder for the results (benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all stages together ({MINUTES:g})")
    parser.add_argument("--stages", default="", help="some of S0,S1,S2,S3,S4 (all)")
    parser.add_argument(
        "--system", type=Path, metavar="DIR", help="the library, built there by this Python if it is not"
    )
    parser.add_argument(
        "--resume", type=Path, action="append", default=[], metavar="FILE", help="lines of earlier runs"
    )
    parser.add_argument("--look", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--build", action="store_true", help="only build the library (--system), with or without a GPU")
    parser.add_argument("--plan", action="store_true", help="only say what is known after how many minutes")
    parser.add_argument(
        "--dry-run", action="store_true", help="stages that fail, hang and crash, with or without a GPU"
    )
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="of the machine (to plan for)")
    parser.add_argument("--rehearse", action="store_true", help="S0, S1 and S2 on the CPU, with everything small")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only write a file of lines as a table (Markdown)")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help="with --table: in place of the table that this page has, not printed"
    )
    given = parser.parse_args(words)
    if not 0 < given.minutes < 1e6:
        parser.error("--minutes must be a positive number.")
    if given.into is not None and given.table is None:
        parser.error("--into needs --table, the file of lines.")
    if given.build and given.system is None:
        parser.error("--build needs --system, the folder to build in.")
    return given


def fail(sentence: str, status: int) -> int:
    print(sentence, file=sys.stderr, flush=True)
    return status


def chosen(given: argparse.Namespace) -> list[Stage]:
    """The stages that were asked for. Raises ValueError for a name that there is not."""
    everything = dry_stages() if given.dry_run else all_stages(host.CHECKOUT / "tests", given.cores)
    if given.rehearse:  # in an interpreter, on a machine that may be busy
        everything = [replace(stage, seconds=None) for stage in everything if stage.name in ("S0", "S1", "S2")]
    names = [name.strip().upper() for name in given.stages.split(",") if name.strip()]
    there = [stage.name for stage in everything]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(f"There is no stage {unknown[0]}: use {', '.join(there)}.")
    return [stage for stage in everything if not names or stage.name in names]


def prepare(given: argparse.Namespace, log: Path) -> str | None:
    """Have a library that fits (--system): None, or the sentence that says why not."""
    library = given.system.resolve()
    why = host.misfit(library)
    if why is None:
        print(f"The library in {library} fits: nothing is built.", flush=True)
        if given.build:
            host.write_stamp(library)
        return None
    lacking = host.missing(host.TO_BUILD)
    if lacking:
        return f"The library needs what {sys.executable} lacks to be built: {', '.join(lacking)}."
    print(f"Building the library in {library} ({why}) ...", flush=True)
    started = time.monotonic()
    wrong = host.build(library, log, 1800.0 if given.build else host.BUILDING)
    if wrong is None and (why := host.misfit(library)) is None:
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)
        return None
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
    return "\n".join([*said, f"The library could not be built: {wrong or why} (see {log})."])


def about(gpu: str, library: Path) -> Record:
    """What all lines of a run have in common."""
    cores = len(os.sched_getaffinity(0))
    return {
        "schema": SCHEMA,
        "machine": host.stem(gpu),
        "gpu": gpu,
        "cpu": host.cpu_name(),
        "cores": cores,
        "threads": cores,
        "load": round(os.getloadavg()[0], 2),
        "commit": host.commit(library),
        "sources": host.digest((*host.PACKED, "tests")),
        "run": now(),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def carry_on(lines: Path, earlier: Sequence[Path], common: Record) -> None:
    """Take what is right from files of earlier runs, of the same sources on such a GPU, that `lines` does not have."""
    have = {(line.get("stage"), line.get("case")) for line in summary.latest(lines, common) if line["state"] == "ok"}
    for path in earlier:
        for line in summary.latest(path, common) if path.resolve() != lines else ():
            if line["state"] == "ok" and (line["stage"], line["case"]) not in have:
                append(lines, line)


def run_stages(todo: Sequence[Stage], launcher: Processes, seconds: float, lines: Path, common: Record) -> None:
    """Every stage, and its lines; what is right already is not run again."""
    right = {(line["stage"], line["case"]) for line in summary.latest(lines, common) if line["state"] == "ok"}
    started = launcher.now()
    for stage in todo:
        done = {case.name for case in stage.cases if (stage.name, case.name) in right}
        again = f", {len(done)} of {len(stage.cases)} are known" if done else ""
        print(f"{stage.name}: {stage.what}{again} ({launcher.now() - started:.0f} s)", flush=True)

        def tell(case: str, state: str, seconds: float, reason: str, name: str = stage.name) -> None:
            for line in summary.latest(lines, common):  # a worker may have told of the case just before it was ended
                if (line["stage"], line["case"], line.get("run")) == (name, case, common["run"]):
                    return
            place = {"stage": name, "case": case, "state": state, "seconds": round(seconds, 3)}
            append(lines, {"timestamp": now(), **common, **place, "reason": reason})
            print(f"  {state:8}{case}: {reason}"[:300], flush=True)

        def show(event: Record) -> None:
            says = f": {event['says']}" if event.get("says") else ""
            print(f"  {event.get('state', '?'):8}{event['end']}{says}"[:300], flush=True)

        run_stage(stage, done, launcher, started + seconds, tell, show)


def measure(given: argparse.Namespace, todo: Sequence[Stage], gpu: str, library: Path, out: Path) -> int:
    """Run the stages; the exit status."""
    started = time.monotonic()
    lines, log, picture = (out / f"{host.stem(gpu)}.{kind}" for kind in ("jsonl", "log", "png"))
    common = about(gpu, library)
    carry_on(lines, given.resume, common)
    with host.scratch() as folder:
        shutil.rmtree(folder / "cache", ignore_errors=True)  # what was tuned, perhaps by other kernels
        task = {
            "package": "benchmarks.gpu" if given.dry_run else "rewrite_core.benchmarks.gpu",
            "library": "" if given.dry_run else str(library),
            "device": "cpu" if given.dry_run or given.rehearse else "cuda",
            "small": given.rehearse,
            "common": common,
            "lines": str(lines),
            "tests": str(host.CHECKOUT / "tests"),
            "folder": str(folder),
        }

        def variables(stage: Stage) -> dict[str, str]:
            return host.environment(stage, library, folder, interpreted=given.rehearse and not stage.tuning)

        launcher = Processes(sys.executable, host.CHECKOUT, folder, log, variables, task)
        run_stages(todo, launcher, 60.0 * given.minutes, lines, common)
        names = [stage.name for stage in todo]
        found = [line for line in summary.latest(lines, common) if line["stage"] in names]
        print("\n".join(summary.table(found)), flush=True)
        if any(line.get("contenders") for line in found):
            command = [sys.executable, "-c", DRAW, str(library), str(lines), str(picture)]
            wrong = run(command, folder, variables(todo[0]), log, DRAWING)
            print(f"There is no picture: {wrong} (see {log})." if wrong else f"-> {picture}", flush=True)
    print(f"-> {lines}, {log} ({time.monotonic() - started:.0f} s)", flush=True)
    return summary.status(found)


def main(words: Sequence[str] | None = None) -> int:
    """0: all that ran is right. 1: something is wrong, failed, crashed or hung, or nothing ran. 2: no GPU, or bad
    arguments."""
    given = arguments(words)
    if given.table is not None:
        wrong = tables.show(given.table, given.into)
        return 0 if wrong is None else fail(wrong, 2)
    try:
        todo = chosen(given)
    except ValueError as error:
        return fail(str(error), 2)
    if given.plan:
        print(timetable(todo, 60.0 * given.minutes))
        return 0
    gpu: str | None = "dry run" if given.dry_run else "rehearsal" if given.rehearse else None
    if gpu is None and not given.build:
        gpu = host.find_gpu()
        if gpu is None:
            return fail(NO_GPU, 2)
    if given.look:
        print(f"There is a GPU: {gpu}.")
        return 0
    if not (given.build or given.dry_run or given.rehearse):
        if lacking := host.missing(host.TO_RUN):
            return fail(f"make gpu-check needs what {sys.executable} lacks: {', '.join(lacking)}.", 2)
        if (blind := host.blind_torch()) is not None:
            return fail(f"make gpu-check needs a torch that sees the {gpu}, and {blind} does not.", 2)
    out = host.CHECKOUT / "build" if given.build else given.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = out / f"{host.stem(gpu or 'gpu-library')}.log"
        with open(log, "ab"):
            pass
    except OSError as error:
        return fail(f"Results cannot go to {out} ({error.strerror}): choose another folder.", 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    if given.system is not None:
        wrong = prepare(given, log)
        if wrong is not None or given.build:
            return 0 if wrong is None else fail(wrong, 1)
    library = host.CHECKOUT if given.system is None else given.system.resolve()
    assert gpu is not None
    return measure(given, todo, gpu, library, out)


if __name__ == "__main__":
    sys.exit(main())
