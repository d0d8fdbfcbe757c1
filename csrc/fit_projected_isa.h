// The part of fit_projected that is compiled once per instruction set. No standard headers but the integer types: an
// inline function of theirs compiled here for AVX-512 might be the copy the linker keeps for all.
#pragma once

#include <stdint.h>

#include "fit_projected/constants.h"
#include "simd.h"

namespace rewrite_core {

// The whole call, as Python made it: contiguous row-major arrays, null where an optional one is absent.
struct FitProjectedProblem {
  const float* maps;  // [inputs / GROUP, products, slots, GROUP]: the operator, transformed
  int tile;           // output tiles of tile x tile by Winograd's algorithm (2, 4 or 5), or 0: no transform
  int64_t inputs;     // padded to whole groups
  int64_t taps, pixels, height, width, channels, rank;
  int64_t products, slots;  // (tile + 2)^2 and tiles; or taps and pixels
  const float* base;        // [channels, pixels], as are the next two
  const float* target;
  const float* value;  // what the layer itself gives for the unchanged weight
  const float* shift;  // [channels, pixels] with strides
  int64_t shift_strides[2];
  const float* weight;      // demodulation: [channels, inputs, taps]; square comes with it
  const float* square;      // [inputs], the squared style
  const float* directions;  // [rank, inputs]
  const float* basis;       // [rank, taps, pixels]
  float eps, slope, gain;
  int absolute;  // loss: 1 |r|, 0 r^2
  int64_t steps, project_every;
  int project_gradient;
  const float* rates;  // [steps, 2]: the step size, and one over the root of the second bias correction

  double* losses;       // [blocks, steps]: sums over a block's channels and pixels
  float* coefficients;  // [channels, rank, taps]; rank 0: the change itself, [channels, inputs, taps]
};

// One thread's buffers, in vectors (one lane a channel).
struct FitProjectedScratch {
  float *base, *target, *shift, *lin, *slopes;  // [pixels]
  float *change, *mean, *power, *weight;        // [inputs, taps]; weight only for demodulation
  float *sums, *turned;                         // [products, slots] or [slots]
  float* group;                                 // [GROUP, products]
  float *coefficients, *leaning, *gradient;     // [rank, taps]
};

struct FitProjectedKernels {
  int64_t lanes;
  // All steps of channels lanes * block, lanes * block + 1, ...
  void (*descend)(const FitProjectedProblem& problem, int64_t block, const FitProjectedScratch& scratch);
};

REWRITE_CORE_PER_ISA(FitProjectedKernels, fit_projected_kernels)

}  // namespace rewrite_core
