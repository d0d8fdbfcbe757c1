"""Bars: on a terminal and in Jupyter, not in logs, and none that progress.py does not make."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewrite_core
from rewrite_core.progress import progress_bar


def shown(monkeypatch, terminal, **how):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=4, start=1, label="dig", unit="hole", **how) as bar:
        bar.update(3)
    return stream.getvalue()


def test_on_a_terminal_and_not_in_logs(monkeypatch):
    assert re.search(r"dig: 100%.*4/4 .*hole/s", shown(monkeypatch, True))
    assert shown(monkeypatch, False) == ""
    assert shown(monkeypatch, True, show=False) == ""
    assert list(progress_bar(range(3))) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:IProgress not found")
def test_in_jupyter(monkeypatch):
    """Whose stderr is no terminal. (Without ipywidgets the bar is text there.)"""
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    assert re.search(r"dig: 100%.*4/4", shown(monkeypatch, False))
    assert shown(monkeypatch, False, show=False) == ""
    kernel.get_ipython = lambda: object()  # IPython in a terminal, its output in a pipe
    assert shown(monkeypatch, False) == ""


def test_every_bar_is_made_in_one_place():
    """Elsewhere tqdm is imported for types, or to write beside bars."""
    package = Path(rewrite_core.__file__).parent
    others = set()
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(r"\btqdm\((?!\.write)", text) or "trange(" in text or "tqdm.auto" in text:
            others.add(path.name)
    assert others == {"progress.py"}
