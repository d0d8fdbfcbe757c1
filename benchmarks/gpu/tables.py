"""A file of lines as a table in Markdown, for the docs. Needs nothing but the standard library."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..lines import Record, read
from .summary import BAD, duration

BEGIN, END = "<!-- begin: python -m benchmarks.gpu --table -->", "<!-- end of the table -->"
HEAD = ("case", "ours", "ours, wall", "best stock", "stock / ours", "wall, stock / ours", "floor / ours", "error")
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
SHORT = {"bytes/s (read and written)": "B/s", "operations/s": "op/s"}


def newest(lines: Sequence[Record]) -> list[Record]:
    """The last line of every case, whatever the sources; one that was skipped counts where there is no other."""
    found: dict[tuple[str, str], Record] = {}
    for line in lines:
        if {"stage", "case", "state", "run"} <= set(line):
            place = line["stage"], line["case"]
            if line["state"] != "skipped" or place not in found:
                found[place] = line
    return list(found.values())


def _rate(line: Record) -> str:
    for size, letter in UNITS:
        if line["rate"] >= size:
            unit = SHORT.get(line["unit"], line["unit"])
            return f"{line['case'].removeprefix('rate ')} {line['rate'] / size:.3g} {letter}{unit}"
    return f"{line['case']} {line['rate']:.3g} {line['unit']}"


def _times(value: float | None) -> str:
    """A ratio, of three digits."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _row(line: Record) -> list[str]:
    """A case of S2. What did a part of the job stands with the time of the whole."""
    if not line.get("contenders"):
        return [line["case"], f"{line['state']}: {line.get('reason', '')}".replace("|", "/"), *["-"] * 6]
    ours, name = line["contenders"]["rewrite_core"], line.get("best_stock")
    best = line["contenders"].get(name)
    part = best.get("part", 1.0) if best else 1.0
    walls = [(times or {}).get("wall", {}).get("p50") for times in (ours, best)]
    floor, error = line.get("details", {}).get("floor_seconds"), ours.get("error")
    stock = [f"{'about ' if part < 1 else ''}{duration(best['p50'] / part)} ({name})"] if best else []
    stock += [f"{duration(times['p50'])} ({aside})" for aside, times in line["contenders"].items() if times["aside"]]
    return [
        line["case"],
        duration(ours["p50"]) + ("" if ours["timed_by"].startswith("replays") else " (events)"),
        duration(walls[0]),
        "; ".join(stock) or "-",
        _times(line.get("ratio")),
        _times(walls[1] / part / walls[0] if all(walls) else None),
        f"{100 * floor / ours['p50']:.2g} %" if floor else "-",
        "-" if error is None else f"{error:.1e}",
    ]


def _ratio(line: Record) -> float | None:
    return line.get("ratio")


def _over_aside(line: Record) -> float:
    (aside,) = (times for times in line["contenders"].values() if times["aside"])
    return line["contenders"]["rewrite_core"]["p50"] / aside["p50"]


def _bandwidth(line: Record) -> float | None:
    """The share of the copy bandwidth, in percent."""
    traffic = line.get("details", {}).get("floor_traffic")
    return 100 * traffic / line["contenders"]["rewrite_core"]["p50"] if traffic else None


def _milliseconds(line: Record) -> float:
    return 1e3 * line["contenders"]["rewrite_core"]["p50"]


def _edits_per_second(line: Record) -> float:
    return line["details"]["edits"] / line["contenders"]["rewrite_core"]["p50"]


LARGE, SMALL = r"@ (?:32|64|128|256)x", r"@ (?:4|16)x"
ASKED: tuple[tuple[str, str, str, Callable[[Record], float | None]], ...] = (  # what, the goal, which cases, the number
    ("second moment, float32: times the best of stock", "3", rf"second_moment x3, .*{LARGE}", _ratio),
    ("second moment, bfloat16, 256 channels or more: times the best of stock", "1.5",
     r"second_moment bfloat16, (?:256|512|1024|2048) @", _ratio),
    ("second moment, 128 channels or fewer: % of the copy bandwidth", "80",
     rf"second_moment \w+, (?:64|128) {LARGE}", _bandwidth),
    ("second moment, small maps: times the best of stock", "1", rf"second_moment x3, .*{SMALL}", _ratio),
    ("collection: times the bare forward pass", "at most 1.05", r"collect ", _over_aside),
    ("solve, n up to 512: times the best of torch.linalg", "2", r"solve (?:64 of )?n (?:64|128|256|512),", _ratio),
    ("solve by the CUDA kernel, n up to 512: times the best of torch.linalg", "2",
     r"solve by the CUDA kernel, ", _ratio),
    ("fit of one edit: ms", "below 1", r"fit .*, 1 edit$", _milliseconds),
    ("fit of 64 edits: edits a second", "1000", r"fit .*, 64 edits$", _edits_per_second),
    ("projected solver: times the best of stock loops", "20", r"projected (?:stylegan2|linear),", _ratio),
    ("projected solver by the CUDA kernel: times the best of stock loops", "20",
     r"projected by the CUDA kernel, ", _ratio),
)  # fmt: skip


def goals(timed: Sequence[Record]) -> list[str]:
    """What was aimed at and what was measured: the least and the most over the cases concerned."""
    said = ["| what | goal | measured |", "|---|---|---|"]
    for what, goal, cases, number in ASKED:
        found = [number(line) for line in timed if line.get("contenders") and re.match(cases, line["case"])]
        known = sorted(value for value in found if value is not None)
        ends = list(dict.fromkeys(map(_times, (known[0], known[-1])))) if known else ["-"]
        said.append(f"| {what} | {goal} | {' to '.join(ends)} |")
    return said


def _states(lines: Sequence[Record], stage: str) -> str:
    mine = Counter(line["state"] for line in lines if line["stage"] == stage)
    return f"{stage}: {', '.join(f'{count} {state}' for state, count in mine.items())}"


def markdown(lines: Sequence[Record]) -> str:
    """What was found: where, the states of all stages, what is not right, and every timed case of S2.

    Raises ValueError where there is no line."""
    known = newest(lines)
    if not known:
        raise ValueError("it has no lines of make gpu-check")
    last = max(known, key=lambda line: line["run"])
    old = sorted({line["run"] for line in known if line["sources"] != last["sources"]})
    where = f"{last['gpu']}, torch {last['torch']}, Triton {last['triton']}, {last['run'][:10]}"
    said = [
        f"{where}, sources `{last['sources']}`"
        + (f" (rows with \\*: earlier sources, run of {', '.join(old)})" if old else "")
        + ".",
        f"Rates measured there: {', '.join(_rate(line) for line in known if line.get('rate'))}.",
        "; ".join(_states(known, stage) for stage in sorted({line["stage"] for line in known})) + ".",
        "",
    ]
    bad = [line for line in known if line["state"] in BAD]
    if bad:
        said += [f"- {line['stage']} `{line['case']}`: {line['state']}, {line.get('reason', '')}"[:300] for line in bad]
        said.append("")
    timed = [line for line in known if line["stage"] == "S2"]
    said += [*goals(timed), "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    order = list(dict.fromkeys(line["case"].split()[0] for line in timed))
    for line in sorted(timed, key=lambda line: order.index(line["case"].split()[0])):
        mark = " \\*" if line["sources"] != last["sources"] else ""
        first, *rest = _row(line)
        said.append(f"| {first}{mark} | {' | '.join(rest)} |")
    return "\n".join(said)


def show(path: Path, page: Path | None) -> str | None:
    """Print the table of a file of lines, or put it into a page: None, or the sentence that says why not."""
    try:
        table = markdown(list(read(path)))
        if page is None:
            print(table)
            return None
        text = page.read_text(encoding="utf-8")
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
            return f"{page} has no place for the table: it needs the lines {BEGIN} and {END}."
        before, rest = text.split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    except (OSError, ValueError) as error:
        return f"There is no table of {path}: {error}."
    return None
