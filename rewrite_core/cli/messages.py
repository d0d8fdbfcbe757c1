"""What the command line says: one line for an error or a warning, in the words of the command line.

The library's messages name Python's arguments, as in "or pass force=True.", and their ``advice`` says which, as in
{"force": True}. Here each of them becomes the option that does the same.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import RewriteCoreError, argument, printable

MOST_CHARACTERS = 600  # of one message; longer ones keep their beginning and their end, where the advice is

OPTIONS = {
    "directions": "--directions {}",
    "energy": "--protect-energy {}",
    "force": "--force",
    "loss": "--loss {}",
    "objective": "--objective {}",
    "preserve": "--preserve {}",
    "rank": "--rank {}",
    "region": "--region {}",
    "skip_nonfinite": "--skip-nonfinite",
    "solver": "--solver {}",
    "trust": "--trust {}",
    "rc.erase": "--erase UNITS",
    "rc.zero": "--zero",
    "`preserve`": "--preserve",
    "`until`": "--until",
    "collect_second_moment(checkpoint=...)": "rewrite collect --resume FILE",
}
"""{an argument or a name of the library's advice: the option of the command line, with {} for its value}"""


def shown(text: object) -> str:
    """Any text on one line that is safe to show: no control characters, and not longer than a reader reads."""
    line = printable(" ".join(str(text).split()))
    if len(line) <= MOST_CHARACTERS:
        return line
    return f"{line[: MOST_CHARACTERS * 2 // 3]} [...] {line[-MOST_CHARACTERS // 3 :]}"


def in_options(text: object, advice: Mapping[str, Any]) -> str:
    """A message of the library, whose advice names arguments, in the words of the command line."""
    words = str(text)
    for name, value in advice.items():
        if name in OPTIONS:
            words = words.replace(argument(name, value), OPTIONS[name].format(value))
    return shown(words)


def brief(error: BaseException) -> str:
    """What a user's own code raised, in one line, and where."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(" .:")
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:  # a SyntaxError says itself where it is
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def problem(error: BaseException) -> str | None:
    """What the command line says of an error that ends it; None for a bug, which shows its trace."""
    if out_of_memory(error):
        detail = f" ({shown(error)})" if str(error) else ""
        return shown(f"Out of memory; ask for fewer pictures, or smaller batches{detail}.")
    if isinstance(error, OSError) and error.strerror:
        which = "a file" if error.filename is None else error.filename
        return shown(f"{which}: {error.strerror}.")
    if isinstance(error, RewriteCoreError | OSError):
        return in_options(str(error) or type(error).__name__, getattr(error, "advice", {}))
    if _in_a_generator(error):
        return shown(f"The generator fails, on other latents than the two it was tried on: {brief(error)}.")
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its GPU had too little memory."""
    torch = sys.modules.get("torch")  # else nothing of it was raised
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # of torch on a CPU


def _in_a_generator(error: BaseException) -> bool:
    """Whether the last thing that the library did was to call a module: then its code is the user's own."""
    frames = traceback.walk_tb(error.__traceback__)
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    ours = [i for i, name in enumerate(modules) if name.partition(".")[0] == "rewrite_core"]
    return bool(ours) and modules[ours[-1] + 1 : ours[-1] + 2] == ["torch.nn.modules.module"]


def say(text: str = "", to: TextIO | None = None) -> None:
    """Print lines that are safe to show, whatever names and files they quote."""
    stream = sys.stdout if to is None else to
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream)


def of_several() -> bool:
    """Whether torchrun has started this process as one of several: distributed.launched(), without importing torch."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def say_once(sentence: str) -> None:
    """Say why a command ends; of the processes of torchrun, which mostly end for one reason, only the first does."""
    if not of_several():
        say(sentence, to=sys.stderr)
        return
    from ..statistics.distributed import told_once

    with told_once() as first:
        if first:
            say(sentence, to=sys.stderr)
            sys.stderr.flush()


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In the place of ``warnings.showwarning``: one line, which keeps clear of progress bars."""
    from tqdm import tqdm

    tqdm.write(f"rewrite: warning: {in_options(message, getattr(message, 'advice', {}))}", file=sys.stderr)
