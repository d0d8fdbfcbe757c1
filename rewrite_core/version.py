"""The version, as installed (pyproject.toml is the only place that states it)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rewrite_core")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0+source"
