"""``rewrite export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, UsageError
from .messages import say
from .options import GENERATOR_NOTES, OutputFile, add_generator, input_file, real

FORMATS = ("state-dict", "peft", "diffusers", "onnx", "torch-export")
_ENDS = {"state-dict": ".safetensors", "diffusers": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rule", nargs="+", type=input_file, metavar="RULE", help="saved rewrites, or folders of peft")
    add_generator(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--out", required=True, type=_target, metavar="PATH", help="file to write; a folder for peft")
    parser.add_argument("--strength", type=real(), default=1.0, help="what the change is scaled by (default 1)")
    parser.add_argument("--part", default="unet", help="of a diffusers pipeline: what the generator is (default unet)")
    parser.add_argument("--force", action="store_true", help="also for weights that the rewrite was not fitted to")


def _target(text: str) -> OutputFile:
    """An argparse type: a file or a folder to write, as the format says, which is looked at later."""
    return OutputFile(input_file(text))


def run(options: argparse.Namespace) -> None:
    from ..exchange.graph import save_onnx, save_program
    from ..exchange.lora import save_diffusers, save_peft
    from ..files import writable_path
    from .generator import subject
    from .rewrites import load_rewrites

    end = _ENDS.get(options.format, "")
    if not options.out.lower().endswith(end):
        raise UsageError(f"{options.format} is written to a file whose name ends in {end}, not {options.out}.")
    if end:
        writable_path(options.out)
    elif Path(options.out).is_file():
        raise UsageError(f"{options.out} is a file, and peft's adapters are folders; name another.")
    on = subject(options, 2)
    changes = load_rewrites(options.rule, on.generator)
    if options.format == "peft":
        save_peft(changes, on.generator, options.out, options.strength)
    elif options.format == "diffusers":
        save_diffusers(changes, on.generator, options.out, options.part, options.strength)
    elif options.format == "onnx":
        save_onnx(changes, on.generator, on.latents, options.out, options.strength, options.force)
    elif options.format == "torch-export":
        save_program(changes, on.generator, on.latents, options.out, options.strength, options.force)
    else:
        _save_state(changes, on.generator, options)
    say(f"{', '.join(options.rule)} as {options.format} -> {options.out}")


def _save_state(changes: list, generator: object, options: argparse.Namespace) -> None:
    import contextlib

    from ..files import save_tensors

    with contextlib.ExitStack() as applied:
        for change in changes[:-1]:
            change.apply(generator, strength=options.strength, force=options.force)
            applied.callback(change.revert, generator)
        last = changes[-1].apply(generator, strength=options.strength, force=options.force)
        applied.callback(last.revert, generator)
        state = last.state_dict(generator)
    save_tensors(options.out, {name: value for name, value in state.items() if hasattr(value, "contiguous")})


COMMAND = Command(
    "export",
    "write rewrites in other tools' formats: a state dict, peft, diffusers, ONNX, torch.export",
    "rewrite export spire.safetensors --format peft --out spire_adapter",
    add_arguments,
    run,
    notes=GENERATOR_NOTES,
)
