"""Where measurements go: one JSON line each, a table on the terminal, a picture per op.

Lines are only ever appended, to ``<machine>.jsonl`` (quick runs: ``<machine>.quick.jsonl``); a picture shows
the latest line of every case.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import rewrite_core
from rewrite_core.backends import extension, extension_reason
from rewrite_core.files import atomic_write
from rewrite_core.version import __version__, cpu_name, python_digest, source_digest

from .lines import Record, append, read

SCHEMA = 2
QUIET = 0.5  # load average; above it OpenMP's spinning threads meet others, and wait for whole time slices


def checkout() -> Path | None:
    """The source checkout these benchmarks belong to: around this file, or the working directory; or None."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        project = folder / "pyproject.toml"
        if project.is_file() and re.search(r'^name = "rewrite_core"', project.read_text(), re.MULTILINE):
            return folder
    return None


def machine_name() -> str:
    """A file name made of the CPU's model name, such as "amd-epyc-9654"."""
    plain = re.sub(r"\(r\)|\(tm\)|@.*|\bcpu\b|\bprocessor\b", " ", cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def commit() -> str | None:
    """The git commit that was measured, "+" added where files differ from it.

    None without git or checkout, and where the installed library was built from other sources than lie there.
    """
    folder = checkout()
    if folder is None or extension_reason() is not None or extension().source() != source_digest(folder):
        return None
    if python_digest(Path(rewrite_core.__file__).parent) != python_digest(folder / "rewrite_core"):
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return None


def environment() -> Record:
    """What is the same for every line of a run. `load`, the load average, is from before it started."""
    return {
        "schema": SCHEMA,
        "machine": machine_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": extension().isa() if extension_reason() is None else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rewrite_core": __version__,
        "commit": commit(),
    }


def disturbance(here: Record) -> str:
    """What to say of a line measured on a busy machine."""
    return f"not a quiet machine (load average {here['load']}): measure again before you quote these times"


def duration(seconds: float) -> str:
    """Three digits with a unit: 1.23 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def part_of(times: Record) -> str:
    """What to say of times that are of a part of the job."""
    return "" if times["part"] == 1.0 else f" (times: {times['part']:.1g} of the job)"


class Report:
    """Collects the measurements of one run. Raises OSError where `out` cannot be written."""

    def __init__(self, out: Path, quick: bool, write: Callable[[str], None]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.environment = environment()
        self.stem = self.environment["machine"] + ".quick" * quick
        self.out, self.path = out, out / f"{self.stem}.jsonl"
        self.quick = quick
        self.records: list[Record] = []
        self._write = write

    def start(self) -> None:
        """Says what is measured on, and the column heads."""
        here = self.environment
        self._write(
            f"{here['cpu']} ({here['isa'] or 'extension not built'}), {here['threads']} threads, torch "
            f"{here['torch']}, rewrite_core {here['rewrite_core']}, commit {(here['commit'] or '-')[:12]}"
        )
        if here["load"] > QUIET:
            self._write(f"note: {disturbance(here)}")
        if self.quick:
            self._write("note: tiny cases and no tests: this shows that benchmarks work, not how fast we are")
        self._write("")
        self._write(f"{'':34}{'p50':>9}{'p20':>9}{'p80':>9}{'GFLOP/s':>9}{'error':>10}{'time / ours':>12}")

    def add(self, measured: Record) -> None:
        """Append the line and print the case."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"timestamp": now, **self.environment, **measured}
        append(self.path, record)
        self.records.append(record)
        share = ""
        if record["yardstick"] is not None:
            rate = record["yardstick"]["gflops"]
            share = f", {record['gflops'] / rate:.2f} of the rate of {record['yardstick']['name']} ({rate:.3g} GFLOP/s)"
        self._write(f"{record['op']}: {record['case']} ({record['backend']}){share}")
        for name, times in record["contenders"].items():
            best = "*" if name == record["best_stock"] else " "
            self._write(
                f"  {best} {name:30}{duration(times['p50']):>9}{duration(times['p20']):>9}"
                f"{duration(times['p80']):>9}{times['gflops']:9.3g}{times['error']:10.1e}"
                f"{times['p50'] / times['part'] / record['p50']:11.2f}x{part_of(times)}"
            )

        if record.get("per_second"):
            what, *names = (name for name in record["per_second"] if name != "together")
            rates = (f"{name} {record['per_second'][name]:.3g}" for name in names)
            self._write(f"    {record['per_second'][what]} a second: {', '.join(rates)}")
        if record.get("stages"):
            whole = sum(record["stages"].values())
            parts = (f"{stage} {duration(took)} ({took / whole:.0%})" for stage, took in record["stages"].items())
            self._write(f"    of ours: {', '.join(parts)}")

    def finish(self) -> None:
        """Prints the geometric mean of the ratios of every op, and draws the pictures."""
        for op in dict.fromkeys(record["op"] for record in self.records):
            picture = self.out / f"{self.stem}.{op}.png"
            lines = [record for record in read(self.path) if record["op"] == op and record["schema"] == SCHEMA]
            latest = {record["case"]: record for record in lines}
            draw(op, list(latest.values()), picture)
            ours = [record for record in self.records if record["op"] == op]
            for group in dict.fromkeys(record["group"] for record in ours):
                ratios = [record["ratio"] for record in ours if record["group"] == group]
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                self._write(
                    f"{op}{', ' * bool(group)}{group}: the best stock expression (*) takes {mean:.2f}x our time, "
                    f"geometric mean over {len(ratios)} cases (worst {min(ratios):.2f}x)"
                )
            self._write(f"-> {picture}")
        if self.records:
            self._write(f"{len(self.records)} lines appended to {self.path}")
            if self.environment["load"] > QUIET:
                self._write(f"note: {disturbance(self.environment)}")


def draw(op: str, records: list[Record], path: Path) -> None:
    """Medians with their 20 % and 80 % marks, one group of bars per case, as PNG."""
    # slow to import, so only here; not pyplot, which keeps global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    bars = sum(len(record["contenders"]) + 1 for record in records)
    figure = Figure(figsize=(10, 1.6 + 0.24 * bars), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    row, labels = 0, []
    for record in records:
        first = row
        for name, times in record["contenders"].items():
            p20, p50, p80 = times["p20"], times["p50"], times["p80"]
            axes.barh(
                row,
                p50,
                height=0.85,
                color=f"C{names.index(name) % 10}",
                label=name,
                xerr=[[p50 - p20], [p80 - p50]],
                error_kw={"elinewidth": 1, "capsize": 2},
            )
            ratio = f" {p50 / times['part'] / record['p50']:.2f}x{part_of(times)}"
            mark = "" if name == next(iter(record["contenders"])) else ratio
            axes.text(p80, row, f" {duration(p50)}{mark}", va="center", fontsize=7)
            row += 1
        labels.append(((first + row - 1) / 2, f"{record['case']}\n({record['backend']})"))
        row += 1
    axes.set_yticks([place for place, _ in labels], [text for _, text in labels], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 4)  # room for the shortest bar, and for the numbers
    axes.set_xlabel("seconds, median (marks: 20 % and 80 %); numbers: time / ours")
    here = records[-1]
    title = f"{op}, {here['cpu']}, {here['threads']} threads, torch {here['torch']}"
    busy = max(records, key=lambda record: record["load"])
    if busy["load"] > QUIET:
        title += f"\n{disturbance(busy)}"
    axes.set_title(title, fontsize=10)
    handles, texts = axes.get_legend_handles_labels()
    unique = dict(zip(texts, handles))
    axes.legend(unique.values(), unique.keys(), fontsize=7, loc="best")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
