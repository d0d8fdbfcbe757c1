"""``rewrite edit``."""

from __future__ import annotations

import argparse

from .command import Command, UsageError
from .messages import say
from .options import (
    DIRECTIONS,
    GENERATOR_NOTES,
    LOSSES,
    SOLVERS,
    add_edit,
    add_generator,
    collected_afresh,
    output,
    positive,
    real,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Defaults are the library's: None means that an option was not given, and what was given can be refused.
    add_generator(parser, count=1000)
    add_edit(parser)
    parser.add_argument("--out", required=True, type=output(), metavar="FILE", help="safetensors file to write")
    parser.add_argument("--rank", type=positive, help="of the change (default 1)")
    parser.add_argument("--method", choices=DIRECTIONS, help="how the directions are found (default whitened)")
    parser.add_argument("--solver", choices=SOLVERS, help="how the change along them is found (default lm)")
    parser.add_argument("--loss", choices=LOSSES, help="absolute or squared distance to the goal (default l1)")
    parser.add_argument("--preserve", type=real(), help="weight of leaving ordinary pictures alone (default 0)")
    parser.add_argument("--steps", type=positive, help="of the other solvers than lm (default 2001)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--tight",
        action="store_true",
        default=None,
        help="fit the pasted box, as if nothing were around it (default, but for --erase)",
    )
    where.add_argument(
        "--whole-map",
        dest="tight",
        action="store_false",
        default=None,
        help="fit the whole map (default for --erase)",
    )
    parser.add_argument("--box", action="store_true", default=None, help="paste the copy's bounding box, not its mask")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--erase", type=positive, metavar="UNITS", help="erase: silence so many units in the paste")
    kind.add_argument("--zero", action="store_true", help="remove the weight's projection on the context")
    parser.add_argument(
        "--state-dict",
        type=output(".safetensors"),
        metavar="FILE.safetensors",
        help="also write the generator's whole edited state dict",
    )


def _refuse_unused(options: argparse.Namespace) -> None:
    """An option that would change nothing is an error."""
    flags = {"tight": "--whole-map" if options.tight is False else "--tight"}
    for holds, names, reason in (
        (options.zero, ("solver", "loss", "preserve", "steps", "tight", "box"), "--zero fits nothing"),
        (options.erase, ("box",), "--erase pastes nothing"),
        (options.solver in (None, "lm"), ("steps",), "the lm solver runs until it is done"),
        (options.solver == "unconstrained", ("rank", "method"), "the unconstrained solver has no directions"),
    ):
        for name in names:
            if holds and getattr(options, name) is not None:
                raise UsageError(f"{flags.get(name, f'--{name}')} would change nothing, for {reason}; leave it out.")


def run(options: argparse.Namespace) -> None:
    from ..errors import warn
    from ..files import atomic_write
    from ..layers.binding import bind
    from ..rewrites.rewriting import erase, rewrite, zero
    from .generator import subject
    from .inputs import edit_named, moment_for

    _refuse_unused(options)
    edit = edit_named(options.edit, options.generator, options.seed)
    on = subject(options, options.count)
    layer = bind(on.generator, options.layer)
    moment = moment_for(options.moment, layer, on)
    names = ("rank", "method", "solver", "loss", "preserve", "steps", "tight")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.zero:
        change = zero(layer, moment, edit, on.latents, **given)
    elif options.erase:
        change = erase(layer, moment, edit, on.latents, units=options.erase, progress=on.progress, **given)
    else:
        change = rewrite(layer, moment, edit, on.latents, alpha=not options.box, progress=on.progress, **given)
    change.save(options.out)
    size = (change.weight_delta().double().norm() / layer.weight.double().norm()).item()
    whole = sum(change.seconds.values())
    took = ", ".join(f"{stage} {took * 1e3:.0f} ms ({took / whole:.0%})" for stage, took in change.seconds.items())
    say(f"{change!r} -> {options.out}\nsize of the change, |dW| / |W|: {size:.2f}\n{took}")
    if size > 1:
        warn(
            f"The change is {size:.1f} times the weight: look at rewrite render and rewrite measure before you believe "
            "the loss; --preserve 0.3, --whole-map or a lower --rank make it smaller."
        )
    if options.state_dict:
        from safetensors.torch import save_file

        state = {name: tensor.cpu().contiguous() for name, tensor in change.state_dict().items()}
        with atomic_write(options.state_dict) as partial:
            save_file(state, partial)
        say(f"edited state dict -> {options.state_dict}")


COMMAND = Command(
    "edit",
    "solve an edit and save the rewrite",
    "rewrite edit spire --layer synthesis.layer4.conv --rank 4 --loss l2 --whole-map --out spire.safetensors",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
    interrupted=collected_afresh,
)
