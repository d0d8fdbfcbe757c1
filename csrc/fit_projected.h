// Adam on a whole weight with projection onto directions; rewrite_core/ops/fit_projected_op/problem.py states the
// algorithm.
#pragma once

#include "common.h"
#include "fit_projected_isa.h"

namespace rewrite_core {

// Channels that one block of losses holds.
int64_t projected_lanes(Isa isa);

// Blocks first, ..., first + count - 1 of channels. The same bits for any number of threads.
Status fit_projected(const FitProjectedProblem& problem, int64_t first, int64_t count, int threads, Isa isa);

}  // namespace rewrite_core
