"""``rewrite scan``."""

from __future__ import annotations

import argparse

from .command import Command
from .messages import say
from .options import (
    DEMO_EDITS,
    GENERATOR_NOTES,
    LOSSES,
    PNG,
    REGIONS,
    add_generator,
    input_file,
    numbers,
    output,
    real,
    whole,
)
from .processes import is_first, shared

RANKS = (1, 4, 10)  # the library's own; a test compares them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=1000)
    edits = ", ".join(DEMO_EDITS)
    parser.add_argument(
        "edit",
        type=input_file,
        metavar="EDIT",
        help=f"JSON file, with a copy and a paste; or for the embedded generator {edits}",
    )
    parser.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="names to try, of those that rewrite layers lists (default all)"
    )
    ranks = ",".join(map(str, RANKS))
    parser.add_argument("--ranks", type=numbers, help=f"to try, such as 1,2,4 (default {ranks})")
    parser.add_argument("--preserve", type=real(), help="weight of leaving ordinary pictures alone (default 0)")
    parser.add_argument("--loss", choices=LOSSES, help="absolute or squared (default) distance to the goal")
    parser.add_argument("--region", choices=REGIONS, help="fit the pasted box or the whole map (default)")
    parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
    parser.add_argument("--out", type=output(PNG), metavar="FILE.png", help="pictures of the best to write")
    parser.add_argument("--size", type=whole(1, 4096), default=96, help="side of each picture in it (default 96)")


def run(options: argparse.Namespace) -> None:
    from .. import pictures
    from ..evaluation.scan import scanned
    from ..evaluation.steps import Steps
    from ..files import to_json
    from .generator import subject
    from .inputs import edit_named

    edit = edit_named(options.edit, options.generator, options.seed)
    on = subject(options, options.count)
    given = {name: getattr(options, name) for name in ("ranks", "preserve", "loss", "region")}
    found = scanned(
        on.generator,
        edit,
        on.latents,
        Steps(on.progress, shard=on.shard),
        layers=options.layers,
        span=on.span,
        **{name: value for name, value in given.items() if value is not None},
    )
    if not is_first(options):
        return
    say(to_json(found.to_dict(), "the scan", indent=2) if options.json else str(found))
    if options.out and found.rows:
        pictures.save_png(found.sheet(options.size), options.out)
    if not options.json and found.rows:
        say(f"first choice: --layer {found.best.layer} --rank {found.best.rank}")


COMMAND = Command(
    "scan",
    "find the layer and the rank that hold an edit's rule",
    "rewrite scan spire --out scan.png",
    add_arguments,
    shared(run),
    notes=GENERATOR_NOTES,
    processes=True,
)
