"""What one command is, and the parser that is built of all of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ..errors import RewriteCoreError
from .messages import say_once, shown


class UsageError(RewriteCoreError):
    """A command line that cannot be carried out."""


def _not_to_be_resumed(options: argparse.Namespace) -> str:
    return ""


@dataclass(frozen=True)
class Command:
    """One command of ``rewrite``.

    name, help     the word, and what it does in a few
    example        a command line that shows its use
    add_arguments  adds what it takes to its parser
    run            does it; what it returns is the exit status (None: 0)
    notes          what --help says besides
    interrupted    what to say of going on after Ctrl-C, such as "; run it again"
    settings       whether options that are not given come from rewrite.toml
    processes      whether the processes of torchrun share its work
    """

    name: str
    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    notes: str = ""
    interrupted: Callable[[argparse.Namespace], str] = _not_to_be_resumed
    settings: bool = True
    processes: bool = False


class Parser(argparse.ArgumentParser):
    """argparse's, but bad usage is one sentence, like every other error."""

    def error(self, message: str) -> NoReturn:
        say_once(f"{self.prog}: {shown(message).rstrip('.')}; see {self.prog} --help.")
        self.exit(2)


def build_parser(commands: Sequence[Command], version: str) -> Parser:
    """The parser of ``rewrite``; what it parses holds the Command as ``command``."""
    parser = Parser(
        prog="rewrite", description="Change the rules inside a trained image generator by rewriting its weights."
    )
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in commands:
        sub = subparsers.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  {command.example}\n{command.notes}",
        )
        command.add_arguments(sub)
        sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (default cpu)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        sub.set_defaults(command=command)
    return parser
