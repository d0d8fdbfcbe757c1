"""``rewrite studio``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command
from .messages import say
from .options import CHAPELS, GENERATOR_NOTES, OPTIONAL, add_generator, add_layer, whole

DEFAULT_LAYER = "synthesis.layer4.conv"  # of the embedded generator: where its example works best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=1000)
    add_layer(parser, OPTIONAL)
    parser.add_argument(
        "--port", type=whole(0, 65535), default=8765, help="of the page's address (default 8765; 0: any)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("studio"), help="where all that is made is kept (default studio)"
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")


def run(options: argparse.Namespace) -> None:
    from ..studio.opening import open_page, prepare
    from ..studio.server import serve
    from .generator import subject

    on = subject(options, options.count)
    layer = options.layer or (DEFAULT_LAYER if on.name == CHAPELS else None)
    workshop = prepare(on.generator, on.latents, layer, options.folder, on.span, on.name, on.progress)

    def ready(address: str) -> None:
        say(address)
        if not options.no_browser:
            open_page(address)

    serve(workshop, options.port, ready=ready)


COMMAND = Command(
    "studio",
    "draw edits in a browser page, which this machine alone can open",
    "rewrite studio --port 8765",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
)
