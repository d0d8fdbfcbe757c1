"""Mixes of command lines, most of them wrong: each must end in one sentence and a status, never in a traceback.

``python tests/helpers/fuzz_command_line.py --mixes 2000 --seed 3`` runs so many in a folder of its own and prints what
went wrong; tests/faults/test_tracebacks.py runs a few. A process of its own, for its memory is limited.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

import rewrite_core as rc
from rewrite_core.cli.entry import COMMANDS, main, parser
from rewrite_core.cli.settings import SETTINGS
from rewrite_core.demo import chapels, load_edit

MINE = ["--generator", "mine:make", "--checkpoint", "weights.pt", "--latent-size", "6"]
ON_THE_LAYER = ["--layer", "3", "--count", "8"]
GOOD = (
    ["init", *MINE, "--force"],
    ["layers", *MINE],
    ["layers", "--json"],
    ["collect", *MINE, *ON_THE_LAYER, "--out", "new.safetensors"],
    ["search", "e.json", *MINE, *ON_THE_LAYER, "--out", "new.png", "--moment", "m.safetensors"],
    ["edit", "e.json", *MINE, *ON_THE_LAYER, "--out", "new.safetensors", "--moment", "m.safetensors"],
    ["edit", "e.json", *MINE, *ON_THE_LAYER, "--out", "new.safetensors", "--solver", "projected", "--steps", "3"],
    [
        "edit",
        "e.json",
        *MINE,
        *ON_THE_LAYER,
        "--out",
        "new.safetensors",
        "--objective",
        "pictures",
        "--iterations",
        "3",
    ],
    ["render", *MINE, "--rewrite", "r.safetensors", "--images", "0-3", "--out", "new.png"],
    ["render", "--rewrite", "chapels.safetensors", "--images", "0-3", "--out", "new.png"],
    ["measure", *MINE, "--rewrite", "r.safetensors", "--count", "8"],
    ["measure", "--rewrite", "chapels.safetensors", "--rule", "spire", "--count", "8", "--seed", "2"],
    ["scan", "e.json", *MINE, "--count", "8", "--ranks", "1", "--out", "new.png"],
    ["make-edit", "--copy", "0:1,1,5,5", "--paste", "1:1,1,5,5", "--out", "new.json", *MINE, "--count", "8"],
    ["export", "r.safetensors", *MINE, "--format", "state-dict", "--out", "new.safetensors"],
    ["merge", "m.safetensors", "m2.safetensors", "--out", "new.safetensors"],
    ["collect", *MINE, *ON_THE_LAYER, "--out", "new.safetensors", "--shard", "1/2"],
    ["batch", "jobs.jsonl", *MINE, "--layer", "3", "--count", "8", "--out", "folder"],
    ["info"],
)
"""What works. Not demo, bench and compare, which take minutes, nor studio, which does not end."""

NUMBERS = (
    *("0", "1", "2", "3", "7", "16", "-1", "-0", "1000000", "100000000", "9999999999", "2147483647", "2147483648"),
    *("4294967295", "9223372036854775807", "1" + 30 * "0", "1" + 5000 * "0", "1.5", "1e3", "1e-300", "1e400", "nan"),
    *("inf", "-inf", "", " ", "x", "0x10", "\u0663", "1_000", "True", "None"),
)
FILES = (
    *("e.json", "bad.json", "deep.json", "m.safetensors", "r.safetensors", "cut.safetensors", "weights.pt", "mine.py"),
    *(
        "jobs.jsonl",
        "bad.jsonl",
        "none",
        "none/none",
        ".",
        "..",
        "folder",
        "/",
        "",
        " ",
        "/dev/null",
        "/dev/full",
        "/proc/self/mem",
        "pipe",
    ),
    *("n" * 300, "a\nb.safetensors", "\x1b[31mred.png", "\udc80.safetensors", "new.png", "new.safetensors", "new.pt"),
    *(
        "jobs.jsonl",
        "bad.jsonl",
        "loop",
        "unreadable.json",
        "~",
        "-",
        "--",
        "new.PNG",
        "rewrite.toml",
        "x" * 4000,
        "e.json/x",
        "spire",
        "a\0b",
    ),
)
DEVICES = (
    *("cpu", "cuda", "cuda:0", "cuda:99", "cuda:-1", "cuda:", "hpu", "xpu", "mps", "meta", "vulkan", "cpu:7", "cpu:-1"),
    *("", "privateuseone", "ipu", "mkldnn", "fpga", "gpu", "CPU", "cpu:" + 30 * "9", "lazy", "xla:0", "mtia", "maia:2"),
)
LAYERS = ("3", "1", "5", "0", "2", "", "33", "3.weight", "3.", ".", "layer", "\x1b[1m", "é" * 500, "__class__", "-3")
GENERATORS = (
    *("chapels", "mine", "mine:make", "mine:", ":make", "mine:make_maps", "mine:make_half", "mine:make_unit", ""),
    *("mine:one_at_a_time", "mine:pair", "mine:not_a_module", "mine:empty", "mine:raises", "mine:quits", "mine:two"),
    *("mine:keyword", "mine:fussy", "mine:lines", "mine:make:make", "os:getcwd", "torch.nn:Linear", "torch.nn:ReLU"),
    *("sys:exit", "builtins:print", "nowhere:x", "mine.py:make", "./mine:make", "..:x", "mine.:x", "a b:c", "\0:x"),
    *("mine:__name__", "mine:nan", "mine:late", "mine:interrupts", "mine:deep", "rewrite_core:load_proggan", "é:é"),
)
WORDS = (
    *("lm", "projected", "adam", "unconstrained", "normal", "uniform", "box", "map", "mask", "l1", "l2", "whitened"),
    *("svd", "mean", "units", "copy", "paste", "query", "context", "spire", "watermark", "0-3", "3,5", "5-3", "0,1"),
    *(
        "state-dict",
        "peft",
        "diffusers",
        "onnx",
        "-1,1",
        "1,0",
        "0-99999999",
        "6x1x1",
        "6x",
        "0x6",
        "99999x99999x99999",
        "1x" * 60 + "1",
        "all",
        "solve",
    ),
)
KINDS = {
    "generator": GENERATORS,
    "layer": LAYERS,
    "device": DEVICES,
    "shard": ("1/2", "2/2", "0/2", "3/2", "1/0", "-1/2", "1/9999999999", "1", "/", "", "1/2/3", "a/b", "1 / 2", "9/9"),
    "format": ("state-dict", "peft", "diffusers", "onnx", "pt"),
    **dict.fromkeys(("checkpoint", "moment", "rule", "rewrite", "resume", "out", "state_dict", "edit", "jobs"), FILES),
    **dict.fromkeys(("seed", "count", "rank", "steps", "batch_size", "size", "top", "erase", "until", "lr"), NUMBERS),
    **dict.fromkeys(("preserve", "project_every", "strength", "together"), NUMBERS),
}
SECONDS = 300  # that one command may take


def options_of(command: str) -> list[argparse.Action]:
    [commands] = [action.choices for action in parser()._actions if action.metavar == "COMMAND"]
    return [action for action in commands[command]._actions if action.option_strings and action.dest != "help"]


def value(draw: random.Random, dest: str) -> str:
    pool = KINDS.get(dest, WORDS)
    if draw.random() < 0.15:
        pool = draw.choice((NUMBERS, FILES, DEVICES, LAYERS, GENERATORS, WORDS))
    return draw.choice(pool)


def mix(draw: random.Random) -> list[str]:
    """One command line: what works, with some options replaced, added or left out."""
    command, *words = draw.choice(GOOD)
    known = options_of(command)
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 5))):
        kind = draw.random()
        if kind < 0.15 and words:
            del words[draw.randrange(len(words))]
        elif kind < 0.3 and words:
            words[draw.randrange(len(words))] = value(draw, draw.choice(list(KINDS)))
        else:
            action = draw.choice(known)
            words.append(draw.choice(action.option_strings))
            if action.nargs != 0 and draw.random() < 0.97:
                words.append(value(draw, action.dest))
    if draw.random() < 0.02:
        command = draw.choice(("", "fly", "edi", "\x1b[1m", "-", "--help", "--version"))
    return [command, *words]


def mixed_settings(draw: random.Random) -> bytes:
    """A rewrite.toml: some settings, some of them wrong."""
    lines = []
    for key in draw.sample([*SETTINGS, "sed", ""], draw.choice((1, 1, 2, 4))):
        text = value(draw, key.replace("-", "_"))
        quoted = '"' + "".join(f"\\U{ord(each):08x}" for each in text) + '"'
        lines.append(f"{key} = {draw.choice((quoted, quoted, text, f'[{text}]', f'[{quoted}]', 'true', '{}'))}")
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def long_for_a_reason(arguments: list[str]) -> bool:
    """Whether so much is asked for that it may take longer than is waited for."""
    numbers = (word.replace("_", "") for word in arguments if len(word) < 40)
    return any(word.isdecimal() and int(word) >= 1000 for word in numbers)


def make_folder(folder: Path) -> None:
    """What the command lines name, good and bad."""
    os.chdir(folder)
    shutil.copy(Path(__file__).with_name("mine.py"), folder)
    sys.path.insert(0, str(folder))
    import mine

    generator = mine.make()
    torch.save(generator.state_dict(), "weights.pt")
    mask = np.zeros((8, 8))
    mask[1:5, 1:5] = 1
    edit = rc.Edit(copy=rc.Selection(0, mask), paste=rc.Selection(1, mask), context=[rc.Selection(2, mask)])
    edit.save("e.json")
    layer, latents = rc.bind(generator, "3"), rc.sample_latents(6, 8)
    moment = rc.collect_second_moment(layer, latents, progress=False)
    moment.save("m.safetensors")
    rc.collect_second_moment(layer, rc.sample_latents(6, 8, seed=2), progress=False).save("m2.safetensors")
    rc.rewrite(layer, moment, edit, latents).save("r.safetensors")
    chapel = rc.bind(chapels(), "synthesis.layer4.conv")
    z = rc.sample_latents(16, 400)
    moment = rc.collect_second_moment(chapel, z, progress=False)
    rc.rewrite(chapel, moment, load_edit("spire"), z, region="map", loss="l2").save("chapels.safetensors")
    Path("cut.safetensors").write_bytes(Path("r.safetensors").read_bytes()[:-9])
    Path("bad.json").write_text("{")
    Path("jobs.jsonl").write_text(
        '{"edit": "e.json", "rank": [1, 2], "region": "map"}\n{"edit": "e.json", "erase": 2}\n'
    )
    Path("bad.jsonl").write_text('{"edit": "e.json", "rank": [1, 2]}\n{"edit": 1e999, "layer": NaN}\n')
    Path("deep.json").write_text("[" * 100_000)
    Path("unreadable.json").touch(0)
    Path("folder").mkdir()
    os.symlink("loop", "loop")


class TooLong(BaseException):
    """A command did not end; no `except Exception` answers it."""


def _too_long(number: int, frame: object) -> None:
    raise TooLong(f"no end in {SECONDS} s")


def trouble(arguments: list[str]) -> str | None:
    """What is wrong with how this command line ends; None where nothing is."""
    out, err = io.StringIO(), io.StringIO()
    raised = ""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    except BaseException:
        status, raised = None, traceback.format_exc()
    finally:
        signal.alarm(0)
    said = err.getvalue()
    errors = [line for line in said.splitlines() if not line.startswith("rewrite: warning: ")]
    if raised:
        return raised
    if status == 0:
        return f"status 0, and on stderr {said!r}" if errors else None
    if len(errors) != 1 or not errors[0].startswith("rewrite") or errors[0][-1:] not in (".", "?"):
        return f"status {status}, and on stderr {said!r}"
    if any(len(line) > 800 or not line.isprintable() for line in said.splitlines()):
        return f"not fit to be shown: {said!r}"
    return None if status == 2 else f"status {status}: {said!r}"


def run(mixes: int, seed: int) -> int:
    """The number of mixes that ended badly; prints each."""
    draw, bad = random.Random(seed), 0
    good = {"new.png", "new.safetensors"}
    before = set(os.listdir())
    for number in range(mixes):
        arguments, start = mix(draw), time.monotonic()
        file = mixed_settings(draw) if draw.random() < 0.2 else None
        if file is not None:
            Path("rewrite.toml").write_bytes(file)
        wrong = trouble(arguments)
        if wrong is not None and "TooLong" in wrong and long_for_a_reason(arguments):
            wrong = None
        half = [name for name in os.listdir() if name.endswith(".partial")]
        if wrong is None and half:
            wrong = f"left {half}"
        if wrong is not None:
            bad += 1
            print(f"--- {number}: {arguments!r:.600}\n{file!r:.600}\n{wrong[-1500:]}", flush=True)
        elif time.monotonic() - start > 20 and not long_for_a_reason(arguments):
            print(f"--- {number}: {arguments!r:.600} took {time.monotonic() - start:.0f} s", flush=True)
        for name in set(os.listdir()) - before - good:
            with contextlib.suppress(OSError):
                os.unlink(name)
        sys.modules.pop("mine", None)
    return bad


def limit_memory(gigabytes: int) -> None:
    """Above what is mapped now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (gigabytes << 30),) * 2)


def begin() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--mixes", type=int, default=200)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--gigabytes", type=int, default=3, help="of memory")
    options = words.parse_args()
    assert {command.name for command in COMMANDS} == {words[0] for words in GOOD} | {
        "demo",
        "bench",
        "compare",
        "studio",
    }
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        limit_memory(options.gigabytes)
        bad = run(options.mixes, options.seed)
        os.chdir("/")
    print(f"{options.mixes - bad} of {options.mixes} end as they should")
    sys.exit(bad > 0)


if __name__ == "__main__":
    begin()
