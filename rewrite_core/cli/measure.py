"""``rewrite measure``."""

from __future__ import annotations

import argparse
import json
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
    from .generator import subject
    from .rewrites import before_after

    if options.rule and options.generator != CHAPELS:
        raise UsageError("--rule is measured against the world of the embedded generator only.")
    on = subject(options, options.count)
    before, after = before_after(on, on.latents, options.rewrite, options.force)
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
        scores = vars(score(RULES[options.rule], before, after, on.latents))
        known = {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in scores.items()
        }
        report |= {"rule": options.rule, **known}  # NaN, where no picture is concerned, is no JSON
    say(json.dumps(report, indent=2))


COMMAND = Command(
    "measure",
    "measure what rewrites change on many pictures",
    "rewrite measure --rewrite spire.safetensors --rule spire --seed 2",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
)
