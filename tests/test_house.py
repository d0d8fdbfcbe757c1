"""Rules of the house that a reader would otherwise have to check: names, sizes, versions."""

import ast
import re
from pathlib import Path

import pytest

import rewrite_core as rc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for folder in ("rewrite_core", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)  # rewrite_core/kernels is kernels/
]
MOST_LINES, MOST_PARAMETERS = 80, 10
MOST_BYTES = 40 * 1024  # of a file of tests

# "file:function": why it may have more lines or parameters than the rest.
_LAUNCHED = "Triton launches with pointers and numbers one by one, and takes float64 ones by annotation"
EXCUSED = {
    "kernels/fit_low_rank/exact.py:exact_kernel": _LAUNCHED,
    "kernels/fit_low_rank/fit.py:fit_kernel": _LAUNCHED,
    "kernels/fit_low_rank/shared.py:scale_kernel": _LAUNCHED,
    "kernels/fit_projected/directions.py:lean_kernel": _LAUNCHED,
    "kernels/fit_projected/fit.py:compare_kernel": _LAUNCHED,
    "kernels/fit_projected/fit.py:update_kernel": _LAUNCHED,
    "kernels/fit_projected/steps.py:spread": "Triton's functions have no objects to keep arguments in",
    "kernels/second_moment.py:second_moment_kernel": _LAUNCHED,
    "rewrite_core/ops/fit_low_rank_op/register.py:fit_low_rank": "the operation's arguments are its problem",
    "rewrite_core/ops/fit_projected_op/register.py:fit_projected": "the operation's arguments are its problem",
    "rewrite_core/rewrites/calls.py:rewrite": "the public call: what a user may say about an edit, all by name",
    "rewrite_core/rewrites/calls.py:rewrite_many": "the arguments of rewrite",
    "rewrite_core/rewrites/calls.py:erase": "the arguments of rewrite",
    "rewrite_core/rewrites/calls.py:insert": "the arguments of rewrite",
    "rewrite_core/evaluation/scan.py:scan_layers": "the public call: what may be said of a scan, by name",
}


def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """{"Class.method": its node}"""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            name = f"{prefix}{child.name}" if named else prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[name] = child
            visit(child, f"{name}." if named else prefix)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def test_functions_are_short_and_take_little():
    large = {}
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        for name, node in functions(path).items():
            a = node.args
            taken = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES or len(taken) > MOST_PARAMETERS:
                large[f"{path.relative_to(ROOT)}:{name}"] = f"{lines} lines, {len(taken)} parameters"
    new = {name: size for name, size in large.items() if name not in EXCUSED}
    assert not new, f"split these, or excuse them with a reason: {new}"
    assert not EXCUSED.keys() - large.keys(), "these need no excuse any more"


def test_files_of_tests_are_of_a_size_to_read():
    large = {path.name: size for path in (ROOT / "tests").rglob("*.py") if (size := path.stat().st_size) > MOST_BYTES}
    assert not large


def test_no_module_has_the_name_of_what_it_exports():
    """Else ``from rewrite_core.ops import second_moment`` is a function or a module, as imports happened to go.

    ``cli/entry.py`` has a ``main``, and pytest finds the benchmark in ``bench_x.py`` by its name.
    """
    wrong = []
    for path in SOURCES:
        names = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom) and path.stem == "__init__" and node.module:
                names |= {alias.asname or alias.name for alias in node.names}
        beside = {inner.stem for inner in path.parent.iterdir() if inner.is_dir() or inner.suffix == ".py"}
        own = beside if path.stem == "__init__" else {path.stem}
        wrong += [
            f"{path.relative_to(ROOT)}: {name}"
            for name in sorted(names & own)
            if name != "main" and not name.startswith("bench_")
        ]
    assert not wrong, wrong


def test_public_names_are_in_the_reference():
    """Each name of rc is named in docs/reference, and nothing else is."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"^::: rewrite_core\.(\w+)$", pages, flags=re.MULTILINE)
    assert len(named) == len(set(named)), "some are there twice"
    assert set(named) == set(rc.__all__) - {"ops", "pictures", "__version__"}


def test_pinned_versions_agree():
    pinned = re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hooks = re.findall(r"\[([\w-]+)==([\w.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks and set(hooks) <= set(pinned)


@pytest.mark.parametrize("name", ["CITATION.cff", "CHANGELOG.md"])
def test_the_version_is_the_same_wherever_it_is_written(name):
    version = re.search(r'^version = "([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version[1] in (ROOT / name).read_text(encoding="utf-8")
