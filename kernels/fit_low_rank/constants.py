"""The constants of the algorithm, wrapped: Triton's functions read nothing else from outside."""

from __future__ import annotations

import triton.language as tl

from ...ops.fit_low_rank_op import problem as _problem

CONVERGED = tl.constexpr(_problem.CONVERGED)
MAX_ITERATIONS = tl.constexpr(_problem.MAX_ITERATIONS)
ZERO_RESIDUAL = tl.constexpr(_problem.ZERO_RESIDUAL)
DEGENERATE = tl.constexpr(_problem.DEGENERATE)
NONFINITE = tl.constexpr(_problem.NONFINITE)
SHIFTED = tl.constexpr(_problem.SHIFTED)
BOUNDED = tl.constexpr(_problem.BOUNDED)

DAMPING_START = tl.constexpr(_problem.DAMPING_START)
DAMPING_MIN = tl.constexpr(_problem.DAMPING_MIN)
DAMPING_STALL = tl.constexpr(_problem.DAMPING_STALL)
DAMPING_UP = tl.constexpr(_problem.DAMPING_UP)
DAMPING_DOWN = tl.constexpr(_problem.DAMPING_DOWN)
GOOD = tl.constexpr(_problem.GOOD)
POOR = tl.constexpr(_problem.POOR)
SMOOTHING_SLOW = tl.constexpr(_problem.SMOOTHING_SLOW)
SMOOTHING_END = tl.constexpr(_problem.SMOOTHING_END)
SMOOTHING_RATE = tl.constexpr(_problem.SMOOTHING_RATE)
KINK = tl.constexpr(_problem.KINK)
REACH = tl.constexpr(_problem.REACH)
REACHED = tl.constexpr(_problem.REACHED)
NEGLIGIBLE = tl.constexpr(_problem.NEGLIGIBLE)
STATIONARY = tl.constexpr(_problem.STATIONARY)
EXACT = tl.constexpr(_problem.EXACT)
PIVOT = tl.constexpr(_problem.PIVOT)
SHIFTS = tl.constexpr(_problem.SHIFTS)
REFINEMENTS = tl.constexpr(_problem.REFINEMENTS)
