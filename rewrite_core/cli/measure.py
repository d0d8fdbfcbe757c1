"""``rewrite measure``."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from .command import Command, UsageError
from .messages import say
from .options import CHAPELS, DEMO_EDITS, GENERATOR_NOTES, PNG, add_generator, add_rewrites, input_file, output, whole
from .processes import is_first, shared

if TYPE_CHECKING:
    from .generator import Subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=500)
    add_rewrites(parser, required=True)
    edits = ", ".join(DEMO_EDITS)
    parser.add_argument(
        "--edit",
        type=input_file,
        metavar="EDIT",
        help="the edit that was made: tells, without ground truth, whether the rule holds on the pictures that the "
        f"edit does not name. JSON file; or for the embedded generator {edits}",
    )
    parser.add_argument("--out", type=output(PNG), metavar="FILE.png", help="with --edit: a sheet of pictures to write")
    parser.add_argument("--size", type=whole(1, 4096), help="side of each picture in the sheet (default 96)")
    parser.add_argument("--rule", choices=DEMO_EDITS, help="score against the embedded generator's ground truth")


def run(options: argparse.Namespace) -> None:
    from ..errors import warn
    from ..files import to_json
    from .generator import subject

    if options.rule and options.generator != CHAPELS:
        raise UsageError("--rule is measured against the world of the embedded generator only.")
    if options.edit is None and (options.out or options.size):
        raise UsageError("--out and --size are of the sheet of --edit; name the edit, or leave them out.")
    on = subject(options, options.count)
    report: dict[str, Any] = {"pictures": len(on.latents), "seed": on.seed}
    if options.edit is not None:
        report |= _without_truth(options, on)
    if options.edit is None or options.rule:
        report |= _changes(options, on)
    unknown = [name for name, number in report.items() if isinstance(number, float) and not math.isfinite(number)]
    if unknown:  # the pictures hold NaN, or the rule concerns none of them
        warn(f"Not a number, and null in the report: {', '.join(unknown)}.")
    say(to_json(report, "the report", indent=2))


def _changes(options: argparse.Namespace, on: Subject) -> dict[str, Any]:
    """How far all pictures change, and the score where the rule is known."""
    from ..demo.rules import RULES, score
    from .rewrites import before_after

    before, after = before_after(on, on.latents, options.rewrite, options.strength, options.force)
    change = (after - before).abs().mean((1, 2, 3))
    report: dict[str, Any] = {
        "mean_change": change.mean().item(),
        "median_change": change.median().item(),
        "largest_change": change.max().item(),
        "most_changed": change.argsort(descending=True)[:8].tolist(),
    }
    if options.rule:
        report |= {"rule": options.rule, **vars(score(RULES[options.rule], before, after, on.latents))}
    return report


def _without_truth(options: argparse.Namespace, on: Subject) -> dict[str, Any]:
    """The report of rc.measure; the sheet is written where it is asked for."""
    from .. import pictures
    from ..evaluation.measuring import Given, measured
    from ..evaluation.steps import Steps
    from ..layers.binding import bind
    from .inputs import edit_named
    from .rewrites import load_rewrites

    edit, changes = (
        edit_named(options.edit, options.generator, options.seed),
        load_rewrites(options.rewrite, on.generator),
    )
    given = Given(
        changes,
        edit,
        on.latents,
        strength=options.strength,
        span=on.span,
        steps=Steps(on.progress, shard=on.shard),
        force=options.force,
    )
    found = measured(bind(on.generator, changes[0].layer), given)
    told = found.to_dict()
    if options.out and is_first(options):
        pictures.save_png(found.sheet(options.size or 96), options.out)
        told["sheet"] = str(options.out)
    told["changed_unrelated"] = told.pop("most_changed")  # of all pictures is another list
    return told


COMMAND = Command(
    "measure",
    "measure what rewrites change on many pictures",
    "rewrite measure --edit spire --rewrite spire.safetensors --out sheet.png",
    add_arguments,
    shared(run),
    notes=GENERATOR_NOTES,
    processes=True,
)
