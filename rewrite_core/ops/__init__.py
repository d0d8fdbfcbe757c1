"""Low-level operations, one file each: a public function, its plain-PyTorch reference, its backends."""

from ..errors import DiagonalShiftWarning
from .fit_low_rank import FitResult, fit_low_rank
from .fit_projected import fit_projected
from .second_moment import second_moment
from .spd_solve import SPDFactor, spd_factor, spd_solve

__all__ = [
    "DiagonalShiftWarning",
    "FitResult",
    "SPDFactor",
    "fit_low_rank",
    "fit_projected",
    "second_moment",
    "spd_factor",
    "spd_solve",
]
