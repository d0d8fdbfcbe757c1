"""Every example of README.md and docs/ runs, page by page, in order; links and the site's menu hold.

A page's blocks of Python share one namespace and an empty folder of their own. A block with a title
(``title="name.py"``) is written there as a file. In a block of console, each line after "$ rewrite" is a command, which
must succeed. A comment ``<!-- not run: why -->`` before a block leaves it out; ``<!-- setup ... -->`` holds Python that
readers need not see.
"""

import contextlib
import re
import shlex
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest

from rewrite_core.cli.entry import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->|"
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w+)(?P<more>[^\n]*)\n"
    r"(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def blocks(page):
    """(kind, code) of what is to be run: "python", "console" or the name of a file."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["setup"]:
            yield "python", found["setup"]
        elif title := re.search(r'title="([^"]+)"', found["more"]):
            yield title[1], found["code"]
        elif found["language"] in ("python", "console") and not found["reason"]:
            yield found["language"], found["code"]


def run_console(text):
    for line in text.replace("\\\n", " ").splitlines():
        command = re.fullmatch(r"\$ rewrite (.*)", line)
        if command:
            assert main([*shlex.split(command[1], comments=True), "--quiet"]) == 0, line
        else:
            assert not line.startswith("$"), f"say why this is not run: {line}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    matplotlib.use("agg")
    before = set(sys.modules)
    names = {"__name__": "example"}
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # of edits that mean nothing, on random weights
        for kind, code in blocks(page):
            if kind == "python":
                exec(compile(code, f"{page.name}", "exec"), names)
            elif kind == "console":
                run_console(code)
            else:
                (tmp_path / kind).write_text(code, encoding="utf-8")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_reader_of_pages(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '<!-- setup\na = 1\n-->\n```python title="m.py"\nb = 2\n```\n<!-- not run: no -->\n```python\nboom\n```\n'
        "```python\nc = 3\n```\n```console\n$ rewrite info\n```\n```text\nboom\n```\n"
    )
    assert list(blocks(page)) == [
        ("python", "a = 1\n"), ("m.py", "b = 2\n"), ("python", "c = 3\n"), ("console", "$ rewrite info\n")
    ]  # fmt: skip


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert str(page.relative_to(ROOT / "docs")) in menu


def test_links_of_files_that_are_not_on_the_site():
    """MkDocs checks the pages of docs/; these it does not see."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{name}: {target}"
