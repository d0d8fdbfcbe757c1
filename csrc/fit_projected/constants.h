// The constants that rewrite_core/ops/fit_projected_op/problem.py names and explains: a test compares each with that.
#pragma once

#include <stdint.h>

#define REWRITE_CORE_FIT_PROJECTED_CONSTANTS(X) \
  X(int64_t, GROUP, 8)                          \
  X(int64_t, MOST_TAPS, 64)                     \
  X(double, BETA1, 0.9)                         \
  X(double, BETA2, 0.999)                       \
  X(double, EPSILON, 1e-8)

namespace rewrite_core {
#define REWRITE_CORE_DEFINE(type, name, value) constexpr type name = value;
namespace fit_projected_constants {
REWRITE_CORE_FIT_PROJECTED_CONSTANTS(REWRITE_CORE_DEFINE)
}
#undef REWRITE_CORE_DEFINE
}  // namespace rewrite_core
