"""``rewrite.toml``: what the commands in a folder work on, so that nobody types it twice.

Each setting is an option of the same name; the command line overrides it. What belongs to a generator (its checkpoint,
latents, range and layer) counts for that generator only: with another --generator these are not looked at.
"""

from __future__ import annotations

import argparse
import difflib
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .command import UsageError
from .options import CHAPELS, DISTRIBUTIONS, OPTIONAL, PICKLED, SEVERAL, input_file, positive, seed, size, span

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "rewrite.toml"


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


SETTINGS: dict[str, Callable[[str], Any]] = {
    "generator": str,
    "checkpoint": input_file,
    "allow-pickle": _one_of("true", "false"),
    "latent-size": size,
    "distribution": _one_of(*DISTRIBUTIONS),
    "range": span,
    "layer": str,
    "seed": seed,
    "count": positive,
    "device": str,
}
"""{a setting: the type of its option}"""

OF_THE_GENERATOR = ("generator", "checkpoint", "latent_size", "distribution", "range", "layer")
_BETWEEN = {"range": ",", "latent-size": "x"}  # numbers, where the command line has them in one word
USUAL = {"generator": CHAPELS, "distribution": "normal", "range": (-1.0, 1.0), "seed": 1, "device": "cpu"}


# --- reading -----------------------------------------------------------------------------------------------------


def as_text(key: str, value: object) -> str:
    """A value of the file, as the command line would say it."""
    if isinstance(value, list) and key in _BETWEEN:
        return _BETWEEN[key].join(as_text("", part) for part in value)
    if isinstance(value, bool) and key == "allow-pickle":
        return str(value).lower()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise argparse.ArgumentTypeError(f"a {type(value).__name__} is neither a text nor a number")
    return str(value)


def read_settings(folder: str | os.PathLike = ".") -> dict[str, Any]:
    """{an option's destination: its value} of the folder's rewrite.toml; empty where there is none.

    Raises UsageError where it cannot be read, or says what no option would take.
    """
    path = Path(folder, FILE)
    if not os.path.lexists(path):
        return {}
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UsageError(f"{FILE} is not a file; move it away.")
    try:
        stored = tomllib.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8, and what tomllib raises on bad numbers, too
        raise UsageError(
            f"{FILE} cannot be read: {str(error).rstrip('.')}; mend it, or make it with rewrite init."
        ) from error
    settings: dict[str, Any] = {}
    for key, value in stored.items():
        if key not in SETTINGS:
            close = difflib.get_close_matches(key, SETTINGS, 1)
            advice = f"did you mean {close[0]}?" if close else f"it may have {', '.join(SETTINGS)}."
            raise UsageError(f"{FILE} has no setting {key!r}; {advice}")
        try:
            settings[key.replace("-", "_")] = SETTINGS[key](as_text(key, value))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{FILE}, {key}: {error}.") from None
    if settings.pop("allow_pickle", "false") == "true":
        if "generator" in settings:
            raise UsageError(
                f"{FILE} has a generator and allow-pickle; a pickled network brings its own, so leave one out."
            )
        settings["generator"] = PICKLED
    return settings


def fill(options: argparse.Namespace, stored: Mapping[str, Any]) -> None:
    """Give every option that the command line left open what is stored, or what is usual."""
    given = vars(options)
    another = given.get("generator") not in (None, stored.get("generator", CHAPELS))
    for name in [name for name, value in given.items() if value is None]:
        if name in stored and not (another and name in OF_THE_GENERATOR):
            given[name] = [stored[name]] if name == "layer" and options.layers == SEVERAL else stored[name]
        elif name in USUAL:
            given[name] = USUAL[name]
        elif name == "count":
            given[name] = options.usual_count
        elif name == "layer" and options.layers != OPTIONAL:
            raise UsageError("Say which layer with --layer, one of those that rewrite layers lists.")


# --- writing -----------------------------------------------------------------------------------------------------

_HEAD = f"""\
# {FILE}: what the rewrite commands in this folder work on. Each line is an option of the same name;
# the command line overrides it. It names code that is run: keep it as safe as the code.
"""
_OPEN = {
    "checkpoint": ('"weights.safetensors"', "state dict to load into the generator"),
    "latent-size": ("512", 'of one latent; "100x1x1" for [N, 100, 1, 1]'),
    "count": ("1000", "number of latents; each command has its own default"),
    "layer": ('"layer8.conv"', "one of those that rewrite layers lists"),
}


def _toml(value: object) -> str:
    """A text, a number or a tuple of numbers in TOML."""
    if isinstance(value, tuple):
        return str(list(value))
    if not isinstance(value, str):
        return str(value)
    parts = (f"\\{each}" if each in '"\\' else each if each.isprintable() else f"\\U{ord(each):08x}" for each in value)
    return f'"{"".join(parts)}"'


def settings_text(options: argparse.Namespace) -> str:
    """A rewrite.toml that says what these options do; settings that they leave open stand there as comments.

    Raises UsageError where a name cannot be written in TOML, which is UTF-8.
    """
    lines = [_HEAD]
    for key in SETTINGS:
        value = getattr(options, key.replace("-", "_"), None)
        if key == "generator" and value == PICKLED:
            lines.append(
                "allow-pickle = true  # the checkpoint is a pickled network, and opening it runs the code in it"
            )
        elif value is not None:
            whole = key == "latent-size" and len(value) == 1
            lines.append(f"{key} = {_toml(value[0] if whole else value)}")
        elif key in _OPEN and not (options.generator == CHAPELS and key in ("checkpoint", "latent-size")):
            example, meaning = _OPEN[key]
            lines.append(f"# {key} = {example}  # {meaning}")
    text = "\n".join(lines) + "\n"
    try:
        tomllib.loads(text)
        text.encode("utf-8")
    except ValueError as error:
        raise UsageError(f"{FILE} cannot hold one of these names ({error}); rename the file.") from error
    return text
