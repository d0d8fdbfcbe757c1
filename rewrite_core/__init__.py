"""rewrite_core: change the rules inside a trained image generator by rewriting one layer's weights."""

from . import ops
from .backends import BackendUnavailable, explain
from .binding import BoundLayer, LayerInfo, bind, list_layers
from .change import Rewrite, load_rewrite
from .directions import UnitQuantiles, collect_unit_quantiles, context_directions, context_keys, query_key
from .editing import Edit, Selection
from .errors import (
    FileFormatError,
    MaskError,
    MismatchError,
    NonFiniteError,
    RankError,
    RewriteCoreError,
    SelectionError,
    SolverError,
    UnderdeterminedWarning,
    UnknownLayerError,
)
from .families import load_proggan, load_stylegan2
from .latents import sample_latents
from .loading import load_generator
from .moments import SecondMoment, collect_second_moment
from .parametrization import LowRankChange
from .rewriting import erase, insert, rewrite, rewrite_many, zero
from .search import SearchResult, search
from .version import __version__

__all__ = [
    "BackendUnavailable",
    "BoundLayer",
    "Edit",
    "FileFormatError",
    "LayerInfo",
    "LowRankChange",
    "MaskError",
    "MismatchError",
    "NonFiniteError",
    "RankError",
    "Rewrite",
    "RewriteCoreError",
    "SearchResult",
    "SecondMoment",
    "Selection",
    "SelectionError",
    "SolverError",
    "UnderdeterminedWarning",
    "UnitQuantiles",
    "UnknownLayerError",
    "__version__",
    "bind",
    "collect_second_moment",
    "collect_unit_quantiles",
    "context_directions",
    "context_keys",
    "erase",
    "explain",
    "insert",
    "list_layers",
    "load_generator",
    "load_proggan",
    "load_rewrite",
    "load_stylegan2",
    "ops",
    "query_key",
    "rewrite",
    "rewrite_many",
    "sample_latents",
    "search",
    "zero",
]
