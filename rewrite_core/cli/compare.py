"""``rewrite compare``."""

from __future__ import annotations

import argparse

from .command import Command
from .messages import say
from .options import GENERATOR_NOTES, add_edit, add_generator, collected_afresh, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=1000)
    add_edit(parser)
    parser.add_argument(
        "--rank", type=positive, default=4, help="of ours, and of directions that are drawn (default 4)"
    )
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="some of those that the table has (default all)")


def run(options: argparse.Namespace) -> None:
    from ..evaluation.comparing import TUNED, WAYS, compare, comparison_table
    from ..layers.binding import bind
    from .generator import subject
    from .inputs import edit_named, moment_for

    edit = edit_named(options.edit, options.generator, options.seed)
    on = subject(options, options.count)
    layer = bind(on.generator, options.layer)
    moment = moment_for(options.moment, layer, on)
    ways = options.ways or (*WAYS, *TUNED)
    found = compare(layer, moment, edit, on.latents, rank=options.rank, ways=ways, span=on.span, progress=on.progress)
    say(comparison_table(found))


COMMAND = Command(
    "compare",
    "compare a rewrite with fine-tuning and other ways, on unseen pictures",
    "rewrite compare spire --layer synthesis.layer4.conv --rank 4",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
    interrupted=collected_afresh,
)
