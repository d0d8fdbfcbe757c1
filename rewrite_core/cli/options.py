"""Types of arguments, and the arguments that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable

from .command import UsageError

CHAPELS, PICKLED = "chapels", "the pickled network"
MOST_PICTURES, MOST_LATENTS = 10_000, 1_000_000  # in one file; for one, as all before the last are drawn too
MOST_PIXELS = 250_000_000  # of one file, which is held in memory

# The library's own words, spelled here so that --help need not import torch; a test compares them.
DEMO_EDITS = ("spire", "watermark", "reflection")
DIRECTIONS = ("whitened", "svd", "mean", "units")
DISTRIBUTIONS = ("normal", "uniform")
REGIONS = ("box", "map")
BLENDS = ("mask", "box")
LOSSES = ("l1", "l2")
SOLVERS = ("lm", "lbfgs", "projected", "adam", "unconstrained")
OBJECTIVES = ("value", "activation", "pictures")

OTHER_FORMATS = frozenset(
    (
        *(".bin", ".ckpt", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth"),
        *(".csv", ".gz", ".jpeg", ".jpg", ".json", ".png", ".py", ".tar", ".toml", ".txt", ".zip"),
    )
)
"""Endings of a name that promise another format than what is written."""

GENERATOR_NOTES = """
generators:
  By default a command works on the embedded generator, "chapels". For your own, name a function that returns it:
    rewrite layers --generator my_module:make_generator --checkpoint weights.safetensors --latent-size 100
  `make_generator()` returns the torch module, and the checkpoint (a state dict: .pt, .pth, .safetensors or .npz,
  never unpickled beyond tensors) is loaded into it; or `make_generator(checkpoint)` takes the path itself, as
  rewrite_core:load_proggan and rewrite_core:load_stylegan2 do. A pickled network is opened with --allow-pickle only,
  since that runs whatever code is in it. The generator is called with latents [N, SIZE], or [N, 100, 1, 1] for
  --latent-size 100x1x1, and returns images in -1..1, or in what --range says.
  rewrite init writes all this to rewrite.toml, which every command then reads in the working directory.
"""


ONE, SEVERAL, OPTIONAL = "one", "several", "optional"  # what a command takes of layers


SAFETENSORS, PNG, JSON = ".safetensors", ".png", ".json"


class InputFile(str):
    """The name of a file that is read."""


class OutputFile(str):
    """The name of a file that is written."""


class CheckpointFile(OutputFile):
    """The name of a file that is written and read, and may end as the file of its own result."""


# --- types ---------------------------------------------------------------------------------------------------


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")

    return parse


positive = whole(1)
seed = whole(0, 2**32 - 1)


def real(above: float = -math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number, greater than `above`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if above < float(text) < math.inf:
                return float(text)
        bounds = "" if above == -math.inf else f" greater than {above:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number{bounds}")

    return parse


UNBOUNDED = "none"


def bound(text: str) -> float | str:
    """An argparse type: a number above 0, or "none"."""
    return UNBOUNDED if text.lower() == UNBOUNDED else real(above=0)(text)


def numbers(text: str) -> list[int]:
    """ "3,5,8-11" -> [3, 5, 8, 9, 10, 11]."""
    ranges: list[range] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            ranges.append(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0-15 or 3,5,8") from None
    if not any(ranges):
        raise argparse.ArgumentTypeError(f"{text!r} names no picture")
    if sum(max(0, each.stop - each.start) for each in ranges) > MOST_PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text!r} names more than the {MOST_PICTURES} pictures that one file may hold"
        )
    if max(each.stop for each in ranges) > MOST_LATENTS:
        raise argparse.ArgumentTypeError(f"{text!r} goes beyond the {MOST_LATENTS} latents that are drawn at most")
    return [number for each in ranges for number in each]


def size(text: str) -> tuple[int, ...]:
    """ "512" -> (512,); "100x1x1" -> (100, 1, 1)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512 or 100x1x1")
    return tuple(map(int, text.split("x")))


def span(text: str) -> tuple[float, float]:
    """ "0,1" -> (0.0, 1.0)."""
    with contextlib.suppress(ValueError):
        low, high = map(float, text.split(","))
        if -math.inf < low < high < math.inf:
            return low, high
    raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, the lower first, such as 0,1")


def input_file(text: str) -> InputFile:
    """An argparse type: a file to read."""
    if "\0" in text or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    return InputFile(text)


def output(
    suffix: str, kind: Callable[[str], OutputFile] = OutputFile, required: bool = True
) -> Callable[[str], OutputFile]:
    """An argparse type: a file to write, found out before the work. Its name ends in `suffix`; where that is not
    required, at least not in one of another format."""

    def parse(text: str) -> OutputFile:
        from ..files import writable_path

        input_file(text)  # a name at all
        try:
            writable_path(text)
        except OSError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        end = os.path.splitext(text)[1].lower()
        if end != suffix and (required or end in OTHER_FORMATS):
            raise argparse.ArgumentTypeError(f"{text!r} would hold {suffix[1:]}; end its name in {suffix}")
        return kind(text)

    return parse


# --- shared arguments ------------------------------------------------------------------------------------------


def add_generator(parser: argparse.ArgumentParser, count: int | None = None) -> None:
    """What names a generator and its latents; `count` is the default of --count, None for a command without it."""
    group = parser.add_argument_group("generator")
    whose = group.add_mutually_exclusive_group()
    whose.add_argument("--generator", metavar="MODULE:FUNCTION", help=f"default: {CHAPELS}")
    group.add_argument("--checkpoint", type=input_file, metavar="FILE", help="state dict to load into it")
    whose.add_argument(
        "--allow-pickle",
        dest="generator",
        action="store_const",
        const=PICKLED,
        help="instead of --generator: the checkpoint is a pickled network, which runs any code in it as it is opened",
    )
    group.add_argument(
        "--latent-size", type=size, metavar="SIZE", help="of one latent: 512, or 100x1x1 for [N, 100, 1, 1]"
    )
    group.add_argument(
        "--distribution",
        choices=DISTRIBUTIONS,
        help="of the latents' numbers: standard normal, the default, or uniform in -1..1",
    )
    group.add_argument(
        "--range", type=span, metavar="LOW,HIGH", help="what its images lie in, such as 0,1 (default -1,1)"
    )
    group.add_argument("--seed", type=seed, help="of the latents that selections index (default 1)")
    if count is not None:
        group.add_argument("--count", type=positive, help=f"number of latents (default {count})")
        parser.set_defaults(usual_count=count)


def add_layer(parser: argparse.ArgumentParser, kind: str = ONE) -> None:
    """The layer to work on; where the command line names none, rewrite.toml may."""
    more = "; repeat, with an --out each, for several" if kind == SEVERAL else ""
    parser.add_argument(
        "--layer",
        action="append" if kind == SEVERAL else "store",
        help=f"its name, one of those that rewrite layers lists{more}",
    )
    parser.set_defaults(layers=kind)


def add_edit(parser: argparse.ArgumentParser) -> None:
    """An edit, and the layer and the second moment that it is worked out with."""
    edits = ", ".join(DEMO_EDITS)
    parser.add_argument(
        "edit",
        type=input_file,
        metavar="EDIT",
        help=f"JSON file, in the reference implementation's format; or for the embedded generator {edits}",
    )
    add_layer(parser)
    parser.add_argument(
        "--moment", type=input_file, metavar="FILE", help="from rewrite collect; collected afresh where not given"
    )


def add_rewrites(parser: argparse.ArgumentParser, required: bool) -> None:
    """Rewrites to apply, one on top of the other."""
    parser.add_argument(
        "--rewrite",
        action="append",
        default=[],
        type=input_file,
        required=required,
        metavar="FILE",
        help="from rewrite edit, or a LoRA folder of peft's; repeat to stack several",
    )
    parser.add_argument(
        "--strength", type=real(), default=1.0, help="how much of each: 0.5 is half of it, -1 its inverse (default 1)"
    )
    parser.add_argument("--force", action="store_true", help="apply to weights the rewrite was not fitted to")


def add_sheet(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """A sheet of pictures to write."""
    parser.add_argument(
        "--size", type=whole(1, 4096), default=128, help="side of each picture in the grid (default 128)"
    )
    parser.add_argument("--out", required=required, type=output(PNG), metavar="FILE.png", help="picture to write")


# --- what no single option can know ------------------------------------------------------------------------------


def check_pixels(pictures: int, side: int) -> None:
    """Raises UsageError where one file would hold too many."""
    if pictures * side**2 > MOST_PIXELS:
        raise UsageError(
            f"{pictures} pictures of {side}x{side} are more than the {MOST_PIXELS} pixels that one file may hold; ask "
            "for fewer, or a smaller --size."
        )


def check_files(options: argparse.Namespace) -> None:
    """Raises UsageError where a file would be lost: it is written, and read or written as another too.

    A checkpoint may end as the file of its own result.
    """
    given = [value for each in vars(options).values() for value in (each if isinstance(each, list) else [each])]
    seen: dict[str, str] = {os.path.realpath(file): file for file in given if isinstance(file, InputFile)}
    results = [file for file in given if isinstance(file, OutputFile) and not isinstance(file, CheckpointFile)]
    checkpoints = [file for file in given if isinstance(file, CheckpointFile)]
    own = [os.path.realpath(out) for out in results] + [None] * len(checkpoints)
    others = [file for file, out in zip(checkpoints, own) if os.path.realpath(file) != out]
    for file in [*results, *others]:
        place = os.path.realpath(file)
        if place in seen:
            raise UsageError(
                f"{file} is named twice, and writing it would lose {seen[place]}; give each file its own name."
            )
        seen[place] = file


def collected_afresh(options: argparse.Namespace) -> str:
    """After Ctrl-C, where --moment names none: how not to lose the collection the next time."""
    return "" if options.moment else "; rewrite collect --resume FILE collects the moment in several goes, for --moment"
