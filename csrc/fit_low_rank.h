// Per-channel fits of a rank-R change's coefficients; rewrite_core/ops/fit_low_rank_op/problem.py states the problem.
#pragma once

#include "common.h"
#include "fit_low_rank_isa.h"

namespace rewrite_core {

// problem.slow_rate, slow_rate_well and fast_rate_well are filled in here. The same bits for any number of threads.
// `finite`: whether the basis and the first losses were, which shows NaN and infinity in all data of pixels that count.
Status fit_low_rank(FitLowRankProblem problem, bool& finite, int threads, Isa isa);

}  // namespace rewrite_core
