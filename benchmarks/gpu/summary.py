"""What a run of ``make gpu-check`` found: a table, which needs nothing but the standard library, and a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..lines import Record, read

BAD = ("wrong", "failed", "timeout", "crashed")


def duration(seconds: float | None) -> str:
    """Three digits with a unit, or a dash."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def latest(path: Path, common: Record) -> list[Record]:
    """The last line of every case in a file, of the same sources on such a GPU: what was not run again for want of time
    is as it was found before."""
    found: dict[tuple[str, str], Record] = {}
    for line in read(path) if path.is_file() else ():
        if any(line.get(name) != common[name] for name in ("gpu", "sources")) or not {"stage", "case", "state"} <= set(
            line
        ):
            continue
        place = line["stage"], line["case"]
        if line["state"] != "skipped" or place not in found:
            found.pop(place, None)
            found[place] = line
    return list(found.values())


def status(lines: Sequence[Record]) -> int:
    """The exit status of a run that leaves these lines."""
    states = [line["state"] for line in lines]
    return 1 if set(states) & set(BAD) or "ok" not in states else 0


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _timed(line: Record) -> str:
    """A case of S2: ours and the best of stock, by a graph's replay and by the wall clock, and the floor."""
    ours = line["contenders"].get("rewrite_core", {})
    best = line["contenders"].get(line.get("best_stock"), {})
    floor = line.get("details", {}).get("floor_seconds")
    share = floor / ours["p50"] if floor and ours.get("p50") else None
    walls = [(times.get("wall") or {}).get("p50") for times in (ours, best)]
    slower = walls[1] / best["part"] / walls[0] if all(walls) and best.get("part") else None
    ratios = f"{_number(line.get('ratio'), '.3g'):>10}{_number(slower, '.3g'):>10}{_number(share, '.2f'):>7}"
    times = f"{duration(ours.get('p50')):>9}{duration(walls[0]):>9}"
    return f"{line['case'][:52]:52}{times}{ratios}{_number(ours.get('error'), '.1e'):>9}"


def table(lines: Sequence[Record]) -> list[str]:
    """What was found, in at most some hundred lines of text."""
    said = [""]
    for stage in dict.fromkeys(line.get("stage") for line in lines):
        mine = [line for line in lines if line.get("stage") == stage]
        states = [line.get("state") for line in mine]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        said.append(f"{stage}: {counts}")
        said += [
            f"  {line['state']:8}{line['case']}: {line.get('reason', '')}"[:300]
            for line in mine
            if line["state"] in BAD
        ][:25]
    rates = [line for line in lines if line.get("rate")]
    said += [f"  {line['case']}: {line['rate']:.4g} {line.get('unit', '')}" for line in rates]
    spilling = [
        (line["case"], kernel) for line in lines for kernel in line.get("kernels") or () if kernel.get("spills")
    ]
    said += [f"  spills: {case}: {kernel['name']} {kernel['spills']}" for case, kernel in spilling[:15]]
    timed = [line for line in lines if line.get("contenders") and line.get("stage") == "S2"]
    if timed:
        head = f"{'graph':>9}{'wall':>9}{'stock x':>10}{'wall x':>10}{'floor':>7}{'error':>9}"
        said += ["", f"{'ours; the best of stock over ours; the floor over ours':52}{head}"]
        said += [_timed(line) for line in timed]
    return said


def main() -> None:
    """sys.argv: ..., the file of lines, the picture: of the latest line of every timed case."""
    from ..report import draw

    timed = {line["case"]: line for line in read(Path(sys.argv[-2])) if line.get("contenders")}
    draw(next(iter(timed.values()))["gpu"], list(timed.values()), Path(sys.argv[-1]))
