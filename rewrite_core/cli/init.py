"""``rewrite init``."""

from __future__ import annotations

import argparse
import os

from .command import Command, UsageError
from .messages import say
from .options import GENERATOR_NOTES, OPTIONAL, add_generator, add_layer, positive
from .settings import FILE, settings_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser)
    parser.add_argument("--count", type=positive, help="number of latents, for every command that has --count")
    parser.set_defaults(usual_count=None)
    add_layer(parser, OPTIONAL)
    parser.add_argument("--force", action="store_true", help=f"replace the {FILE} that is here")


def run(options: argparse.Namespace) -> None:
    if os.path.lexists(FILE) and not options.force:
        raise UsageError(f"There is a {FILE} here already; edit it, or replace it with --force.")
    text = settings_text(options)
    from ..files import atomic_write
    from ..layers.binding import bind
    from .generator import subject

    on = subject(options, 2)
    if options.layer:
        bind(on.generator, options.layer)
    with atomic_write(FILE) as partial:
        partial.write_text(text, encoding="utf-8")
    say(f"{on.name} -> {FILE}, which the commands in this folder read; rewrite layers lists what they can work on")


COMMAND = Command(
    "init",
    f"write {FILE}, which says what the commands in this folder work on",
    "rewrite init --generator my_module:make_generator --checkpoint weights.safetensors --latent-size 512",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
    settings=False,
)
