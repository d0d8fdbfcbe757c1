"""``rewrite merge``."""

from __future__ import annotations

import argparse

from .collect import told
from .command import Command
from .messages import say
from .options import SAFETENSORS, input_file, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "moments", nargs="+", type=input_file, metavar="FILE", help="all shards of a collection, in any order"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=output(SAFETENSORS, required=False),
        metavar="FILE",
        help="safetensors file to write",
    )


def run(options: argparse.Namespace) -> None:
    from ..statistics.distributed import merge_files

    moment = merge_files(options.moments)
    moment.save(options.out)
    say(f"{told(moment, moment.layer)} -> {options.out}")


COMMAND = Command(
    "merge",
    "add up the second moments of a collection's shards",
    "rewrite merge shard-1.safetensors shard-2.safetensors --out moment.safetensors",
    add_arguments,
    run,
    notes="""
Shards come from rewrite collect --shard 1/8 and so on. Those that overlap, are missing, or belong to other weights or
another collection are refused. Moments of different latents, each collected as a whole, are added up too.
""",
    settings=False,
)
