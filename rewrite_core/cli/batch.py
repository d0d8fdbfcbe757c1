"""``rewrite batch``."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command, UsageError
from .messages import say, shown
from .options import GENERATOR_NOTES, OPTIONAL, add_generator, add_layer, input_file, positive

if TYPE_CHECKING:
    from ..layers.bound import BoundLayer
    from ..rewrites.change import Rewrite
    from ..session import Session
    from ..statistics.second_moment import SecondMoment
    from .generator import Subject
    from .jobs import Job

MOMENTS = "moments"  # a folder beside the results
SUMMARY = "summary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", type=input_file, metavar="JOBS.jsonl", help="the description, see below")
    add_generator(parser, count=1000)
    add_layer(parser, OPTIONAL)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results, made where missing")
    parser.add_argument(
        "--together",
        type=positive,
        default=16,
        metavar="EDITS",
        help="so many edits are fitted at once (default 16); what they need of memory adds up",
    )


def run(options: argparse.Namespace) -> None:
    from ..progress import progress_bar
    from .jobs import read_jobs

    jobs = read_jobs(options.jobs, options)
    out = _folder(options.out)
    open_jobs = [job for job in jobs if not _is_done(out / job.file)]
    loaded = _checked(open_jobs)
    (out / MOMENTS).mkdir(parents=True, exist_ok=True)
    made: list[Job] = []
    failed: dict[str, str] = {}
    began = time.monotonic()
    label, there = "edits", len(jobs) - len(open_jobs)
    try:
        with progress_bar(total=len(jobs), start=there, label=label, unit="edit", show=not options.quiet) as bar:
            for where, group in _grouped(open_jobs, lambda job: job.where):
                on = loaded.pop(where, None) or _subject(group[0])
                _work(on, group, out, options.together, made, failed, bar.update)
    finally:  # of what there is, also after Ctrl-C
        records = [_record(job, out, failed) for job in jobs]
        _write_summary(out, records)
    seconds, there = time.monotonic() - began, len(jobs) - len(made) - len(failed)
    rate = f", {len(made) / seconds:.3g} edits/s with statistics" if made else ""
    say(f"{len(made)} rewrites, and {there} that were there{rate} -> {out / SUMMARY}.md")
    if failed:
        line, reason = next((record["line"], record["error"]) for record in records if record["error"])
        raise UsageError(
            f"{len(failed)} of {len(jobs)} edits failed, the first on line {line} ({reason.rstrip('.')}); "
            f"{out / SUMMARY}.json has all reasons."
        )


def _folder(name: str) -> Path:
    """The folder of results. Raises OSError where there cannot be one."""
    from ..files import writable_path

    input_file(name)
    out = Path(name)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{name} is a file, and results go to a folder; name another.")
    out.mkdir(parents=True, exist_ok=True)
    writable_path(out / f"{SUMMARY}.json")
    return out


def _is_done(file: Path) -> bool:
    from ..errors import RewriteCoreError
    from ..rewrites.change import Rewrite

    try:
        Rewrite.load(file)
    except (FileNotFoundError, RewriteCoreError):
        return False
    return True


def _grouped(jobs: Iterable[Job], key: Callable[[Job], Any]) -> list[tuple[Any, list[Job]]]:
    """The jobs that agree in `key` together, in the order of their first."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault(key(job), []).append(job)
    return list(groups.items())


def _subject(job: Job) -> Subject:
    from .generator import subject

    return subject(job.options, job.options.count)


def _checked(jobs: Sequence[Job]) -> dict[Any, Subject]:
    """Look at every job on its own generator, before anything is worked out; the last generator, to be used again.

    Raises UsageError with the number of the first line that is wrong.
    """
    from ..layers.binding import bind
    from ..statistics.second_moment import SecondMoment
    from .jobs import line_named

    kept: dict[Any, Subject] = {}
    for where, group in _grouped(jobs, lambda job: job.where):
        kept.clear()  # one at a time
        with line_named(group[0].line):
            on = _subject(group[0])
        for (layer, moment), users in _grouped(group, lambda job: (job.options.layer, job.options.moment)):
            with line_named(users[0].line):
                bound = bind(on.generator, layer)
                if moment:
                    SecondMoment.load(moment, bound).check(bound, on.latents)
        for job in group:
            with line_named(job.line):
                job.edit.on(on.latents)
        kept[where] = on
    return kept


def _work(
    on: Subject,
    jobs: Sequence[Job],
    out: Path,
    together: int,
    made: list[Job],
    failed: dict[str, str],
    tell: Callable[[int], object],
) -> None:
    """Make and save the changes of one generator's jobs, which are added to `made`; why one failed is to `failed`."""
    from ..session import Session

    layers = _bound(on, jobs)
    collected = _collected(on, [name for (name, moment), _ in _of_moments(jobs) if not moment], layers, out)
    for (name, file), own in _of_moments(jobs):
        moment = collected.pop(name) if not file else _loaded(file, layers[name])
        session = Session(layers[name], moment, on.latents)
        for _, alike in _grouped(own, lambda job: repr((job.options.zero, job.given, job.protected))):
            for first in range(0, len(alike), together):
                part = alike[first : first + together]
                unmade = [job for job in part if not _is_done(out / job.file)]  # by another run on this folder
                tell(len(part) - len(unmade))
                for job, change in zip(unmade, _changes(session, unmade, failed) if unmade else []):
                    if change is not None:
                        change.save(out / job.file)
                        made.append(job)
                    tell(1)


def _of_moments(jobs: Sequence[Job]) -> list[tuple[tuple[str, str | None], list[Job]]]:
    return _grouped(jobs, lambda job: (job.options.layer, job.options.moment))


def _bound(on: Subject, jobs: Sequence[Job]) -> dict[str, BoundLayer]:
    from ..layers.binding import bind

    return {name: bind(on.generator, name) for name in dict.fromkeys(job.options.layer for job in jobs)}


def _loaded(file: str, layer: BoundLayer) -> SecondMoment:
    from ..statistics.second_moment import SecondMoment

    return SecondMoment.load(file, layer)


def _collected(on: Subject, names: Sequence[str], layers: dict[str, BoundLayer], out: Path) -> dict[str, SecondMoment]:
    """The second moments of these layers, collected in one pass that goes on where an earlier run stopped."""
    import xxhash

    from ..layers.fingerprints import tensor_fingerprint
    from ..statistics.collection import collect_second_moments

    if not names:
        return {}
    latents = tensor_fingerprint(on.latents)
    files = []
    for name in names:
        told = f"{latents} {layers[name].fingerprint(on.latents)} {name}"
        files.append(out / MOMENTS / f"{xxhash.xxh3_64_hexdigest(told.encode())}.safetensors")
        _drop_damaged(files[-1])
    moments = collect_second_moments(
        [layers[name] for name in names],
        on.latents,
        checkpoints=files,
        progress=on.progress,
        latent_seed=on.seed,
    )
    return dict(zip(names, moments))


def _drop_damaged(file: Path) -> None:
    """Remove a file of statistics that cannot be read: it is ours, and what was in it is collected again."""
    from ..errors import FileFormatError, warn
    from ..statistics.second_moment import SecondMoment

    try:
        SecondMoment._load(file)  # a checkpoint is as good
    except FileNotFoundError:
        pass
    except FileFormatError as error:
        warn(f"{str(error).rstrip('.')}; it is collected again.")
        file.unlink()


def _changes(session: Session, jobs: Sequence[Job], failed: dict[str, str]) -> list[Rewrite | None]:
    """The changes of jobs that differ in their edits alone. Where one cannot be made the others are, one by one."""
    from ..errors import RewriteCoreError
    from .edit import with_protected

    first, edits = jobs[0], [job.edit for job in jobs]
    try:
        given = with_protected(first.options, first.given, session.latents)
        if first.options.zero:
            return [session.zero(edit, **given) for edit in edits]
        if first.options.erase:
            return [session.erase(edit, **given) for edit in edits]
        return [*session.rewrite_many(edits, **given)]
    except RewriteCoreError as error:
        if len(jobs) == 1:
            failed[first.key] = str(error)
            return [None]
    return [change for job in jobs for change in _changes(session, [job], failed)]


# --- the summary -----------------------------------------------------------------------------------------------------


def _record(job: Job, out: Path, failed: dict[str, str]) -> dict[str, Any]:
    """What became of a job."""
    from ..rewrites.change import Rewrite

    record: dict[str, Any] = {"line": job.line, "layer": job.options.layer, **job.said}
    if not _is_done(out / job.file):
        return record | {"file": None, "error": failed.get(job.key, "not made yet; run the same command again.")}
    change = Rewrite.load(out / job.file)
    return record | {
        "file": job.file,
        "rank": change.rank,
        "solved by": change.solver,
        "before": change.losses[0] if change.losses else None,
        "after": change.final_loss,
        "size": change.size,
        "error": None,
    }


_ENDS = ("solved by", "before", "after", "size", "file", "error")  # columns that come last


def _write_summary(out: Path, records: Sequence[dict[str, Any]]) -> None:
    """summary.json, and the same as a table in summary.md: what is the same for all is left out there."""
    from ..files import atomic_write, to_json

    with atomic_write(out / f"{SUMMARY}.json") as partial:
        partial.write_text(to_json({"edits": list(records)}, "the summary", indent=1) + "\n", encoding="utf-8")
    names = list(dict.fromkeys(itertools.chain.from_iterable(records)))
    names = ["line", *(name for name in names if name not in ("line", *_ENDS)), *_ENDS]

    def differs(name: str) -> bool:
        return name in ("line", "edit", "layer", *_ENDS) or len({repr(each.get(name)) for each in records}) > 1

    shown_names = [name for name in names if differs(name)]
    rows = [[_cell(record.get(name)) for name in shown_names] for record in records]
    table = [shown_names, ["---"] * len(shown_names), *rows]
    with atomic_write(out / f"{SUMMARY}.md") as partial:
        partial.write_text("".join(f"| {' | '.join(row)} |\n" for row in table), encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return shown(value).replace("|", "\\|")


def _interrupted(options: argparse.Namespace) -> str:
    return "; run the same command again to go on" if os.path.isdir(options.out) else ""


COMMAND = Command(
    "batch",
    "solve many edits, of many layers and generators, from one description",
    "rewrite batch jobs.jsonl --out rules",
    add_arguments,
    run,
    notes="""
a description:
  Each line is a JSON object with options of rewrite edit. A list is one edit for each of its values; lists are mixed:
    {"edit": ["spire", "watermark"], "layer": ["synthesis.layer4.conv", "synthesis.layer6.conv"], "rank": [1, 4]}
  What a line does not say comes from the command line and rewrite.toml. The whole description is looked at before any
  work. Second moments, their factors and the generator's passes are shared. The results are rewrites, one file each,
  and summary.json and summary.md. Run again, the command makes what is not there yet, and nothing twice.
"""
    + GENERATOR_NOTES,
    interrupted=_interrupted,
)
