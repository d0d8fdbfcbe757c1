"""``rewrite search``."""

from __future__ import annotations

import argparse

from .command import Command, UsageError
from .messages import say
from .options import GENERATOR_NOTES, add_edit, add_generator, add_sheet, check_pixels, collected_afresh, positive

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
    add_sheet(parser)


def run(options: argparse.Namespace) -> None:
    from .. import pictures
    from ..edits.matches import search
    from ..layers.binding import bind
    from .generator import subject
    from .inputs import edit_named, moment_for

    check_pixels(options.top, options.size)
    edit = edit_named(options.edit, options.generator, options.seed)
    all_of_them = {"query": (edit.query,), "context": edit.where, "copy": (edit.copy,), "paste": edit.pastes}
    selection = next(iter(all_of_them[options.selection]), None)
    if selection is None:
        raise UsageError(f"The edit has no {options.selection} selection; choose another with --selection.")
    on = subject(options, options.count)
    layer = bind(on.generator, options.layer)
    moment = moment_for(options.moment, layer, on)
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
