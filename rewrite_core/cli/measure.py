"""``rewrite measure``."""

from __future__ import annotations

import argparse
import math

from .command import Command, UsageError
from .messages import say
from .options import CHAPELS, DEMO_EDITS, GENERATOR_NOTES, add_generator, add_rewrites


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=500)
    add_rewrites(parser, required=True)
    parser.add_argument("--rule", choices=DEMO_EDITS, help="score against the embedded generator's ground truth")


def run(options: argparse.Namespace) -> None:
    from ..demo.rules import RULES, score
    from ..errors import warn
    from ..files import to_json
    from .generator import subject
    from .rewrites import before_after

    if options.rule and options.generator != CHAPELS:
        raise UsageError("--rule is measured against the world of the embedded generator only.")
    on = subject(options, options.count)
    before, after = before_after(on, on.latents, options.rewrite, options.strength, options.force)
    change = (after - before).abs().mean((1, 2, 3))
    report: dict[str, object] = {
        "pictures": len(on.latents),
        "seed": on.seed,
        "mean_change": change.mean().item(),
        "median_change": change.median().item(),
        "largest_change": change.max().item(),
        "most_changed": change.argsort(descending=True)[:8].tolist(),
    }
    if options.rule:
        report |= {"rule": options.rule, **vars(score(RULES[options.rule], before, after, on.latents))}
    unknown = [name for name, number in report.items() if isinstance(number, float) and not math.isfinite(number)]
    if unknown:  # the pictures hold NaN, or the rule concerns none of them
        warn(f"Not a number, and null in the report: {', '.join(unknown)}.")
    say(to_json(report, "the report", indent=2))


COMMAND = Command(
    "measure",
    "measure what rewrites change on many pictures",
    "rewrite measure --rewrite spire.safetensors --rule spire --seed 2",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
)
