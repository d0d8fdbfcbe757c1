"""``rewrite layers``."""

from __future__ import annotations

import argparse

from .command import Command
from .messages import say
from .options import GENERATOR_NOTES, add_generator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser)
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(options: argparse.Namespace) -> None:
    from ..files import to_json
    from ..layers.listing import list_layers
    from .generator import subject

    on = subject(options, 2)
    infos = list_layers(on.generator, on.latents, general=True)
    if options.json:
        say(to_json([vars(info) for info in infos], "the list", indent=2))
        return
    head = ("layer", "family", "channels", "kernel", "key map", "value map", "lm solver")
    rows = [head]
    for info in infos:
        key, value = ("x".join(map(str, size)) for size in (info.key_size, info.value_size))
        kernel = "x".join(map(str, info.kernel_size)) or "1"
        channels = f"{info.in_channels} -> {info.out_channels}"
        rows.append((info.name, info.family, channels, kernel, key, value, info.solver))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


COMMAND = Command(
    "layers",
    "list every layer that can be rewritten",
    "rewrite layers --generator my_module:make_generator --checkpoint weights.safetensors --latent-size 512",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
)
