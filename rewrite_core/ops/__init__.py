"""Low-level operations, a folder each: problem and checks, plain-PyTorch reference, registration and backends."""

from ..errors import DiagonalShiftWarning
from .fit_low_rank_op.problem import FitResult
from .fit_low_rank_op.register import fit_low_rank
from .fit_projected_op.problem import ProjectedResult
from .fit_projected_op.register import fit_projected
from .second_moment_op.register import second_moment
from .spd_solve_op.factor import SPDFactor, spd_factor
from .spd_solve_op.register import spd_solve

__all__ = [
    "DiagonalShiftWarning",
    "FitResult",
    "ProjectedResult",
    "SPDFactor",
    "fit_low_rank",
    "fit_projected",
    "second_moment",
    "spd_factor",
    "spd_solve",
]
