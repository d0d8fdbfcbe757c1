"""``rewrite search``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command, UsageError
from .messages import say
from .options import (
    GENERATOR_NOTES,
    JSON,
    add_edit,
    add_generator,
    add_sheet,
    check_pixels,
    collected_afresh,
    output,
    positive,
)

if TYPE_CHECKING:
    from ..edits.edit import Edit
    from ..layers.bound import BoundLayer
    from ..statistics.second_moment import SecondMoment
    from .generator import Subject

SELECTIONS = ("query", "context", "copy", "paste")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=1000)
    add_edit(parser)
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        default="context",
        help="which of the edit's selections to look for (default context); of several the first",
    )
    parser.add_argument("--top", type=positive, default=12, help="how many matches to show (default 12)")
    add_sheet(parser, required=False)
    parser.add_argument(
        "--add", type=positive, metavar="N", help="add the places of the N best new pictures to the edit, as context"
    )
    parser.add_argument(
        "--edit-out",
        type=output(JSON),
        metavar="FILE.json",
        help="with --add: where to write (default: the edit's file)",
    )


def _check(options: argparse.Namespace) -> None:
    if not options.add:
        if options.edit_out:
            raise UsageError("--edit-out is where --add writes; say how many places with --add N.")
        if not options.out:
            raise UsageError("Name the picture to write with --out FILE.png, or add matches to the edit with --add N.")
        return
    if options.selection != "context":
        raise UsageError("--add adds what is like the context; leave --selection out.")
    if not options.edit_out and not Path(options.edit).is_file():
        raise UsageError(f"{options.edit} is no file that could be added to; name one with --edit-out FILE.json.")


def _add(options: argparse.Namespace, on: Subject, layer: BoundLayer, moment: SecondMoment, edit: Edit) -> None:
    """The edit with more context, written; and drawn where --out says."""
    from .. import pictures

    more = edit.with_matches(layer, moment, on.latents, options.add, progress=on.progress)
    places = more.where[len(edit.where) :]
    if options.out:
        images = on.paint(on.latents[[place.index for place in places]])
        shown = [pictures.selected(image, place, options.size) for image, place in zip(images, places)]
        rows = pictures.in_rows(shown, [str(place.index) for place in places], 7)
        pictures.save_png(pictures.grid(rows, f"context that was added at layer {layer.name}"), options.out)
        say(f"the added places -> {options.out}")
    target = options.edit_out or options.edit
    more.save(target)
    say(f"pictures {', '.join(str(place.index) for place in places)} are context now -> {target}")


def run(options: argparse.Namespace) -> None:
    from .. import pictures
    from ..edits.matches import search
    from ..layers.binding import bind
    from .generator import subject
    from .inputs import edit_named, moment_for

    check_pixels(max(options.top, options.add or 0), options.size)
    _check(options)
    edit = edit_named(options.edit, options.generator, options.seed)
    all_of_them = {"query": (edit.query,), "context": edit.where, "copy": (edit.copy,), "paste": edit.pastes}
    selection = next(iter(all_of_them[options.selection]), None)
    if selection is None:
        raise UsageError(f"The edit has no {options.selection} selection; choose another with --selection.")
    on = subject(options, options.count)
    layer = bind(on.generator, options.layer)
    moment = moment_for(options.moment, layer, on)
    if options.add:
        _add(options, on, layer, moment, edit)
        return
    found = search(layer, moment, selection, on.latents, options.top, progress=on.progress)
    images = on.paint(on.latents[found.indices])
    query = on.paint(on.latents[selection.index][None], progress=False)[0]
    high = found.heatmaps.max().item()
    matches = list(zip(found.indices.tolist(), found.scores.tolist()))
    shown = [pictures.selected(query, selection, options.size)]
    for image, heatmap in zip(images, found.heatmaps):
        shown.append(pictures.heat(image, heatmap, options.size, found.level, high))
    labels = [f"query: {selection.index}", *(f"{index}: {score:.3f}" for index, score in matches)]
    sheet = pictures.grid(pictures.in_rows(shown, labels, 7), f"best matches at layer {layer.name}")
    pictures.save_png(sheet, options.out)
    say("  ".join(f"{index}:{score:.3f}" for index, score in matches))
    say(f"heat maps -> {options.out}")


COMMAND = Command(
    "search",
    "find the pictures that hold what an edit's selection shows",
    "rewrite search spire --layer synthesis.layer4.conv --top 12 --out found.png",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
    interrupted=collected_afresh,
)
