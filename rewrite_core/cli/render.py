"""``rewrite render``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command
from .messages import say, shown
from .options import GENERATOR_NOTES, add_generator, add_rewrites, add_sheet, check_pixels, numbers
from .processes import is_first, shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser)
    add_rewrites(parser, required=False)
    parser.add_argument(
        "--images", type=numbers, default=list(range(16)), help="rows of the latents, e.g. 3,5,8 (default 0-15)"
    )
    add_sheet(parser)


def run(options: argparse.Namespace) -> None:
    from .. import pictures
    from .generator import subject
    from .rewrites import before_after

    check_pixels(len(options.images) * (2 if options.rewrite else 1), options.size)
    on = subject(options, max(options.images) + 1)
    latents = on.latents[options.images]
    labels = [str(index) for index in options.images]
    if options.rewrite:
        before, after = before_after(on, latents, options.rewrite, options.strength, options.force)
        rows = pictures.before_after(before, after, options.size, labels, columns=6)
        strength = "" if options.strength == 1 else f" at strength {options.strength:g}"
        title = "before | after " + ", ".join(shown(Path(path).name) for path in options.rewrite) + strength
    else:
        images = [pictures.to_image(picture, options.size) for picture in on.paint(latents)]
        rows, title = pictures.in_rows(images, labels, 8), f"pictures of seed {on.seed}"
    if is_first(options):
        pictures.save_png(pictures.grid(rows, title), options.out)
    say(f"{len(latents)} picture{'s' * (len(latents) > 1)} -> {options.out}")


COMMAND = Command(
    "render",
    "render pictures, before and after rewrites",
    "rewrite render --rewrite spire.safetensors --images 0-31 --out spire.png",
    add_arguments,
    shared(run),
    notes=GENERATOR_NOTES,
    processes=True,
)
