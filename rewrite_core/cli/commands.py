"""The ``rewrite`` command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import pictures
from ..backends import BackendUnavailable, explain
from ..demo import LATENT_SIZE, RULES, chapels, load_edit
from ..demo.rules import score
from ..demo.run import EDIT_SEED, run_demo, table
from ..edits.directions import DIRECTIONS
from ..edits.edit import Edit
from ..edits.matches import search
from ..edits.selection import Selection
from ..errors import RewriteCoreError
from ..files import atomic_write, writable_path
from ..generators.loading import load_generator, load_into
from ..layers.binding import BoundLayer, bind, list_layers
from ..layers.fingerprints import tensor_fingerprint
from ..layers.latents import sample_latents
from ..ops.fit_low_rank import LOSSES
from ..rewrites.calls import erase, rewrite, zero
from ..rewrites.change import Rewrite
from ..solvers.choice import SOLVERS
from ..statistics.moments import SecondMoment, collect_second_moment
from ..version import __version__

MOST_PICTURES, MOST_LATENTS = 10_000, 1_000_000  # in one file; for one, as all before the last are drawn too
CHAPELS, PICKLED = "chapels", "the pickled network"
_GENERATOR_HELP = """
generators:
  By default a command works on the embedded generator, "chapels". For your own, name a function that returns it:
    rewrite layers --generator my_module:make_generator --checkpoint weights.safetensors --latent-size 100
  `make_generator()` returns the torch module, and the checkpoint (a state dict: .pt, .pth, .safetensors or .npz, never
  unpickled beyond tensors) is loaded into it; or `make_generator(checkpoint)` takes the path itself, as
  rewrite_core:load_proggan and rewrite_core:load_stylegan2 do. A pickled network is opened with --allow-pickle only, since
  that runs whatever code is in it. The generator is called with latents [N, SIZE], or
  [N, 100, 1, 1] for --latent-size 100x1x1, and returns images in -1..1, or in what --range says.
"""


class UsageError(RewriteCoreError):
    """A command line that cannot be carried out."""


# --- the generator and its latents -----------------------------------------------------------------------


def _brief(error: BaseException) -> str:
    """What a user's own code raised, in one line, and where."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(" .:")
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:  # a SyntaxError says itself where it is
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _import_from_here() -> None:
    """As python -m does: a script beside you is a module."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _import_function(spec: str) -> Callable:
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"--generator takes {CHAPELS!r} or module:function, not {spec!r}.")
    if os.sep in module_name or module_name.endswith(".py"):
        file = Path(module_name)
        raise UsageError(
            f"--generator takes a module and not a file: use {file.stem}:{attribute}, and run from {file.parent}{os.sep}."
        )
    _import_from_here()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's own code raises anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UsageError(f"There is no module {missing!r} to import {spec!r} from; run from its folder.") from error
        raise UsageError(
            f"Module {module_name!r} cannot be imported; mend it, or install what it needs: {_brief(error)}."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"Module {module_name!r} has no function {attribute!r}.")
    return function


def _required(function: Callable) -> list[str]:
    """The names of the arguments that a call must give."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _make_generator(spec: str, checkpoint: str | None) -> nn.Module:
    function = _import_function(spec)
    required = _required(function)
    if len(required) > 1:
        raise UsageError(f"{spec} needs {', '.join(required)}; name a function of nothing, or of a checkpoint's path.")
    if required and not checkpoint:
        raise UsageError(f"{spec} takes a checkpoint; name it with --checkpoint.")
    try:
        generator = function(checkpoint) if required else function()
    except (RewriteCoreError, OSError):  # a sentence already
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{spec} made no generator; call it in Python to see why: {_brief(error)}.") from error
    if not isinstance(generator, nn.Module):
        raise UsageError(f"{spec} returned a {type(generator).__name__}, not a torch.nn.Module.")
    if next(generator.parameters(), None) is None:
        raise UsageError(f"{spec} returned a module without parameters, which has nothing to rewrite.")
    if checkpoint and not required:
        load_into(generator, checkpoint)
    return generator


def _load_generator(options: argparse.Namespace) -> nn.Module:
    device = _device(options.device)
    if options.generator == PICKLED:
        if not options.checkpoint:
            raise UsageError("--allow-pickle needs the pickled network, --checkpoint FILE.")
        _import_from_here()  # the network's code
        return load_generator(options.checkpoint, allow_pickle=True).to(device)
    if options.generator != CHAPELS:
        return _make_generator(options.generator, options.checkpoint).to(device).eval()
    if options.checkpoint:
        raise UsageError("The embedded generator has its own weights; name yours with --generator module:function.")
    return chapels().to(device)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"Device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu."
        ) from error
    return device


def _latents(options: argparse.Namespace, count: int) -> Tensor:
    size = options.latent_size
    if size is None:
        if options.generator != CHAPELS:
            raise UsageError("Say what latents your generator takes with --latent-size, such as 512 or 100x1x1.")
        size = (LATENT_SIZE,)
    if options.latents == "uniform":
        rows = np.random.RandomState(options.seed).uniform(-1, 1, (count, *size))
        return torch.from_numpy(rows).float()
    return sample_latents(math.prod(size), count, seed=options.seed).reshape(count, *size)


def _paint(options: argparse.Namespace, generator: nn.Module, latents: Tensor, progress: bool = True) -> Tensor:
    """Pictures of the latents, in 0..1."""
    return pictures.paint(
        generator, latents, batch_size=16, span=options.range, progress=progress and not options.quiet
    )


def _setup(options: argparse.Namespace, count: int) -> tuple[nn.Module, Tensor]:
    """The generator and `count` latents, tried out on two of them."""
    generator = _load_generator(options)
    latents = _latents(options, count)
    try:
        images = _paint(options, generator, latents[:2], progress=False)
    except Exception as error:  # a user's own code raises anything
        raise UsageError(
            f"{options.generator} fails on latents {list(latents[:2].shape)}; check --latent-size (512, or 100x1x1 "
            f"where latents are maps) and --checkpoint: {_brief(error)}."
        ) from error
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(f"{options.generator} makes outputs {list(images.shape)}, not images [N, 3, H, W].")
    if options.generator != CHAPELS and not options.checkpoint:
        warnings.warn(f"Without --checkpoint the weights are those that {options.generator} starts from.")
    return generator, latents


# --- arguments -------------------------------------------------------------------------------------------


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")

    return parse


_positive = _whole(1)


def _numbers(text: str) -> list[int]:
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


def _size(text: str) -> tuple[int, ...]:
    """ "512" -> (512,); "100x1x1" -> (100, 1, 1)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512 or 100x1x1")
    return tuple(map(int, text.split("x")))


def _range(text: str) -> tuple[float, float]:
    """ "0,1" -> (0.0, 1.0)."""
    with contextlib.suppress(ValueError):
        low, high = map(float, text.split(","))
        if -math.inf < low < high < math.inf:
            return low, high
    raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, the lower first, such as 0,1")


def _file(suffix: str = "") -> Callable[[str], str]:
    """An argparse type: a file to write, found out before the work; its name ends in `suffix`."""

    def parse(text: str) -> str:
        try:
            writable_path(text)
        except OSError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if not text.lower().endswith(suffix):
            raise argparse.ArgumentTypeError(f"{text!r} would hold {suffix[1:]}; end its name in {suffix}")
        return text

    return parse


def _check_files(options: argparse.Namespace) -> None:
    """A file that is written is no file that is read, nor another that is written; but a checkpoint may end as the
    moment."""

    def files(*names: str) -> list[str]:
        given = (getattr(options, name, None) for name in names)
        return [file for each in given if each for file in (each if isinstance(each, list) else [each])]

    seen = {os.path.realpath(file): file for file in files("edit", "moment", "rewrite", "checkpoint")}
    checkpoints = itertools.zip_longest(files("resume"), files("out"))
    others = [
        file for file, out in checkpoints if file and not (out and os.path.realpath(file) == os.path.realpath(out))
    ]
    for file in [*files("out", "state_dict"), *others]:
        place = os.path.realpath(file)
        if place in seen:
            raise UsageError(
                f"{file} is named twice, and writing it would lose {seen[place]}; give each file its own name."
            )
        seen[place] = file


# --- commands --------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> None:
    report = run_demo(options.out, device=str(_device(options.device)), progress=not options.quiet)
    print(table(report))
    names = ", ".join(f"{name}.png" for name in report["edits"])
    print(f"\n{report['environment']['seconds_total']} s in all. Look at {names} in {options.out}.")


def _layers(options: argparse.Namespace) -> None:
    infos = list_layers(*_setup(options, 2), general=True)
    if options.json:
        print(json.dumps([vars(info) for info in infos], indent=2))
        return
    head = ("layer", "family", "channels", "kernel", "key map", "value map", "lm solver")
    rows = [head]
    for info in infos:
        key, value = ("x".join(map(str, size)) for size in (info.key_size, info.value_size))
        kernel = "x".join(map(str, info.kernel_size)) or "1"
        channels = f"{info.in_channels} -> {info.out_channels}"
        rows.append((info.name, info.family, channels, kernel, key, value, info.solver))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _collect(options: argparse.Namespace) -> None:
    names = options.layer
    for option, files in (("--out", options.out), ("--resume", options.resume)):
        if files is not None and len(files) != len(names):
            raise UsageError(f"Each --layer takes one {option} of its own, in the same order.")
    generator, latents = _setup(options, options.count)
    layers = [bind(generator, name) for name in names]
    moments = collect_second_moment(
        layers=layers,
        latents=latents,
        batch_size=options.batch_size,
        checkpoint=options.resume,
        progress=not options.quiet,
        latent_seed=options.seed,
        skip_nonfinite=options.skip_nonfinite,
        until=options.until,
    )
    for layer, moment, out in zip(layers, moments, options.out, strict=True):
        moment.save(out)
        error = "" if math.isnan(moment.standard_error) else f", standard error {moment.standard_error:.2%}"
        skipped = f", {moment.skipped} pictures left out" if moment.skipped else ""
        print(f"{moment.count} keys of {moment.channels} channels at {layer.name}{error}{skipped} -> {out}")


def _load_edit(options: argparse.Namespace) -> Edit:
    """The edit that a command line names: a file, or by its name one of the embedded generator's own."""
    if options.generator != CHAPELS or options.edit not in RULES:
        if options.generator == CHAPELS and not Path(options.edit).exists():
            known = ", ".join(RULES)
            raise UsageError(f"There is no file {options.edit!r}; the embedded generator's own edits are {known}.")
        return Edit.load(options.edit)
    if options.seed != EDIT_SEED:
        raise UsageError(f"The edit {options.edit!r} selects from the pictures of --seed {EDIT_SEED}.")
    return load_edit(options.edit)


def _moment_for(options: argparse.Namespace, layer: BoundLayer, latents: Tensor) -> SecondMoment:
    if not options.moment:
        return collect_second_moment(layer, latents, progress=not options.quiet, latent_seed=options.seed)
    moment = SecondMoment.load(options.moment, layer)
    seed, count, fingerprint = (moment.latents.get(name) for name in ("seed", "count", "fingerprint"))
    # a longer sample begins with the rows of a shorter one
    comparable = count is not None and count <= len(latents)
    if seed not in (None, options.seed) or (comparable and fingerprint != tensor_fingerprint(latents[:count])):
        warnings.warn(
            f"{options.moment} was collected on other latents (seed {seed}) than these (seed {options.seed}); make "
            "sure that the edit selects from these."
        )
    return moment


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


def _edit(options: argparse.Namespace) -> None:
    _refuse_unused(options)
    edit = _load_edit(options)
    generator, latents = _setup(options, options.count)
    layer = bind(generator, options.layer)
    moment = _moment_for(options, layer, latents)
    given = {name: value for name in ("rank", "loss", "preserve") if (value := getattr(options, name)) is not None}
    if options.method is not None:
        given["directions"] = options.method
    if options.tight is not None:
        given["region"] = "box" if options.tight else "map"
    if options.solver is not None:
        given["solver"] = SOLVERS[options.solver](**({} if options.steps is None else {"steps": options.steps}))
    if options.zero:
        change = zero(layer, moment, edit, latents, **given)
    elif options.erase:
        change = erase(layer, moment, edit, latents, units=options.erase, progress=not options.quiet, **given)
    else:
        given["blend"] = "box" if options.box else "mask"
        change = rewrite(layer, moment, edit, latents, progress=not options.quiet, **given)
    change.save(options.out)
    size = (change.weight_delta().double().norm() / layer.weight.double().norm()).item()
    whole = sum(change.seconds.values())
    took = ", ".join(f"{stage} {took * 1e3:.0f} ms ({took / whole:.0%})" for stage, took in change.seconds.items())
    print(f"{change!r} -> {options.out}\nsize of the change, |dW| / |W|: {size:.2f}\n{took}")
    if size > 1:
        warnings.warn(
            f"The change is {size:.1f} times the weight: look at rewrite render and rewrite eval before you believe the "
            "loss; --preserve 0.3, --whole-map or a lower --rank make it smaller."
        )
    if options.state_dict:
        from safetensors.torch import save_file

        state = {name: tensor.cpu().contiguous() for name, tensor in change.state_dict().items()}
        with atomic_write(options.state_dict) as partial:
            save_file(state, partial)
        print(f"edited state dict -> {options.state_dict}")


def _before_after(options: argparse.Namespace, generator: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures without and with the rewrites; the generator is left as it was."""
    changes = [Rewrite.load(path) for path in options.rewrite]
    with contextlib.ExitStack() as applied:
        for change in changes:
            change.apply(generator, force=options.force)
            applied.callback(change.revert)
        after = _paint(options, generator, latents)
    return _paint(options, generator, latents), after


def _render(options: argparse.Namespace) -> None:
    generator, latents = _setup(options, max(options.images) + 1)
    latents = latents[options.images]
    labels = [str(index) for index in options.images]
    if options.rewrite:
        before, after = _before_after(options, generator, latents)
        rows = pictures.before_after(before, after, options.size, labels, columns=6)
        title = "before | after " + ", ".join(Path(path).name for path in options.rewrite)
    else:
        painted = _paint(options, generator, latents)
        cells = [(pictures.to_image(picture, options.size), label) for picture, label in zip(painted, labels)]
        rows, title = [cells[i : i + 8] for i in range(0, len(cells), 8)], f"pictures of seed {options.seed}"
    pictures.save_png(pictures.grid(rows, title), options.out)
    print(f"{len(latents)} pictures -> {options.out}")


def _eval(options: argparse.Namespace) -> None:
    if options.rule and options.generator != CHAPELS:
        raise UsageError("--rule is measured against the world of the embedded generator only.")
    generator, latents = _setup(options, options.count)
    before, after = _before_after(options, generator, latents)
    change = (after - before).abs().mean((1, 2, 3))
    report = {
        "pictures": len(latents),
        "seed": options.seed,
        "mean_change": change.mean().item(),
        "median_change": change.median().item(),
        "largest_change": change.max().item(),
        "most_changed": change.argsort(descending=True)[:8].tolist(),
    }
    if options.rule:
        scores = vars(score(RULES[options.rule], before, after, latents))
        known = {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in scores.items()
        }
        report |= {"rule": options.rule, **known}  # NaN, where no picture is concerned, is no JSON
    print(json.dumps(report, indent=2))


def _search(options: argparse.Namespace) -> None:
    edit = _load_edit(options)
    selection: Selection | tuple[Selection, ...] | None = getattr(edit, options.selection)
    if options.selection == "context":
        selection = edit.where[0]
    elif isinstance(selection, tuple):  # several pastes
        selection = selection[0]
    if selection is None:
        raise UsageError(f"The edit has no {options.selection} selection; choose another with --selection.")
    generator, latents = _setup(options, options.count)
    layer = bind(generator, options.layer)
    moment = _moment_for(options, layer, latents)
    found = search(layer, moment, selection, latents, options.top, progress=not options.quiet)
    images = _paint(options, generator, latents[found.indices])
    query = _paint(options, generator, latents[selection.index][None], progress=False)[0]
    high = found.heatmaps.max().item()
    cells = [(pictures.selected(query, selection, options.size), f"query: {selection.index}")]
    for i, index in enumerate(found.indices.tolist()):
        picture = pictures.heat(images[i], found.heatmaps[i], options.size, found.level, high)
        cells.append((picture, f"{index}: {found.scores[i]:.3f}"))
    rows = [cells[i : i + 7] for i in range(0, len(cells), 7)]
    pictures.save_png(pictures.grid(rows, f"best matches at {layer.name}"), options.out)
    print("  ".join(f"{i}:{s:.3f}" for i, s in zip(found.indices.tolist(), found.scores.tolist())))
    print(f"heat maps -> {options.out}")


def _bench(options: argparse.Namespace) -> int:
    if _device(options.device).type != "cpu":
        raise UsageError("The benchmarks measure the CPU so far; leave --device out.")
    try:
        from .benchmarks.runner import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("rewrite_core.benchmarks", "pytest", "pytest_benchmark"):
            raise
        raise UsageError(
            f"{error.name} is not installed; run pip install '.[test]' in a checkout to benchmark."
        ) from error
    return run(options.names or ["all"], Path(options.out), options.quick)


def _info(options: argparse.Namespace) -> None:
    _device(options.device)
    print(f"rewrite_core {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(explain())


# --- the parser ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Bad usage is one sentence, like every other error."""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; see {self.prog} --help.\n")


def _add_generator(parser: argparse.ArgumentParser, count: int | None) -> None:
    group = parser.add_argument_group("generator")
    whose = group.add_mutually_exclusive_group()
    whose.add_argument("--generator", default=CHAPELS, metavar="MODULE:FUNCTION", help=f"default: {CHAPELS}")
    group.add_argument("--checkpoint", metavar="FILE", help="state dict to load into it")
    whose.add_argument(
        "--allow-pickle",
        dest="generator",
        action="store_const",
        const=PICKLED,
        help="instead of --generator: the checkpoint is a pickled network, which runs any code in it as it is opened",
    )
    group.add_argument(
        "--latent-size", type=_size, metavar="SIZE", help="of one latent: 512, or 100x1x1 for [N, 100, 1, 1]"
    )
    group.add_argument("--latents", choices=("normal", "uniform"), default="normal", help="uniform means -1..1")
    group.add_argument(
        "--range",
        type=_range,
        default=(-1.0, 1.0),
        metavar="LOW,HIGH",
        help="what its images lie in, such as 0,1 (default -1,1)",
    )
    group.add_argument(
        "--seed", type=_whole(0, 2**32 - 1), default=1, help="of the latents that selections index (default 1)"
    )
    if count is not None:
        group.add_argument("--count", type=_positive, default=count, help=f"number of latents (default {count})")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of ``rewrite``."""
    parser = _Parser(
        prog="rewrite", description="Change the rules inside a trained image generator by rewriting its weights."
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, generator: int | bool | None = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=_GENERATOR_HELP if generator is not False else None,
        )
        sub.set_defaults(run=run)
        if generator is not False:
            _add_generator(sub, generator)
        sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    def edit_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "edit",
            metavar="EDIT",
            help=f"JSON file, in the reference implementation's format; or for the embedded generator {', '.join(RULES)}",
        )
        sub.add_argument("--layer", required=True, help="its name, one of those that rewrite layers lists")
        sub.add_argument("--moment", metavar="FILE", help="from rewrite collect; collected afresh where not given")

    def rewrite_arguments(sub: argparse.ArgumentParser, required: bool) -> None:
        sub.add_argument(
            "--rewrite",
            action="append",
            default=[],
            required=required,
            metavar="FILE",
            help="from rewrite edit; repeat to stack several",
        )
        sub.add_argument("--force", action="store_true", help="apply to weights the rewrite was not fitted to")

    sub = command("demo", _demo, "change three rules of the embedded generator and measure the result")
    sub.add_argument(
        "--out", default="demo_out", metavar="DIR", help="for the pictures and report.json (default demo_out)"
    )

    sub = command("layers", _layers, "list every layer that can be rewritten", generator=None)
    sub.add_argument("--json", action="store_true", help="print the list as JSON")

    sub = command("collect", _collect, "collect the second moment of one or several layers in one pass", generator=1000)
    sub.add_argument(
        "--layer",
        required=True,
        action="append",
        help="its name, one of those that rewrite layers lists; repeat, with an --out each, for several",
    )
    sub.add_argument(
        "--out", required=True, action="append", type=_file(), metavar="FILE", help="safetensors file to write"
    )
    sub.add_argument("--batch-size", type=_positive, default=16, help="latents at a time (default 16)")
    sub.add_argument(
        "--resume",
        action="append",
        type=_file(),
        metavar="FILE",
        help="keep a checkpoint here and resume from it; one for each --layer",
    )
    sub.add_argument("--until", type=float, metavar="ERROR", help="stop at this relative standard error, such as 0.01")
    sub.add_argument("--skip-nonfinite", action="store_true", help="leave out pictures whose keys hold NaN or infinity")

    # Defaults are the library's: None means that an option was not given, and what was given can be refused.
    sub = command("edit", _edit, "solve an edit and save the rewrite", generator=1000)
    edit_arguments(sub)
    sub.add_argument("--out", required=True, type=_file(), metavar="FILE", help="safetensors file to write")
    sub.add_argument("--rank", type=_positive, help="of the change (default 1)")
    sub.add_argument("--method", choices=DIRECTIONS, help="how the directions are found (default whitened)")
    sub.add_argument("--solver", choices=tuple(SOLVERS), help="how the change along them is found (default lm)")
    sub.add_argument("--loss", choices=LOSSES, help="absolute or squared distance to the goal (default l1)")
    sub.add_argument("--preserve", type=float, help="weight of leaving ordinary pictures alone (default 0)")
    sub.add_argument("--steps", type=_positive, help="of the other solvers than lm (default 2001)")
    where = sub.add_mutually_exclusive_group()
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
    sub.add_argument("--box", action="store_true", default=None, help="paste the copy's bounding box, not its mask")
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument("--erase", type=_positive, metavar="UNITS", help="erase: silence so many units in the paste")
    kind.add_argument("--zero", action="store_true", help="remove the weight's projection on the context")
    sub.add_argument(
        "--state-dict",
        type=_file(".safetensors"),
        metavar="FILE.safetensors",
        help="also write the generator's whole edited state dict",
    )

    sub = command("render", _render, "render pictures, before and after rewrites", generator=None)
    rewrite_arguments(sub, required=False)
    sub.add_argument(
        "--images", type=_numbers, default=list(range(16)), help="rows of the latents, e.g. 3,5,8 (default 0-15)"
    )
    sub.add_argument("--size", type=_positive, default=128, help="side of each picture in the grid (default 128)")
    sub.add_argument("--out", required=True, type=_file(".png"), metavar="FILE.png", help="picture to write")

    sub = command("eval", _eval, "measure what rewrites change on many pictures", generator=500)
    rewrite_arguments(sub, required=True)
    sub.add_argument("--rule", choices=tuple(RULES), help="score against the embedded generator's ground truth")

    sub = command("search", _search, "find the pictures that hold what an edit's selection shows", generator=1000)
    edit_arguments(sub)
    sub.add_argument(
        "--selection",
        choices=("query", "context", "copy", "paste"),
        default="context",
        help="which of the edit's selections to look for (default: the first of its context; of several pastes the first)",
    )
    sub.add_argument("--top", type=_positive, default=12, help="how many matches to show (default 12)")
    sub.add_argument("--size", type=_positive, default=128, help="side of each picture in the grid (default 128)")
    sub.add_argument("--out", required=True, type=_file(".png"), metavar="FILE.png", help="picture to write")

    sub = command("bench", _bench, "time the kernels against stock PyTorch")
    sub.add_argument(
        "names", nargs="*", metavar="SUITE", help="second-moment, solve, edit, collect or all (default all)"
    )
    sub.add_argument("--quick", action="store_true", help="a smoke test of the smallest cases")
    sub.add_argument(
        "--out", default="bench_out", metavar="DIR", help="for the numbers and pictures (default bench_out)"
    )

    command("info", _info, "say which backend each operation uses here, and why")
    return parser


# --- running ---------------------------------------------------------------------------------------------

# The library's advice names its arguments; on the command line they are options.
_OPTIONS = (
    (r"\bcollect_second_moment\(checkpoint=\.\.\.\)", "rewrite collect --resume"),
    (r"\brc\.(erase|zero)\b", r"--\1"),
    (r"\bregion='map'", "--whole-map"),
    (r"\bskip_nonfinite=True\b", "--skip-nonfinite"),
    (r"`until`", "--until"),
    (r"\bforce=True\b", "--force"),
    (r"\b(preserve|rank|solver)=['\"]?([\w.]+\w)['\"]?", r"--\1 \2"),
)


def _worded(message: object) -> str:
    """A message of the library, on one line, in the words of the command line."""
    text = " ".join(str(message).split())
    for python, option in _OPTIONS:
        text = re.sub(python, option, text)
    return text


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    tqdm.write(f"rewrite: warning: {_worded(message)}", file=sys.stderr)  # keeps clear of progress bars


def _problem(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"Out of memory; ask for fewer pictures at a time: {error}"
    return str(error) or type(error).__name__


def _how_to_go_on(options: argparse.Namespace) -> str:
    """What to do after an interrupt, for what takes long."""
    kept = [file for file in getattr(options, "resume", None) or [] if os.path.exists(file)]
    if kept:
        return f"; run the same command again to go on from {', '.join(kept)}"
    if getattr(options, "resume", None):
        return "; that was before the first checkpoint, so nothing was written"
    if "resume" in options:
        return "; nothing was written, but with --resume FILE it can go on where it was"
    if getattr(options, "moment", "") is None:
        return "; rewrite collect --resume FILE collects the moment in several goes, for --moment"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Bad input ends with one sentence on stderr and exit status 2; an interrupt with 130."""
    options = build_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _check_files(options)
            return options.run(options) or 0
        except BrokenPipeError:  # the reader (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt:
            print(f"rewrite {options.command}: interrupted{_how_to_go_on(options)}.", file=sys.stderr)
            return 130
        except (RewriteCoreError, OSError, BackendUnavailable, MemoryError, torch.OutOfMemoryError) as error:
            # anything else is a bug and shows its trace
            print(f"rewrite {options.command}: {_worded(_problem(error))}", file=sys.stderr)
            return 2
