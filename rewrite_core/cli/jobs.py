"""A description of many edits: a file of JSON objects, one a line, each of which has options of ``rewrite edit``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from ..edits.edit import Edit
from ..errors import RewriteCoreError
from ..files import from_json, open_file, to_json
from ..version import __version__
from . import edit as edit_command
from .command import UsageError
from .inputs import edit_named
from .messages import problem
from .options import OPTIONAL
from .settings import OF_THE_GENERATOR, as_text, fill

MOST = 100_000  # edits of one description
_SHARED = ("generator", *(name for name in OF_THE_GENERATOR if name != "generator"), "seed", "count")


@dataclasses.dataclass(frozen=True)
class Job:
    """One edit that is to be made.

    line     of the description, from 1
    said     what the line says of it, one value each
    options  those of ``rewrite edit``
    given    the arguments of the call that they ask for
    edit     as its file has it
    key      a digest of all that its result depends on: of the same job it is the same
    """

    line: int
    said: dict[str, Any]
    options: argparse.Namespace
    given: dict[str, Any]
    edit: Edit
    key: str

    @property
    def file(self) -> str:
        """The name of its result, which says what it is and is of this job alone."""
        words = f"{Path(self.options.edit).stem[:60]}-{self.options.layer[:80]}"
        return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', words)}-{self.key}.safetensors"

    @property
    def protected(self) -> tuple:
        """What it protects: jobs that agree in it, and in `given`, may be solved together."""
        return self.options.protect, self.options.protect_energy

    @property
    def where(self) -> tuple:
        """What generator and latents it works on: jobs that agree in it share them."""
        return tuple(getattr(self.options, name) for name in _SHARED if name != "layer")


class _LineParser(argparse.ArgumentParser):
    """argparse's, but bad usage is an exception."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}.")


@contextlib.contextmanager
def line_named(line: int) -> Iterator[None]:
    """What goes wrong inside is told of this line."""
    try:
        yield
    except (RewriteCoreError, OSError) as error:
        raise UsageError(f"Line {line}: {problem(error)}", advice=getattr(error, "advice", {})) from error


def read_jobs(path: str, common: argparse.Namespace) -> list[Job]:
    """The jobs of a description, in its order. What a line leaves open is what `common`, the command line, says.

    Raises UsageError with the number of the first line that is wrong.
    """
    with open_file(path, "description") as file:
        lines = file.read().splitlines()
    jobs: list[Job] = []
    seen: dict[str, int] = {}
    reader = _Reader(common)
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        with line_named(number):
            for said in _taken_apart(from_json(text, "it")):
                jobs.append(reader.job(number, said))
                first = seen.setdefault(jobs[-1].key, number)
                if len(jobs) > len(seen):
                    raise UsageError(f"it asks for the same edit as line {first}, or twice for one; ask once.")
                if len(jobs) > MOST:
                    raise UsageError(f"with it there are more than {MOST} edits; make several descriptions.")
    if not jobs:
        raise UsageError(f"{path} describes no edit; give it a line such as " + '{"edit": "spire", "rank": 4}.')
    return jobs


_WHOLE = ("range", "latent-size")  # a list of numbers is one value of these


def _taken_apart(record: Any) -> Iterator[dict[str, Any]]:
    """The jobs of one line: a list of values is one job for each of them, lists are mixed."""
    if not isinstance(record, dict):
        raise UsageError(f'it is no JSON object such as {{"edit": "spire", "rank": 4}} but a {type(record).__name__}.')
    record = {key.replace("_", "-"): value for key, value in record.items()}
    values = [value if isinstance(value, list) and key not in _WHOLE else [value] for key, value in record.items()]
    for key, several in zip(record, values):
        if not several:
            raise UsageError(f"{key!r} is an empty list; leave it out, or give it values.")
    for mix in itertools.product(*values):
        yield dict(zip(record, mix))


class _Reader:
    """Makes jobs of what lines say."""

    def __init__(self, common: argparse.Namespace):
        self._common = {name: value for name in (*_SHARED, "device") if (value := getattr(common, name)) is not None}
        self._quiet = common.quiet
        self._parser = _LineParser(prog="line", add_help=False, allow_abbrev=False)
        edit_command.add_options(self._parser)
        self._parser.add_argument("--device", help=argparse.SUPPRESS)
        self._parser.set_defaults(layers=OPTIONAL)
        actions = [action for action in self._parser._actions if action.option_strings]
        self._known = {action.option_strings[0][2:]: action for action in actions}
        del self._known["device"]  # it is the machine's, not the edit's
        self._edits = functools.cache(_edit)
        self._digests = functools.cache(_digest)

    def job(self, line: int, said: dict[str, Any]) -> Job:
        """Raises RewriteCoreError for what ``rewrite edit`` would refuse, OSError for a file that is not there."""
        if "edit" not in said:
            raise UsageError("it names no edit; give it one, such as " + '"edit": "spire.json".')
        options = self._parser.parse_args(self._words(said))
        fill(options, self._common)
        if options.layer is None:
            raise UsageError('it names no layer; give it one, such as "layer": "synthesis.layer4.conv", or --layer.')
        options.quiet = self._quiet
        given = edit_command.asked_for(options)
        edit, text = self._edits(options.edit, options.generator, options.seed)
        asked = {name: value for name, value in vars(options).items() if name not in _OF_THE_RUN}
        files = {name: self._digests(asked.pop(name)) for name in ("checkpoint", "moment") if asked[name]}
        record = to_json({**{name: _plain(value) for name, value in asked.items()}, "files": files, "edit": text})
        key = xxhash.xxh3_64_hexdigest(f"{__version__} {record}".encode())
        return Job(line, said, options, given, edit, key)

    def _words(self, said: dict[str, Any]) -> list[str]:
        """What a command line would say."""
        words = [_checked("edit", said["edit"])]
        for key, value in said.items():
            if key != "edit" and key not in self._known:
                close = difflib.get_close_matches(key, ["edit", *self._known], 1)
                advice = f"did you mean {close[0]!r}?" if close else "give it options of rewrite edit."
                raise UsageError(f"there is no {key!r}; {advice}")
            if key != "edit" and self._known[key].nargs == 0:
                if not isinstance(value, bool):
                    raise UsageError(f"{key!r} is true or false.")
                words += [f"--{key}"] * value
            elif key != "edit":
                words.append(f"--{key}={_checked(key, value)}")
        return words


_OF_THE_RUN = ("edit", "layers", "usual_count", "device", "quiet")


def _checked(key: str, value: object) -> str:
    try:
        text = as_text(key, value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{key!r}: {error}.") from None
    if key == "edit" and text.startswith("-"):
        raise UsageError(f"{text!r} is no name of an edit here; write ./{text}.")
    return text


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _edit(name: str, generator: str, seed: int) -> tuple[Edit, str]:
    edit = edit_named(name, generator, seed)
    return edit, edit.to_json()


def _digest(path: str) -> str:
    """Of a file's content: a name alone may get another one."""
    digest = xxhash.xxh3_128()
    with open_file(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
