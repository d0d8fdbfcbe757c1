"""rewrite_core: change the rules inside a trained image generator by rewriting one layer's weights."""

from .backends import explain
from .layers.binding import BoundLayer, LayerInfo, bind, list_layers
from .rewrites.change import Rewrite, load_rewrite
from .edits.directions import context_directions, context_keys, query_key
from .statistics.quantiles import UnitQuantiles, collect_unit_quantiles
from .edits.edit import Edit
from .edits.selection import Selection
from .errors import (
    ArgumentError,
    BackendUnavailable,
    DiagonalShiftWarning,
    FileFormatError,
    LatentsWarning,
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
from .generators.proggan import load_proggan
from .generators.stylegan2 import load_stylegan2
from .layers.latents import sample_latents
from .generators.loading import load_generator
from .statistics.moments import SecondMoment, collect_second_moment
from .rewrites.parametrization import LowRankChange
from .rewrites.rewriting import erase, insert, rewrite, rewrite_many, zero
from .edits.matches import SearchResult, search
from .version import __version__

__all__ = [
    "ArgumentError",
    "BackendUnavailable",
    "BoundLayer",
    "DiagonalShiftWarning",
    "Edit",
    "FileFormatError",
    "LatentsWarning",
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
