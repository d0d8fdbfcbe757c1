// The algorithm's constants, named and explained in rewrite_core/ops/fit_low_rank_op/problem.py: a test compares each
// with that.
#pragma once

#define REWRITE_CORE_FIT_LOW_RANK_CONSTANTS(X) \
  X(double, DAMPING_START, 1e-2)               \
  X(double, DAMPING_MIN, 1e-6)                 \
  X(double, DAMPING_STALL, 1e6)                \
  X(double, DAMPING_UP, 8.0)                   \
  X(double, DAMPING_DOWN, 0.3)                 \
  X(double, GOOD, 0.75)                        \
  X(double, POOR, 0.1)                         \
  X(double, SMOOTHING_SLOW, 3e-2)              \
  X(double, SMOOTHING_END, 1e-5)               \
  X(double, SMOOTHING_RATE, 0.5)               \
  X(double, SMOOTHING_FAST, 0.3)               \
  X(double, SLOW_SHARE, 0.35)                  \
  X(double, KINK, 3.0)                         \
  X(double, REACH, 10.0)                       \
  X(double, REACHED, 0.999)                    \
  X(double, PIVOT, 1e-12)                      \
  X(double, NEGLIGIBLE, 1e-15)                 \
  X(double, STATIONARY, 1e-12)                 \
  X(double, EXACT, 1e-10)                      \
  X(int, SHIFTS, 12)                           \
  X(int, REFINEMENTS, 3)                       \
  X(int, CONVERGED, 0)                         \
  X(int, MAX_ITERATIONS, 1)                    \
  X(int, ZERO_RESIDUAL, 2)                     \
  X(int, DEGENERATE, 3)                        \
  X(int, NONFINITE, 4)                         \
  X(int, SHIFTED, 5)                           \
  X(int, BOUNDED, 6)

namespace rewrite_core {
#define REWRITE_CORE_DEFINE(type, name, value) constexpr type name = value;
namespace fit_low_rank_constants {
REWRITE_CORE_FIT_LOW_RANK_CONSTANTS(REWRITE_CORE_DEFINE)
}
#undef REWRITE_CORE_DEFINE
}  // namespace rewrite_core
