// The part of fit_low_rank that is compiled once per instruction set. No standard headers but the integer
// types: an inline function of theirs compiled here for AVX-512 might be the copy the linker keeps for all.
#pragma once

#include <stdint.h>

#include "fit_low_rank/constants.h"
#include "simd.h"

namespace rewrite_core {

// The whole call, as Python made it: contiguous row-major arrays, null where an optional one is absent.
struct FitLowRankProblem {
  const void* basis;   // [edits, unknowns, pixels]
  const void* base;    // [edits, channels, pixels]
  const void* target;  // [edits, channels, pixels]
  const void* shift;   // [edits, channels, pixels] with strides
  int64_t shift_strides[3];
  int is_double;                // the four above: float or double
  const double* constant;       // [edits, styles, channels]; linear and quadratic come with it
  const double* linear;         // [edits, styles, channels, unknowns]
  const double* quadratic;      // [edits, styles, unknowns, unknowns], symmetric
  const int64_t* segments;      // [edits, pixels], which style demodulates a pixel; null where there is one
  const double* pixel_weights;  // [edits, pixels]
  const double* penalty;        // [edits, unknowns, unknowns], symmetric; penalty_scale comes with it
  const double* penalty_scale;  // [edits, channels]
  int64_t edits, unknowns, pixels, channels, styles;
  double slope, gain;
  int absolute;  // loss: 1 |r|, 0 r^2
  int max_iterations;
  double slow_rate;                       // how fast the smoothing shrinks at first
  double slow_rate_well, fast_rate_well;  // and after good steps, at first and then
  double tolerance;

  void* coefficients;    // [edits, channels, unknowns], float or double
  double* loss;          // [edits, channels]
  double* initial_loss;  // [edits, channels]
  int32_t* iterations;   // [edits, channels]
  int32_t* status;       // [edits, channels]
};

// What the channels of one edit share. Pixels of weight 0 are gone, the others lie style by style; unknowns are scaled.
struct FitLowRankEdit {
  int64_t number;
  int64_t pixels;   // kept, with what pads the styles before the last
  int64_t stride;   // pixels, padded with weight 0 to whole vectors
  int64_t rows;     // unknowns, padded with zero rows to whole register blocks
  int64_t leading;  // row length of [unknowns, unknowns] arrays
  int64_t order;    // of the linear systems: unknowns, or pixels in dual form
  int64_t order_leading;
  int exact;        // linear l2 problem: closed form
  int all;          // all pixels, in their order, of one style
  int dual_form;    // solve over pixels: there are fewer of them
  int finite;       // the basis
  int64_t* kept;    // [stride] their places in the input, -1 for padding
  int64_t* starts;  // [styles + 1] where each style's pixels begin; the last is stride
  double* basis;    // [rows, stride]
  float* single;    // [rows, single_stride] the same, or null: the normal equations' matrix in float products
  int64_t single_stride;
  double* weights;              // [stride], sum 1
  double* sloped;               // exact: [rows, stride] gain * weights * basis
  double* size;                 // [unknowns] root mean square of the basis rows
  double* inverse;              // exact: [unknowns] 1 / size
  double* quadratic;            // [styles, unknowns, leading] or null
  double* penalty;              // [unknowns, leading] or null
  double* gram;                 // dual form: basis^T basis [pixels, order_leading]; exact: weighted, [rows, leading]
  double* factor;               // exact: of the first channel's matrix
  double factor_penalty_scale;  // exact: that channel's penalty_scale
  int factor_status;
};

// One thread's buffers, in doubles: [stride], [leading], [styles], [styles, leading], [styles, stride],
// [order, order_leading], [rows, panel].
struct FitLowRankScratch {
  double *base, *target, *shift, *lin, *new_lin, *r, *inverse, *steep, *dual;
  double *slopes, *curvature, *root, *spare;
  double *x, *new_x, *best_x, *gradient, *step;
  double *m, *new_m;
  double *dm, *new_dm, *half;
  double* turned;
  double *matrix, *factor;
  double* weighted;
  // The closed form's, of fit_together channels; else null: [., stride], and side by side [rows, .].
  double* many_wanted;
  double *many_right, *many_x, *many_rest, *many_turned;
};

constexpr int64_t fit_padding = 8;   // vectors of any instruction set
constexpr int64_t fit_rows = 12;     // register blocks of 3 and of 4 rows
constexpr int64_t fit_panel = 128;   // pixels per pass of the weighted Gram matrix
constexpr int64_t fit_together = 8;  // channels that the closed form solves at a time
constexpr int fit_pixel_buffers = 13, fit_unknown_buffers = 5;

struct FitLowRankKernels {
  // Fills edit's arrays (already allocated, kept and weights filled in).
  void (*prepare)(const FitLowRankProblem& problem, FitLowRankEdit& edit, const FitLowRankScratch& scratch);
  void (*fit)(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t channel,
              const FitLowRankScratch& scratch);
  // The closed form of channels [first, first + count) with one penalty scale, count <= fit_together.
  void (*fit_exact)(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t first, int64_t count,
                    const FitLowRankScratch& scratch);
};

REWRITE_CORE_PER_ISA(FitLowRankKernels, fit_low_rank_kernels)

}  // namespace rewrite_core
