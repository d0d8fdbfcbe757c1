// The linear l2 problem, by one factor.
#pragma once

#include "fit.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

// The factor of gram + penalty_scale * penalty, with no diagonal shift or the smallest that is enough; its status.
int factor_exact(const FitLowRankProblem& problem, const FitLowRankEdit& edit, double penalty_scale, double* matrix,
                 double* factor) {
  const int64_t unknowns = problem.unknowns, leading = edit.leading;
  double size = 0.0;
  for (int64_t i = 0; i < unknowns; ++i) {
    const double* gram_row = edit.gram + i * leading;
    const double* penalty = edit.penalty ? edit.penalty + i * leading : nullptr;
    double* row = matrix + i * leading;
    for (int64_t j = 0; j < leading; ++j) row[j] = gram_row[j] + (penalty ? penalty_scale * penalty[j] : 0.0);
    if (!finite(row[i])) return NONFINITE;
    if (row[i] > size) size = row[i];
  }
  if (size == 0.0) return DEGENERATE;
  const double least = 0.5 * PIVOT * size;
  if (factorise(matrix, unknowns, leading, 0.0, least, nullptr, factor)) return CONVERGED;
  double shift = PIVOT * size;
  for (int i = 0; i < SHIFTS; ++i, shift *= 10.0) {
    if (factorise(matrix, unknowns, leading, shift, least, nullptr, factor)) return SHIFTED;
  }
  return NONFINITE;
}

// Channels are solved `fit_together` at a time, each in a lane of its own: arrays are [., fit_together].
constexpr int64_t parts = fit_together / width;
static_assert(fit_together % width == 0 && fit_rows * width % fit_together == 0);

struct Lanes {
  Wide part[parts];
};

inline Lanes load_lanes(const double* a) {
  Lanes v;
#pragma GCC unroll 4
  for (int64_t i = 0; i < parts; ++i) v.part[i] = load(a + i * width);
  return v;
}

inline void store_lanes(double* a, const Lanes& v) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < parts; ++i) store(a + i * width, v.part[i]);
}

inline void add_lanes(Lanes& sum, double a, const Lanes& b) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < parts; ++i) sum.part[i] += a * b.part[i];
}

template <int64_t block>
void multiply_block(const double* matrix, int64_t row_length, const double* a, int64_t count, double* out) {
  Lanes sum[block];
#pragma GCC unroll 12
  for (int64_t q = 0; q < block; ++q) sum[q] = load_lanes(out + q * fit_together);
  for (int64_t k = 0; k < count; ++k) {
    const Lanes value = load_lanes(a + k * fit_together);
#pragma GCC unroll 12
    for (int64_t q = 0; q < block; ++q) add_lanes(sum[q], matrix[q * row_length + k], value);
  }
#pragma GCC unroll 12
  for (int64_t q = 0; q < block; ++q) store_lanes(out + q * fit_together, sum[q]);
}

// out[i] += sum_k matrix[i, k] a[k] for `rows` rows, and some more, up to a multiple of fit_rows.
void multiply_lanes(const double* matrix, int64_t row_length, int64_t rows, const double* a, int64_t count,
                    double* out) {
  constexpr int64_t block = fit_rows / parts;
  static_assert(block % 3 == 0);
  int64_t i = 0;
  for (; rows - i > block - 3; i += block) {
    multiply_block<block>(matrix + i * row_length, row_length, a, count, out + i * fit_together);
  }
  matrix += i * row_length, out += i * fit_together;  // what is left takes as many rows as it needs, in threes
  if (rows - i > 6) return multiply_block<(block > 9 ? 9 : block)>(matrix, row_length, a, count, out);
  if (rows - i > 3) return multiply_block<(block > 6 ? 6 : block)>(matrix, row_length, a, count, out);
  if (rows > i) multiply_block<(block > 3 ? 3 : block)>(matrix, row_length, a, count, out);
}

// lin = start + x basis.
void linearise_lanes(const FitLowRankEdit& edit, int64_t unknowns, const double* start, const double* x, double* lin) {
  constexpr int64_t block = fit_padding / parts;
  for (int64_t p = 0; p < edit.stride; p += block) {
    Lanes sum[block];
#pragma GCC unroll 8
    for (int64_t q = 0; q < block; ++q) sum[q] = load_lanes(start + (p + q) * fit_together);
    for (int64_t j = 0; j < unknowns; ++j) {
      const Lanes value = load_lanes(x + j * fit_together);
#pragma GCC unroll 8
      for (int64_t q = 0; q < block; ++q) add_lanes(sum[q], edit.basis[j * edit.stride + p + q], value);
    }
#pragma GCC unroll 8
    for (int64_t q = 0; q < block; ++q) store_lanes(lin + (p + q) * fit_together, sum[q]);
  }
}

// Of every lane: the loss, by four sums that do not wait for each other.
void losses_of(const FitLowRankEdit& edit, double gain, const double* lin, const double* target, double* out) {
  Lanes sum[4] = {};
  for (int64_t p = 0; p < edit.stride; p += 4) {
#pragma GCC unroll 4
    for (int64_t q = 0; q < 4; ++q) {
      const Lanes value = load_lanes(lin + (p + q) * fit_together), goal = load_lanes(target + (p + q) * fit_together);
#pragma GCC unroll 4
      for (int64_t i = 0; i < parts; ++i) {
        const Wide r = gain * value.part[i] - goal.part[i];
        sum[q].part[i] += edit.weights[p + q] * (r * r);
      }
    }
  }
  for (int64_t i = 0; i < parts; ++i) {
    store(out + i * width, (sum[0].part[i] + sum[1].part[i]) + (sum[2].part[i] + sum[3].part[i]));
  }
}

// Rows first, ..., first + rows - 1 of the first half of solve_lanes, with those before them done: sums stay in
// registers. `scaled` gets -D^-1 times the result.
template <int64_t rows>
inline void solve_forward(const double* factor, int64_t leading, double* x, double* scaled, int64_t first) {
  Lanes sum[rows];
#pragma GCC unroll 4
  for (int64_t q = 0; q < rows; ++q) sum[q] = load_lanes(x + (first + q) * fit_together);
  for (int64_t k = 0; k < first; ++k) {
    const Lanes known = load_lanes(scaled + k * fit_together);
#pragma GCC unroll 4
    for (int64_t q = 0; q < rows; ++q) add_lanes(sum[q], factor[k * leading + first + q], known);
  }
#pragma GCC unroll 4
  for (int64_t q = 0; q < rows; ++q) {
    const double* row = factor + (first + q) * leading;
    store_lanes(x + (first + q) * fit_together, sum[q]);
    for (int64_t i = 0; i < parts; ++i) sum[q].part[i] *= -row[first + q];
    store_lanes(scaled + (first + q) * fit_together, sum[q]);
#pragma GCC unroll 4
    for (int64_t p = q + 1; p < rows; ++p) add_lanes(sum[p], row[first + p], sum[q]);
  }
}

// The same rows of the second half, with those after them done.
template <int64_t rows>
inline void solve_backward(const double* factor, int64_t n, int64_t leading, double* x, int64_t first) {
  Lanes sum[rows];
#pragma GCC unroll 4
  for (int64_t q = 0; q < rows; ++q) sum[q] = load_lanes(x + (first + q) * fit_together);
  for (int64_t k = n - 1; k >= first + rows; --k) {
    const Lanes known = load_lanes(x + k * fit_together);
#pragma GCC unroll 4
    for (int64_t q = 0; q < rows; ++q) add_lanes(sum[q], -factor[(first + q) * leading + k], known);
  }
#pragma GCC unroll 4
  for (int64_t q = rows - 1; q >= 0; --q) {
    const double scale = factor[(first + q) * leading + first + q];
    for (int64_t i = 0; i < parts; ++i) sum[q].part[i] *= scale;
    store_lanes(x + (first + q) * fit_together, sum[q]);
#pragma GCC unroll 4
    for (int64_t p = 0; p < q; ++p) add_lanes(sum[p], -factor[(first + p) * leading + first + q], sum[q]);
  }
}

// x of U^T D^-1 U x = right, in place; the diagonal holds D^-1. `scaled` is as long.
void solve_lanes(const double* factor, int64_t n, int64_t leading, double* x, double* scaled) {
  const int64_t whole = n & ~int64_t{3};
  for (int64_t i = 0; i < whole; i += 4) solve_forward<4>(factor, leading, x, scaled, i);
  for (int64_t i = whole; i < n; ++i) solve_forward<1>(factor, leading, x, scaled, i);
  for (int64_t i = n - 1; i >= whole; --i) solve_backward<1>(factor, n, leading, x, i);
  for (int64_t i = whole - 4; i >= 0; i -= 4) solve_backward<4>(factor, n, leading, x, i);
}

// The solution in scratch.many_x. Where the factor is of a shifted matrix it is refined: each time the shift's error
// shrinks by shift / eigenvalue. Elsewhere a solve more would change rounding errors for others.
void solve_exactly(const FitLowRankProblem& problem, const FitLowRankEdit& edit, const FitLowRankScratch& scratch,
                   const double* factor, double penalty_scale, bool shifted) {
  const int64_t unknowns = problem.unknowns, leading = edit.leading, size = edit.rows * fit_together;
  double *x = scratch.many_x, *rest = scratch.many_rest, *turned = scratch.many_turned;
  clear(x, size);
  for (int round = 0; round < (shifted ? REFINEMENTS : 1); ++round) {
    copy(scratch.many_right, rest, size);
    if (round > 0) {
      for (int64_t i = 0; i < size; i += width) store(turned + i, -load(x + i));
      multiply_lanes(edit.gram, leading, unknowns, turned, unknowns, rest);
      for (int64_t j = 0; edit.penalty && j < unknowns; ++j) {
        Lanes sum = load_lanes(rest + j * fit_together);
        for (int64_t i = 0; i < unknowns; ++i) {
          add_lanes(sum, penalty_scale * edit.penalty[j * leading + i], load_lanes(turned + i * fit_together));
        }
        store_lanes(rest + j * fit_together, sum);
      }
    }
    solve_lanes(factor, unknowns, leading, rest, turned);
    for (int64_t i = 0; i < size; i += width) store(x + i, load(x + i) + load(rest + i));
  }
}

// The linear l2 problem of `count` <= fit_together channels with one penalty scale, whose data are in scratch.many_*.
// The results are in scratch.many_x; `outcomes` has fit_together places.
void fit_exactly(const FitLowRankProblem& problem, const FitLowRankEdit& edit, const FitLowRankScratch& scratch,
                 double penalty_scale, int64_t count, Outcome* outcomes) {
  const int64_t unknowns = problem.unknowns, stride = edit.stride;
  const double gain = problem.gain;
  double *start = scratch.many_start, *target = scratch.many_target, *lin = scratch.many_lin, *x = scratch.many_x;
  alignas(64) double initial[fit_together], level[fit_together], data[fit_together];
  losses_of(edit, gain, start, target, initial);
  Lanes sum = {};
  for (int64_t p = 0; p < stride; ++p) {
    const Lanes from = load_lanes(start + p * fit_together), goal = load_lanes(target + p * fit_together);
    Lanes slopes;
#pragma GCC unroll 4
    for (int64_t i = 0; i < parts; ++i) {
      sum.part[i] += edit.weights[p] * magnitude(goal.part[i]);
      slopes.part[i] = gain * edit.weights[p] * (goal.part[i] - gain * from.part[i]);
    }
    store_lanes(lin + p * fit_together, slopes);
  }
  store_lanes(level, sum);
  const double* factor = edit.factor;
  int status = edit.factor_status;
  if (edit.penalty && penalty_scale != edit.factor_penalty_scale) {
    status = factor_exact(problem, edit, penalty_scale, scratch.matrix, scratch.factor);
    factor = scratch.factor;
  }
  if (edit.pixels == 0 || gain == 0.0) status = DEGENERATE;
  const bool solvable = status != DEGENERATE && status != NONFINITE;
  clear(data, fit_together);
  if (solvable) {
    clear(scratch.many_right, edit.rows * fit_together);
    multiply_lanes(edit.basis, stride, unknowns, lin, stride, scratch.many_right);
    solve_exactly(problem, edit, scratch, factor, penalty_scale, status == SHIFTED);
    linearise_lanes(edit, unknowns, start, x, lin);
    losses_of(edit, gain, lin, target, data);
  }
  for (int64_t c = 0; c < count; ++c) {
    outcomes[c] = {initial[c], initial[c], 1, status};
    if (!finite(initial[c]) || !finite(level[c])) {
      outcomes[c].status = NONFINITE;
    } else if (edit.pixels > 0 && !(square_root(initial[c]) > NEGLIGIBLE * level[c])) {
      outcomes[c].status = ZERO_RESIDUAL;
    } else if (solvable) {
      double penalised = 0.0;
      for (int64_t j = 0; edit.penalty && j < unknowns; ++j) {
        double along = 0.0;
        for (int64_t i = 0; i < unknowns; ++i) along += edit.penalty[j * edit.leading + i] * x[i * fit_together + c];
        penalised += along * x[j * fit_together + c];
      }
      if (data[c] + penalty_scale * penalised < initial[c]) {  // false for NaN
        outcomes[c].loss = data[c];
        continue;
      }
    }
    for (int64_t j = 0; j < unknowns; ++j) x[j * fit_together + c] = 0.0;
  }
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
