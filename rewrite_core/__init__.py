"""rewrite_core: change the rules inside a trained image generator by rewriting one layer's weights.

Each public name is imported when it is first used, so that neither ``import rewrite_core`` nor ``rewrite --help`` waits
for torch. The names, and the module that each lives in, are written in one place: ``__init__.pyi``.
"""

import ast
import importlib
from pathlib import Path
from typing import Any


def _homes() -> dict[str, str]:
    """{public name: the module that has it}, as __init__.pyi says: "." for a module of this package itself."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    lines = [line for line in stub.body if isinstance(line, ast.ImportFrom)]
    return {alias.name: f".{line.module or ''}" for line in lines for alias in line.names}


_HOMES = _homes()
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    value = importlib.import_module(f".{name}" if home == "." else home, __name__)
    if home != ".":
        value = getattr(value, name)
    globals()[name] = value  # the next time it is there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
