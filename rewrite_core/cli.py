"""The ``rewrite`` command line."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import pictures
from .backends import BackendUnavailable, explain
from .binding import bind, list_layers
from .directions import METHODS
from .editing import Edit, Selection
from .errors import RewriteCoreError
from .files import atomic_write, read_state_dict
from .latents import sample_latents
from .moments import SecondMoment, collect_second_moment
from .rewriting import erase, load_rewrite, rewrite, zero
from .search import search
from .solvers import LOSSES, SOLVERS
from .version import __version__

CHAPELS = "chapels"
_GENERATOR_HELP = """
generators:
  By default a command works on the embedded generator, "chapels". For your own, name a function that returns it:
    rewrite layers --generator my_module:make_generator --checkpoint weights.safetensors --latent-size 100
  `make_generator()` returns the torch module, and the checkpoint (a state dict: .pt, .pth, .safetensors or .npz, never
  unpickled beyond tensors) is loaded into it; or `make_generator(checkpoint)` takes the path itself, as
  rewrite_core:load_proggan and rewrite_core:load_stylegan2 do. The generator is called with latents [N, SIZE].
"""


class UsageError(RewriteCoreError):
    """A command line that cannot be carried out."""


# --- the generator and its latents -----------------------------------------------------------------------


def _import_function(spec: str) -> Callable:
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise UsageError(f"--generator takes {CHAPELS!r} or module:function, not {spec!r}.")
    sys.path.insert(0, os.getcwd())  # as python -m does: a script beside you is a module
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"There is no module {error.name!r} to import {spec!r} from; run from its folder.") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"Module {module_name!r} has no function {attribute!r}.")
    return function


def _takes_a_path(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters
    )


def _load_generator(options: argparse.Namespace) -> nn.Module:
    device = _device(options.device)
    if options.generator == CHAPELS:
        from .demo import chapels

        if options.checkpoint:
            raise UsageError("The embedded generator has its own weights; name yours with --generator module:function.")
        return chapels().to(device)
    function = _import_function(options.generator)
    if _takes_a_path(function):
        if not options.checkpoint:
            raise UsageError(f"{options.generator} takes a checkpoint; name it with --checkpoint.")
        generator = function(options.checkpoint)
    else:
        generator = function()
        if options.checkpoint and isinstance(generator, nn.Module):
            try:
                generator.load_state_dict(read_state_dict(options.checkpoint))
            except RuntimeError as error:
                lines = " ".join(str(error).split())
                raise UsageError(f"{options.checkpoint} does not fit {options.generator}: {lines[:300]}") from error
    if not isinstance(generator, nn.Module):
        raise UsageError(f"{options.generator} returned a {type(generator).__name__}, not a torch.nn.Module.")
    return generator.to(device).eval()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"Device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu.") from error
    return device


def _latents(options: argparse.Namespace, count: int, seed: int) -> Tensor:
    if count < 1:
        raise UsageError(f"At least one latent is needed, not {count}.")
    size = options.latent_size
    if size is None:
        if options.generator != CHAPELS:
            raise UsageError("Say how long your generator's latents are with --latent-size.")
        from .demo import LATENT_SIZE as size
    if options.latents == "uniform":
        rows = np.random.RandomState(seed).uniform(-1, 1, (count, size))
        return torch.from_numpy(rows).float()
    return sample_latents(size, count, seed=seed)


def _setup(options: argparse.Namespace, count: int) -> tuple[nn.Module, Tensor]:
    """The generator and `count` latents, tried out on one of them."""
    generator = _load_generator(options)
    latents = _latents(options, count, options.seed)
    try:
        images = _pictures(generator, latents[:1])
    except Exception as error:  # a user's own code raises anything
        raise UsageError(
            f"{options.generator} fails on latents {list(latents[:1].shape)} ({str(error).splitlines()[0]}); "
            "check --latent-size and --checkpoint."
        ) from error
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UsageError(f"{options.generator} makes outputs {list(images.shape)}, not images [N, 3, H, W].")
    return generator, latents


def _add_generator(parser: argparse.ArgumentParser, count: int | None = None) -> None:
    group = parser.add_argument_group("generator")
    group.add_argument("--generator", default=CHAPELS, metavar="MODULE:FUNCTION", help=f"default: {CHAPELS}")
    group.add_argument("--checkpoint", metavar="FILE", help="state dict to load into it")
    group.add_argument("--latent-size", type=int, metavar="SIZE")
    group.add_argument("--latents", choices=("normal", "uniform"), default="normal", help="uniform means -1..1")
    group.add_argument("--seed", type=int, default=1, help="of the latents that selections index (default 1)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    if count is not None:
        group.add_argument("--count", type=int, default=count, help=f"number of latents (default {count})")


def _numbers(text: str) -> list[int]:
    """"3,5,8-11" -> [3, 5, 8, 9, 10, 11]."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0-15 or 3,5,8") from None
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text!r} names no picture")
    return numbers


def _pictures(generator: nn.Module, latents: Tensor, batch_size: int = 16) -> Tensor:
    device = next(generator.parameters()).device
    with torch.inference_mode():
        return torch.cat([generator(batch.to(device)).float().cpu() for batch in latents.split(batch_size)])


# --- commands --------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> None:
    from .demo.run import run_demo, table

    report = run_demo(options.out, device=str(_device(options.device)), progress=not options.quiet)
    print(table(report))
    names = ", ".join(f"{name}.png" for name in report["edits"])
    print(f"\n{report['environment']['seconds_total']} s in all. Look at {names} in {options.out}.")


def _layers(options: argparse.Namespace) -> None:
    infos = list_layers(*_setup(options, 1))
    if options.json:
        print(json.dumps([vars(info) for info in infos], indent=2))
        return
    head = ("layer", "family", "channels", "kernel", "key map", "value map", "lm solver")
    rows = [head]
    for info in infos:
        key, value = ("x".join(map(str, size)) for size in (info.key_size, info.value_size))
        kernel = "x".join(map(str, info.kernel_size))
        channels = f"{info.in_channels} -> {info.out_channels}"
        rows.append((info.name, info.family, channels, kernel, key, value, info.solver))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _collect(options: argparse.Namespace) -> None:
    generator, latents = _setup(options, options.count)
    layer = bind(generator, options.layer)
    moment = collect_second_moment(
        layer, latents, options.batch_size, checkpoint=options.resume, progress=not options.quiet,
        latent_seed=options.seed,
    )  # fmt: skip
    moment.save(options.out)
    print(f"{moment.count} keys of {moment.channels} channels at {layer.name} -> {options.out}")


def _moment_for(options: argparse.Namespace, layer, latents: Tensor) -> SecondMoment:
    if options.moment:
        return SecondMoment.load(options.moment, layer)
    return collect_second_moment(layer, latents, progress=not options.quiet, latent_seed=options.seed)


def _edit(options: argparse.Namespace) -> None:
    edit = Edit.load(options.edit)
    generator, latents = _setup(options, options.count)
    layer = bind(generator, options.layer)
    moment = _moment_for(options, layer, latents)
    if options.zero:
        change = zero(layer, moment, edit, latents, rank=options.rank, method=options.method)
    else:
        shared = {
            "rank": options.rank, "solver": options.solver, "loss": options.loss, "method": options.method,
            "preserve": options.preserve, "steps": options.steps, "progress": not options.quiet,
        }  # fmt: skip
        if options.erase is not None:
            change = erase(layer, moment, edit, latents, units=options.erase, tight=options.tight, **shared)
        else:
            change = rewrite(layer, moment, edit, latents, tight=not options.whole_map, alpha=not options.box, **shared)
    change.save(options.out)
    took = ", ".join(f"{stage} {seconds * 1e3:.0f} ms" for stage, seconds in change.seconds.items())
    print(f"{change!r} -> {options.out}\n{took}")
    if options.state_dict:
        from safetensors.torch import save_file

        with change:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.generator.state_dict().items()}
            with atomic_write(options.state_dict) as partial:
                save_file(state, partial)
        print(f"edited state dict -> {options.state_dict}")


def _apply_all(options: argparse.Namespace, generator: nn.Module) -> None:
    for path in options.rewrite:
        load_rewrite(path).apply(generator, force=options.force)


def _render(options: argparse.Namespace) -> None:
    generator, latents = _setup(options, max(options.images) + 1)
    latents = latents[options.images]
    before = _pictures(generator, latents)
    labels = [str(index) for index in options.images]
    if options.rewrite:
        _apply_all(options, generator)
        rows = pictures.before_after(before, _pictures(generator, latents), options.size, labels, columns=6)
        title = "before | after " + ", ".join(Path(path).name for path in options.rewrite)
    else:
        cells = [(pictures.to_image(picture, options.size), label) for picture, label in zip(before, labels)]
        rows, title = [cells[i : i + 8] for i in range(0, len(cells), 8)], f"pictures of seed {options.seed}"
    pictures.save_png(pictures.grid(rows, title), options.out)
    print(f"{len(latents)} pictures -> {options.out}")


def _eval(options: argparse.Namespace) -> None:
    generator, latents = _setup(options, options.count)
    before = _pictures(generator, latents)
    _apply_all(options, generator)
    after = _pictures(generator, latents)
    change = (after - before).abs().mean((1, 2, 3)) / 2  # on the 0..1 scale
    report = {
        "pictures": len(latents),
        "seed": options.seed,
        "mean_change": change.mean().item(),
        "median_change": change.median().item(),
        "largest_change": change.max().item(),
        "most_changed": change.argsort(descending=True)[:8].tolist(),
    }
    if options.rule:
        from .demo.rules import RULES, score

        if options.generator != CHAPELS:
            raise UsageError("--rule is measured against the world of the embedded generator only.")
        report |= {"rule": options.rule, **vars(score(RULES[options.rule], before / 2 + 0.5, after / 2 + 0.5, latents))}
    print(json.dumps(report, indent=2))


def _search(options: argparse.Namespace) -> None:
    edit = Edit.load(options.edit)
    selection: Selection | None = getattr(edit, options.selection)
    if options.selection == "context":
        selection = edit.keys[0]
    if selection is None:
        raise UsageError(f"The edit has no {options.selection} selection; choose another with --selection.")
    generator, latents = _setup(options, options.count)
    layer = bind(generator, options.layer)
    moment = _moment_for(options, layer, latents)
    found = search(layer, moment, selection, latents, options.top, progress=not options.quiet)
    images = _pictures(generator, latents[found.indices])
    query = _pictures(generator, latents[selection.index][None])[0]
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
    try:
        from .benchmarks.runner import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("rewrite_core.benchmarks", "pytest", "pytest_benchmark"):
            raise
        raise UsageError(f"{error.name} is not installed; run pip install 'rewrite_core[test]' to benchmark.") from error
    return run(options.names, Path(options.out), options.quick)


def _info(options: argparse.Namespace) -> None:
    _device(options.device)
    print(f"rewrite_core {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(explain())


# --- the parser ------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of ``rewrite``."""
    parser = argparse.ArgumentParser(
        prog="rewrite", description="Change the rules inside a trained image generator by rewriting its weights."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, generator: int | None | bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=_GENERATOR_HELP if generator is not False else None,
        )  # fmt: skip
        sub.set_defaults(run=run)
        if generator is not False:
            _add_generator(sub, generator)
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    sub = command("demo", _demo, "change three rules of the embedded generator and measure the result")
    sub.add_argument("--out", default="demo_out", metavar="DIR", help="for the pictures and report.json (default demo_out)")
    sub.add_argument("--device", default="cpu")

    sub = command("layers", _layers, "list every layer that can be rewritten", generator=None)
    sub.add_argument("--json", action="store_true")

    sub = command("collect", _collect, "collect a layer's second moment", generator=1000)
    sub.add_argument("--layer", required=True)
    sub.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    sub.add_argument("--batch-size", type=_positive, default=16)
    sub.add_argument("--resume", metavar="FILE", help="keep a checkpoint here and resume from it")

    sub = command("edit", _edit, "solve an edit and save the rewrite", generator=1000)
    sub.add_argument("edit", metavar="EDIT.json", help="copy, paste and context, in the reference implementation's JSON")
    sub.add_argument("--layer", required=True)
    sub.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    sub.add_argument("--moment", metavar="FILE", help="from rewrite collect; collected afresh where not given")
    sub.add_argument("--rank", type=int, default=1)
    sub.add_argument("--solver", choices=SOLVERS, default="lm")
    sub.add_argument("--loss", choices=LOSSES, default="l1")
    sub.add_argument("--method", choices=METHODS, default="whitened", help="how the directions are found")
    sub.add_argument("--preserve", type=float, default=0.0, help="weight of leaving ordinary pictures alone")
    sub.add_argument("--steps", type=_positive, default=2001, help="of the stepwise solvers")
    sub.add_argument("--whole-map", action="store_true", help="fit the whole map, not the pasted box")
    sub.add_argument("--box", action="store_true", help="paste the copy's bounding box, not its mask")
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument("--erase", type=_positive, metavar="UNITS", help="erase: silence so many units in the paste")
    kind.add_argument("--zero", action="store_true", help="remove the weight's projection on the context")
    sub.add_argument("--tight", action="store_true", help="with --erase: fit the pasted box only")
    sub.add_argument("--state-dict", metavar="FILE", help="also write the generator's whole edited state dict")

    sub = command("render", _render, "render pictures, before and after rewrites", generator=None)
    sub.add_argument("--rewrite", action="append", default=[], metavar="FILE", help="repeat to stack several")
    sub.add_argument("--images", type=_numbers, default=list(range(16)), help="rows of the latents, e.g. 0-15 or 3,5,8")
    sub.add_argument("--size", type=_positive, default=128, help="side of each picture in the grid")
    sub.add_argument("--force", action="store_true", help="apply to weights the rewrite was not fitted to")
    sub.add_argument("--out", required=True, metavar="FILE.png")

    sub = command("eval", _eval, "measure what rewrites change on many pictures", generator=500)
    sub.add_argument("--rewrite", action="append", required=True, metavar="FILE")
    sub.add_argument("--rule", choices=("spire", "watermark", "reflection"), help="score against the chapels' ground truth")
    sub.add_argument("--force", action="store_true", help="apply to weights the rewrite was not fitted to")

    sub = command("search", _search, "find the pictures that hold what an edit's selection shows", generator=1000)
    sub.add_argument("edit", metavar="EDIT.json")
    sub.add_argument("--layer", required=True)
    sub.add_argument("--selection", choices=("query", "context", "copy", "paste"), default="context")
    sub.add_argument("--moment", metavar="FILE")
    sub.add_argument("--top", type=_positive, default=12)
    sub.add_argument("--size", type=_positive, default=128)
    sub.add_argument("--out", required=True, metavar="FILE.png")

    sub = command("bench", _bench, "time the kernels against stock PyTorch")
    sub.add_argument("names", nargs="*", default=["all"], choices=["all", "second-moment", "spd-solve", "fit-low-rank"])
    sub.add_argument("--quick", action="store_true", help="a smoke test of the smallest cases")
    sub.add_argument("--out", default="bench_out", metavar="DIR")
    sub.add_argument("--device", default="cpu")

    sub = command("info", _info, "say which backend each operation uses here, and why")
    sub.add_argument("--device", default="cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Bad input ends with one sentence on stderr and exit status 2; an interrupt with 130."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("rewrite: interrupted", file=sys.stderr)
        return 130
    except (RewriteCoreError, OSError, BackendUnavailable) as error:  # anything else is a bug and shows its trace
        message = str(error).strip() or type(error).__name__
        print(f"rewrite {options.command}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
