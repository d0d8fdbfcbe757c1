"""``rewrite make-edit``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from .command import Command, UsageError
from .messages import say
from .options import GENERATOR_NOTES, JSON, PNG, InputFile, add_generator, check_pixels, input_file, output

if TYPE_CHECKING:
    from ..edits.selection import Selection

_SIDE = 128  # of each picture in the sheet


@dataclasses.dataclass(frozen=True)
class Place:
    """ "7:10,4,18,28" or "7:mask.png": the row of the latents, and a box or the file of a mask."""

    row: int
    box: tuple[int, ...] | None
    file: InputFile | None


def place(text: str) -> Place:
    """An argparse type."""
    row, colon, rest = text.partition(":")
    with contextlib.suppress(ValueError):
        box = tuple(map(int, rest.split(",")))
        if len(box) == 4 and int(row) >= 0:
            return Place(int(row), box, None)
    if not colon or not row.isdecimal() or not rest or "," in rest:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a place: PICTURE:TOP,LEFT,BOTTOM,RIGHT in pixels, or PICTURE:MASK.png"
        )
    return Place(int(row), None, input_file(rest))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=1000)
    many: dict[str, Any] = {"type": place, "metavar": "PLACE", "action": "append", "default": []}
    parser.add_argument("--copy", type=place, metavar="PLACE", help="what to copy")
    parser.add_argument("--paste", **many, help="where it goes; repeat for several")
    parser.add_argument("--context", **many, help="what is alike; repeat for several (default: the paste)")
    parser.add_argument("--query", type=place, metavar="PLACE", help="what to search for")
    parser.add_argument("--out", required=True, type=output(JSON), metavar="FILE.json", help="the edit to write")
    parser.add_argument("--sheet", type=output(PNG), metavar="FILE.png", help="also draw what is marked")


def run(options: argparse.Namespace) -> None:
    from .. import pictures
    from ..edits.edit import Edit
    from .generator import subject

    single = [("copy", options.copy), ("query", options.query)]
    several = [*(("paste", each) for each in options.paste), *(("context", each) for each in options.context)]
    marked = [(name, each) for name, each in (*single[:1], *several, *single[1:]) if each is not None]
    if not marked:
        raise UsageError("An edit marks something; name places with --copy, --paste and --context.")
    furthest = max(each.row for _, each in marked)
    if furthest >= options.count:
        raise UsageError(
            f"There are {options.count} pictures, and none of number {furthest}; ask for more with --count."
        )
    check_pixels(len(marked), _SIDE)
    on = subject(options, options.count)
    chosen = [(name, _selection(each, on.shape[1:])) for name, each in marked]
    parts = {name: [selection for kind, selection in chosen if kind == name] for name, _ in chosen}
    edit = Edit(
        next(iter(parts.get("copy", [])), None),
        parts.get("paste"),
        parts.get("context"),
        next(iter(parts.get("query", [])), None),
        on.latents,
    )
    if options.sheet:
        images = on.paint(on.latents[[selection.index for _, selection in chosen]], progress=False)
        shown = [pictures.selected(image, part, _SIDE) for image, (_, part) in zip(images, chosen)]
        rows = pictures.in_rows(shown, [f"{name}: {part.index}" for name, part in chosen], 7)
        pictures.save_png(pictures.grid(rows, "the edit"), options.sheet)
        say(f"what is marked -> {options.sheet}")
    edit.save(options.out)
    counts = ", ".join(f"{len(found)} {name}" for name, found in parts.items())
    say(f"an edit of {counts} -> {options.out}")


def _selection(place: Place, size: tuple[int, ...]) -> Selection:
    from ..edits.selection import Selection

    return Selection(place.row, place.file) if place.box is None else Selection.box(place.row, place.box, size)


COMMAND = Command(
    "make-edit",
    "make an edit from boxes or mask pictures",
    "rewrite make-edit --copy 7:2,20,30,44 --paste 11:2,20,30,44 --context 3:2,18,30,42 --out edit.json",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
)
