"""``rewrite collect``."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from ..statistics.second_moment import SecondMoment
    from ..statistics.shards import Shard


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
        "--shard", metavar="K/N", help="collect part K of N only, K from 1; rewrite merge adds the parts up"
    )
    parser.add_argument(
        "--skip-nonfinite", action="store_true", help="leave out pictures whose keys hold NaN or infinity"
    )


def run(options: argparse.Namespace) -> None:
    from ..statistics.distributed import launched, own_device, together

    for option, files in (("--out", options.out), ("--resume", options.resume)):
        if files is not None and len(files) != len(options.layer):
            raise UsageError(f"Each --layer takes one {option} of its own, in the same order.")
    if not launched():
        _collect(options)
        return
    if options.shard:
        raise UsageError("torchrun gives each of its processes a shard by itself; leave --shard out.")
    if options.until is not None:
        raise UsageError(
            "--until looks at all latents so far, in their order, and each of torchrun's processes has its own alone: "
            "leave it out, and give as many latents as it takes."
        )
    options.device = own_device(options.device)
    with together() as shard:
        if shard.number > 1:
            warnings.simplefilter("ignore")  # the first says it
        _collect(options, shard)


def _collect(options: argparse.Namespace, own: Shard | None = None) -> None:
    """Collect all of it, or the shard that the options name, or `own`, that of this process of several."""
    from ..layers.binding import bind
    from ..statistics.collection import Asked, collect_second_moments
    from ..statistics.distributed import collect_shard, collect_together
    from ..statistics.shards import Shard
    from .generator import subject

    on = subject(options, options.count)
    layers = [bind(on.generator, name) for name in options.layer]
    asked = Asked(options.batch_size, options.until, options.skip_nonfinite, None, on.progress)
    if own is not None:
        asked = replace(asked, progress=on.progress and own.number == 1)
        kept = options.resume or options.out
        collect_together(layers, on.latents, own, asked, on.seed, kept, lambda moments: _save(moments, options))
    elif options.shard:
        shard = Shard.parse(options.shard)
        _save(collect_shard(layers, on.latents, shard, asked, on.seed, options.resume), options)
    else:
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
        _save(moments, options)


def _save(moments: Sequence[SecondMoment], options: argparse.Namespace) -> None:
    for moment, name, out in zip(moments, options.layer, options.out, strict=True):
        moment.save(out)
        say(f"{told(moment, name)} -> {out}")


def told(moment: SecondMoment, layer: str | None) -> str:
    """What is in a second moment of a layer, in a few words."""
    where = "" if layer is None else f" at layer {layer}"
    error = "" if math.isnan(moment.standard_error) else f", standard error {moment.standard_error:.2%}"
    skipped = f", {moment.skipped} pictures left out" if moment.skipped else ""
    return f"{moment.count} keys of {moment.channels} channels{where}{error}{skipped}"


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
    processes=True,
)
