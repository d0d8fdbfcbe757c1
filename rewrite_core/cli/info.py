"""``rewrite info``."""

from __future__ import annotations

import argparse

from ..version import __version__
from .command import Command
from .messages import say
from .settings import FILE, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass  # what every command has


def run(options: argparse.Namespace) -> None:
    import torch

    from ..backends import explain
    from .generator import usable_device

    usable_device(options.device)
    say(f"rewrite_core {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    say(str(explain()))
    for name, value in read_settings().items():
        say(f"{FILE}: {name.replace('_', '-')} = {value}")


COMMAND = Command(
    "info",
    f"say which backend each operation uses here and why, and what {FILE} holds",
    "rewrite info",
    add_arguments,
    run,
)
