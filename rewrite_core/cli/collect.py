"""``rewrite collect``."""

from __future__ import annotations

import argparse
import math
import os

from .command import Command, UsageError
from .messages import say
from .options import (
    GENERATOR_NOTES,
    SAFETENSORS,
    SEVERAL,
    CheckpointFile,
    add_generator,
    add_layer,
    output,
    positive,
    real,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generator(parser, count=1000)
    add_layer(parser, SEVERAL)
    parser.add_argument(
        "--out",
        required=True,
        action="append",
        type=output(SAFETENSORS, required=False),
        metavar="FILE",
        help="safetensors file to write",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="latents at a time (default 16)")
    parser.add_argument(
        "--resume",
        action="append",
        type=output(SAFETENSORS, CheckpointFile, required=False),
        metavar="FILE",
        help="keep a checkpoint here and resume from it; one for each --layer",
    )
    parser.add_argument(
        "--until", type=real(above=0), metavar="ERROR", help="stop at this relative standard error, such as 0.01"
    )
    parser.add_argument(
        "--skip-nonfinite", action="store_true", help="leave out pictures whose keys hold NaN or infinity"
    )


def run(options: argparse.Namespace) -> None:
    from ..layers.binding import bind
    from ..statistics.collection import collect_second_moments
    from .generator import subject

    names = options.layer
    for option, files in (("--out", options.out), ("--resume", options.resume)):
        if files is not None and len(files) != len(names):
            raise UsageError(f"Each --layer takes one {option} of its own, in the same order.")
    on = subject(options, options.count)
    layers = [bind(on.generator, name) for name in names]
    moments = collect_second_moments(
        layers,
        on.latents,
        batch_size=options.batch_size,
        checkpoints=options.resume,
        progress=on.progress,
        latent_seed=on.seed,
        skip_nonfinite=options.skip_nonfinite,
        until=options.until,
    )
    for layer, moment, out in zip(layers, moments, options.out, strict=True):
        moment.save(out)
        error = "" if math.isnan(moment.standard_error) else f", standard error {moment.standard_error:.2%}"
        skipped = f", {moment.skipped} pictures left out" if moment.skipped else ""
        say(f"{moment.count} keys of {moment.channels} channels at layer {layer.name}{error}{skipped} -> {out}")


def _interrupted(options: argparse.Namespace) -> str:
    kept = [file for file in options.resume or [] if os.path.exists(file)]
    if kept:
        return f"; run the same command again to go on from {', '.join(kept)}"
    if options.resume:
        return "; that was before the first checkpoint, so nothing was written"
    return "; nothing was written, but with --resume FILE it can go on where it was"


COMMAND = Command(
    "collect",
    "collect the second moment of one or several layers in one pass",
    "rewrite collect --layer synthesis.layer4.conv --count 1000 --out moment.safetensors",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
    interrupted=_interrupted,
)
