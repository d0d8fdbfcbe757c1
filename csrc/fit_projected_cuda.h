// Adam on a whole weight with projection onto directions, on a GPU: all steps in one launch.
// rewrite_core/ops/fit_projected_op/problem.py states the algorithm, fit_projected_cuda/layout.h how it is spread.
#pragma once

#include <cstdint>

#include "common.h"

namespace rewrite_core {

// One call, in float. All addresses are the GPU's; all arrays contiguous. A weight is an input and a tap: weights =
// inputs taps, the taps of an input side by side.
struct FitProjectedTask {
  const float* maps;                   // [weights, pixels]: the operator
  const float *base, *target, *value;  // [channels, pixels]
  const float* shift;                  // [channels, pixels], or null
  const float *weight, *square;        // [channels, weights], [inputs]: the squared style; null: no demodulation
  const float* directions;             // [ranks, inputs]
  const float* basis;                  // [ranks, taps, pixels]: the directions' maps, to project the gradient; or null
  const float* rates;                  // [steps, 2]: the step size; one over the root of the second bias correction
  float* goal;                         // [channels, pixels]: for the kernel
  float* leaning;                      // [channels, ranks, taps]: for the kernel, where there is a basis
  float* coefficients;                 // [channels, ranks, taps], or without directions the change [channels, weights]
  double* losses;                      // [projected_parts, steps]: sums over channels and pixels before each step
  int64_t channels, inputs, taps, pixels, ranks, steps, project_every;
  bool absolute;  // the loss is l1
  float eps, slope, gain;
};

// How a launch is spread over the GPU.
struct FitProjectedPlan {
  int tiles = 0;   // of 8 weights that a warp has; 0: it does not fit on this GPU
  int blocks = 0;  // that work together on some channels: 1, or a cluster's
};

// A status other than ok: CUDA's, as no GPU that runs this build.
Status fit_projected_plan(int64_t weights, int64_t pixels, int64_t taps, int device, FitProjectedPlan& plan);

// Rows of losses.
int64_t fit_projected_parts(int64_t channels, const FitProjectedPlan& plan);

// Queues the launch on a stream of the device and returns.
Status fit_projected_cuda(const FitProjectedTask& task, const FitProjectedPlan& plan, int device, void* stream);

}  // namespace rewrite_core
