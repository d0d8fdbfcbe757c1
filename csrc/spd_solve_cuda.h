// Solves with symmetric positive definite matrices on a GPU, in double: factor, solve and refine in one launch.
#pragma once

#include <cstdint>

#include "common.h"

namespace rewrite_core {

// Of each matrix: its mean diagonal, its largest |diagonal entry|, the largest |a_ij - a_ji| (NaN where anything is not
// finite), 0 or which pivot, from 1 on, is not above `least` times its diagonal entry, the shift that was added to each
// diagonal entry in proportion to it, and an SPDVerdict.
constexpr int spd_facts = 6;

enum class SPDVerdict : int { sound = 0, unfit = 1, indefinite = 2 };  // unfit: not within the limits below

// One call. All addresses are the GPU's; all arrays contiguous.
struct SPDSolveTask {
  const double* matrix;  // [batch, n, n]: the lower triangle is factored; residuals are of all of it
  const double* given;   // [batch, n, n]: what is examined
  const double* factor;  // [batch, n, n]: a lower factor that is there already, then nothing is examined; or null
  double* lower;         // [batch, n, n]: the factor, zero above the diagonal; or null
  const double* rhs;     // [batch, n, sides]
  double* x;             // [batch, n, sides]: the solution, NaN where a matrix is not sound
  double* facts;         // [batch, spd_facts]; unless there is a factor
  int64_t batch, n, sides;
  double asymmetry, smallest_mean;    // limits: of the largest diagonal entry; of the mean one
  double least;                       // of each pivot, of its diagonal entry
  double first_shift, largest_shift;  // tried where a pivot is bad: the first one, 10 times that, ...; 0: none
  int64_t passes;                     // of 8 right-hand sides that a team does; the launch chooses
};

// The blocks that work together on one matrix of this size: 1, or a cluster's. 0: it does not fit on this GPU, and a
// status other than ok: CUDA's, as no GPU that runs this build.
Status spd_solve_blocks(int64_t n, int device, int& blocks);

// Queues the launch on a stream of the device and returns.
Status spd_solve_cuda(SPDSolveTask task, int blocks, int device, void* stream);

}  // namespace rewrite_core
