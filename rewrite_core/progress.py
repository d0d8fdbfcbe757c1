"""Progress bars: the only place that makes one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose output is no terminal but shows bars."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return hasattr(shell, "kernel")


def progress_bar(
    steps: Iterable | None = None,
    *,
    total: int | None = None,
    start: int = 0,
    label: str = "",
    unit: str = "it",
    show: bool = True,
) -> tqdm:
    """A tqdm bar over `steps`, or to be moved by ``bar.update(n)``.

    It is seen on a terminal and in Jupyter, and not where stderr goes to a file or a pipe; nowhere with ``show=False``.

    Args:
        steps: what to iterate over; None for a bar that is moved by hand.
        total: how many steps there are, where `steps` does not say.
        start: how many of them were done before.
        label: what is going on, a few words.
        unit: what one step is, such as "img".
    """
    hidden: bool | None = True
    if show:
        hidden = False if in_notebook() else None  # None: where stderr is no terminal
    make: type[tqdm] = importlib.import_module("tqdm" if hidden is not False else "tqdm.auto").tqdm  # a widget there
    return make(steps, total=total, initial=start, desc=label or None, unit=unit, disable=hidden)
