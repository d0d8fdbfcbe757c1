"""``rewrite edit``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .command import Command, UsageError
from .messages import say
from .options import (
    BLENDS,
    DIRECTIONS,
    GENERATOR_NOTES,
    LOSSES,
    OBJECTIVES,
    PNG,
    REGIONS,
    SAFETENSORS,
    SOLVERS,
    UNBOUNDED,
    add_edit,
    add_generator,
    bound,
    check_pixels,
    collected_afresh,
    input_file,
    numbers,
    output,
    positive,
    real,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..edits.edit import Edit
    from ..layers.bound import BoundLayer
    from ..solvers.base import Solver
    from .generator import Subject

_SIDE = 128  # of each picture in the preview
SOLVER_OPTIONS = ("steps", "lr", "project_every", "project_gradient", "iterations")  # each solver takes some of them


def add_options(parser: argparse.ArgumentParser) -> None:
    """What an edit is asked for with; not what is written."""
    # Defaults are the library's: None means that an option was not given, and what was given can be refused.
    add_generator(parser, count=1000)
    add_edit(parser)
    parser.add_argument(
        "--rank", type=positive, help="of the change (default 4, or what the context spans; 1 of --erase and --zero)"
    )
    parser.add_argument("--directions", choices=DIRECTIONS, help="how they are found (default whitened)")
    parser.add_argument("--region", choices=REGIONS, help="fit the whole map (default) or the pasted box alone")
    parser.add_argument("--blend", choices=BLENDS, help="paste through the copy's mask (default) or its bounding box")
    parser.add_argument(
        "--loss", choices=LOSSES, help="squared (default) or absolute distance to the goal (default of --erase)"
    )
    parser.add_argument(
        "--preserve", type=real(), help="weight of leaving other pictures alone (default 0; 1 but for values)"
    )
    parser.add_argument(
        "--protect", type=numbers, metavar="NUMBERS", help="pictures that must not change at all, such as 3,5,8-11"
    )
    parser.add_argument(
        "--protect-energy",
        type=real(above=0),
        metavar="SHARE",
        help="of what these pictures hold at the layer (default 1; many of them leave room for nothing else)",
    )
    parser.add_argument(
        "--trust",
        type=bound,
        metavar="SIZE",
        help="fit again what changes more of the layer's output on ordinary keys (default 0.25), or none",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="what is compared with the goal: the layer's value (default) or pictures",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--erase", type=positive, metavar="UNITS", help="erase: silence so many units in the paste")
    kind.add_argument("--zero", action="store_true", help="remove the weight's projection on the context")
    group = parser.add_argument_group("solver")
    group.add_argument("--solver", choices=SOLVERS, help="default lm; lbfgs for other objectives than value")
    group.add_argument("--steps", type=positive, help="of projected, adam and unconstrained (default 2001)")
    group.add_argument(
        "--lr",
        type=real(above=0),
        help="learning rate: of projected (default 0.05), in parts of the weight of adam (0.01), unconstrained (0.002)",
    )
    group.add_argument("--project-every", type=positive, metavar="STEPS", help="of projected (default 10)")
    group.add_argument("--iterations", type=positive, help="of lbfgs at most (default 40)")
    group.add_argument("--project-gradient", action="store_true", default=None, help="of projected: every gradient too")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument(
        "--out",
        type=output(SAFETENSORS, required=False),
        metavar="FILE",
        help="safetensors file to write",
    )
    parser.add_argument(
        "--preview",
        type=output(PNG),
        metavar="FILE.png",
        help="draw what the paste renders, before any fit; without --out nothing is fitted",
    )
    parser.add_argument(
        "--goal",
        type=input_file,
        nargs="+",
        metavar="PICTURE",
        help="your own retouched pictures, one for each picture that is pasted into, for --objective pictures",
    )
    parser.add_argument(
        "--state-dict",
        type=output(SAFETENSORS),
        metavar="FILE.safetensors",
        help="also write the generator's whole edited state dict",
    )


def _refuse_unused(options: argparse.Namespace) -> None:
    """An option that would change nothing is an error."""
    goal = getattr(options, "goal", None)  # a job of rewrite batch has none
    fit = ("solver", "loss", "preserve", "protect", "trust", "region", "blend", "objective", "goal", *SOLVER_OPTIONS)
    for holds, names, reason in (
        (options.zero, fit, "--zero fits nothing"),
        (options.erase, ("blend", "objective", "goal"), "--erase pastes nothing"),
        (goal, ("region", "blend"), "--goal pastes nothing"),
        (not options.protect, ("protect_energy",), "nothing is protected"),
        (options.solver == "unconstrained", ("rank", "directions"), "the unconstrained solver has no directions"),
    ):
        for name in names:
            if holds and getattr(options, name, None) is not None:
                raise UsageError(f"{_flag(name)} would change nothing, for {reason}; leave it out.")


def _solver(name: str | None, objective: str | None, given: Mapping[str, Any]) -> Solver | None:
    """The solver of that name with its options; None for the library's default."""
    from ..solvers.choice import SOLVERS as KINDS

    takes = {kind: [field.name for field in dataclasses.fields(KINDS[kind])] for kind in SOLVERS}
    chosen = name or ("lm" if objective in (None, "value") else "lbfgs")
    for option in given:
        if option not in takes[chosen]:
            others = " or ".join(kind for kind in SOLVERS if option in takes[kind])
            raise UsageError(f"The {chosen} solver has no {_flag(option)}; leave it out, or choose --solver {others}.")
    return KINDS[chosen](**given) if name or given else None


def _pictures(files: Sequence[str], shape: tuple[int, ...], span: tuple[float, float]) -> Tensor:
    """The goal pictures [n, C, H, W] in the generator's range."""
    import torch

    from .. import pictures

    low, high = span
    read = [pictures.read(file, shape[0]) for file in files]
    for file, picture in zip(files, read, strict=True):
        if picture.shape != shape:
            sizes = ("x".join(map(str, size[1:])) for size in (picture.shape, shape))
            raise UsageError("{} has {} pixels and the generator's pictures {}.".format(file, *sizes))
    return low + (high - low) * torch.stack(read)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the call that the options ask for. Raises UsageError where one would change nothing."""
    _refuse_unused(options)
    named = ("rank", "directions", "region", "blend", "loss", "preserve", "objective")
    given = {name: getattr(options, name) for name in named}
    given["solver"] = _solver(
        options.solver,
        "value" if options.erase else options.objective,
        {name: value for name in SOLVER_OPTIONS if (value := getattr(options, name)) is not None},
    )
    given["units"] = options.erase
    given = {name: value for name, value in given.items() if value is not None}
    if options.trust is not None:
        given["trust"] = None if options.trust == UNBOUNDED else options.trust
    return given


def with_protected(options: argparse.Namespace, given: Mapping[str, Any], latents: Tensor) -> dict[str, Any]:
    """The arguments, and the pictures that the options protect. Raises UsageError for one that is not there."""
    if not options.protect:
        return dict(given)
    from ..edits.protection import Protect

    if max(options.protect) >= len(latents):
        raise UsageError(f"--protect names picture {max(options.protect)}, and there are {len(latents)}.")
    energy = 1.0 if options.protect_energy is None else options.protect_energy
    return {**given, "preserve": [given.get("preserve"), Protect(latents=latents[options.protect], energy=energy)]}


def _draw_preview(options: argparse.Namespace, on: Subject, layer: BoundLayer, edit: Edit) -> None:
    """The pictures that are pasted into, as they are and with the paste."""
    import torch

    from .. import pictures
    from ..edits.goals import preview

    rows = list(dict.fromkeys(paste.index for paste in edit.pastes))
    check_pixels(2 * len(rows), _SIDE)
    after = pictures.to_unit(preview(layer, edit, on.latents, blend=options.blend or "mask"), on.span)
    before = on.paint(on.latents[torch.tensor(rows)], progress=False)
    cells = pictures.before_after(before, after, _SIDE, [f"picture {row}" for row in rows], columns=6)
    pictures.save_png(pictures.grid(cells, f"before | the paste at layer {layer.name}"), options.preview)
    say(f"what the paste renders -> {options.preview}")


def run(options: argparse.Namespace) -> None:
    from ..errors import warn
    from ..files import save_tensors
    from ..layers.binding import bind
    from ..rewrites.calls import erase, rewrite, zero
    from .generator import subject
    from .inputs import edit_named, moment_for

    if not (options.out or options.preview):
        raise UsageError("Name the file to write with --out, or with --preview a picture of what the paste renders.")
    if options.preview and (options.erase or options.zero or options.goal):
        raise UsageError("--preview draws a copy and its pastes, and --erase, --zero and --goal paste nothing.")
    given = asked_for(options)
    edit = edit_named(options.edit, options.generator, options.seed)
    on = subject(options, options.count)
    layer = bind(on.generator, options.layer)
    if options.preview:
        _draw_preview(options, on, layer, edit)
        if not options.out:
            return
    moment = moment_for(options.moment, layer, on)
    given = with_protected(options, given, on.latents)
    if options.zero:
        change = zero(layer, moment, edit, on.latents, **given)
    elif options.erase:
        change = erase(layer, moment, edit, on.latents, progress=on.progress, **given)
    else:
        if options.goal is not None:
            given["goal"] = _pictures(options.goal, on.shape, on.span)
        change = rewrite(layer, moment, edit, on.latents, progress=on.progress, **given)
    change.save(options.out)
    size = change.size or 0.0
    whole = sum(change.seconds.values())
    took = ", ".join(f"{stage} {took * 1e3:.0f} ms ({took / whole:.0%})" for stage, took in change.seconds.items())
    if options.protect:
        say(f"{change.remaining} of {layer.in_channels} directions remain beside what is protected")
    say(f"{change!r} -> {options.out}\nsize of the change, |dW| / |W|: {size:.2f}\n{took}")
    if size > 1:
        warn(
            f"The change is {size:.1f} times the weight: look at rewrite render and rewrite measure before you believe "
            "the loss; --preserve 0.3, --region map or a lower --rank make it smaller."
        )
    if options.state_dict:
        save_tensors(options.state_dict, change.state_dict())
        say(f"edited state dict -> {options.state_dict}")


COMMAND = Command(
    "edit",
    "solve an edit and save the rewrite",
    "rewrite edit spire --layer synthesis.layer4.conv --rank 4 --loss l2 --region map --out spire.safetensors",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
    interrupted=collected_afresh,
)
