"""Imports of the package run one way, and in no circle; ``ROOMS`` is the one place where their order is written.

Read from the sources, so imports inside functions and under TYPE_CHECKING count too. What is not an import statement is
not seen: the strings "module:function" of the backends of an op (``backends.py``), and the public names, which
``__init__.py`` imports when they are first used (``__init__.pyi``, which is read here in its place).
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rewrite_core"

# A room imports from its own line and from the lines above it.
ROOMS = (
    ("clock", "errors", "files", "progress", "version", "waits"),
    ("backends", "kernels", "ops"),
    ("modes", "turns"),
    ("adapters", "generators"),
    ("layers",),
    ("statistics",),
    ("edits",),
    ("solvers",),
    ("rewrites",),
    ("pictures",),
    ("evaluation", "exchange", "session"),
    ("demo", "studio"),
    ("__init__",),  # the public names
    ("benchmarks",),  # uses them as anyone does
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def sources() -> dict[str, Path]:
    """{"edits.goals": file}; a folder's own file has the folder's name, the package's own is "__init__"."""
    found = {}
    for folder in (PACKAGE, *(inner for inner in PACKAGE.iterdir() if inner.is_dir())):  # kernels/ is a link
        for path in folder.glob("*.py") if folder == PACKAGE else folder.rglob("*.py"):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    found["__init__"] = PACKAGE / "__init__.pyi"
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that the source of `name` imports, wherever in it."""
    package = ("rewrite_core", *(() if name == "__init__" else name.split(".")))
    if path.stem != "__init__":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            paths = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for top, *rest in paths:
            if top == "rewrite_core":
                while rest and ".".join(rest) not in known:  # the last is a name of the module before it
                    rest.pop()
                found.add(".".join(rest) or "__init__")
    return found


def graph() -> dict[str, set[str]]:
    modules = sources()
    return {name: imports(name, path, set(modules)) - {name} for name, path in modules.items()}


def test_every_room_has_its_place():
    assert sorted({name.partition(".")[0] for name in sources()} - set(LEVEL)) == []


def test_imports_run_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in sorted(others)
        if LEVEL[other.partition(".")[0]] > LEVEL[name.partition(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_in_a_circle():
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_graph_is_what_the_sources_say(tmp_path):
    """The reader itself, on a source that has every kind of import."""
    source = tmp_path / "reader.py"
    source.write_text(
        "import torch, rewrite_core.files\n"
        "from .selection import Selection\n"
        "from ..errors import MaskError\n"
        "if TYPE_CHECKING:\n    from ..layers.binding import BoundLayer\n"
        "def f():\n    from .. import backends, ops\n    from rewrite_core.ops import second_moment\n"
    )
    found = imports("edits.reader", source, set(sources()))
    assert found >= {"files", "edits.selection", "errors", "layers.binding", "backends", "ops"}, found
    assert imports("edits", PACKAGE / "edits" / "__init__.py", set(sources())) <= set(sources())


def test_importing_warns_of_nothing():
    subprocess.run([sys.executable, "-W", "error", "-c", "import rewrite_core"], check=True)
    names = "import rewrite_core as rc; [getattr(rc, name) for name in rc.__all__]"
    subprocess.run([sys.executable, "-W", "error", "-c", names], check=True)
