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

// Products over the pixels have pixels in their lanes. Channels are solved `fit_together` at a time, each in a lane of
// its own: arrays are [unknowns, fit_together].
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

inline void take_lanes(Lanes& sum, double a, const Lanes& b) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < parts; ++i) sum.part[i] -= a * b.part[i];
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
    for (int64_t q = 0; q < rows; ++q) take_lanes(sum[q], factor[(first + q) * leading + k], known);
  }
#pragma GCC unroll 4
  for (int64_t q = rows - 1; q >= 0; --q) {
    const double scale = factor[(first + q) * leading + first + q];
    for (int64_t i = 0; i < parts; ++i) sum[q].part[i] *= scale;
    store_lanes(x + (first + q) * fit_together, sum[q]);
#pragma GCC unroll 4
    for (int64_t p = 0; p < q; ++p) take_lanes(sum[p], factor[(first + p) * leading + first + q], sum[q]);
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
  copy(scratch.many_right, x, size);
  solve_lanes(factor, unknowns, leading, x, turned);
  for (int round = 1; shifted && round < REFINEMENTS; ++round) {
    copy(scratch.many_right, rest, size);
    for (int64_t i = 0; i < size; i += width) store(turned + i, -load(x + i));
    multiply_lanes(edit.gram, leading, unknowns, turned, unknowns, rest);
    for (int64_t j = 0; edit.penalty && j < unknowns; ++j) {
      Lanes sum = load_lanes(rest + j * fit_together);
      for (int64_t i = 0; i < unknowns; ++i) {
        add_lanes(sum, penalty_scale * edit.penalty[j * leading + i], load_lanes(turned + i * fit_together));
      }
      store_lanes(rest + j * fit_together, sum);
    }
    solve_lanes(factor, unknowns, leading, rest, turned);
    for (int64_t i = 0; i < size; i += width) store(x + i, load(x + i) + load(rest + i));
  }
}

// A channel's pixels, side by side in memory, at least a vector of them; what is left of the stride is padding.
template <class Real>
struct ChannelData {
  const Real *base, *target;
  const Real* shift;  // null where all pixels have the same
  double same_shift;
  int64_t pixels;
};

struct FirstLoss {
  double loss, level;  // level: of the target
};

// wanted [stride] = target - gain * (base + shift).
template <class Real>
FirstLoss gather_wanted(const FitLowRankEdit& edit, double gain, const ChannelData<Real>& data, double* wanted) {
  const Wide same_shift = fill(data.same_shift);
  Wide loss = {}, level = {};
  const auto take = [&](int64_t p, Wide weight) {
    const Wide goal = load_wide(data.target + p);
    const Wide rest = goal - gain * (load_wide(data.base + p) + (data.shift ? load_wide(data.shift + p) : same_shift));
    loss += weight * (rest * rest);
    level += weight * magnitude(goal);
    return rest;
  };
  const int64_t whole = data.pixels & ~(width - 1), last = data.pixels - width;
  for (int64_t p = 0; p < whole; p += width) store(wanted + p, take(p, load(edit.weights + p)));
  for (int64_t p = whole; p < edit.stride; p += width) store(wanted + p, Wide{});
  if (whole < data.pixels) {  // the last vector, some of whose pixels have been counted: nothing behind it is read
    const Wide weight = load_wide(edit.weights + last);
    store_wide(wanted + last, take(last, places(last) < static_cast<double>(whole) ? Wide{} : weight));
  }
  return {total(loss), total(level)};
}

// right[j, c] = sum_p sloped[j, p] wanted[c, p] for some channels c and all unknowns j.
template <int block, int channels>
void project(const FitLowRankEdit& edit, int64_t unknowns, const double* wanted, double* right) {
  const int64_t stride = edit.stride;
  for (int64_t j = 0; j < unknowns; j += block) {
    const double* const rows = edit.sloped + j * stride;
    Wide sum[block][channels] = {};
    for (int64_t p = 0; p < stride; p += width) {
      Wide row[block];
#pragma GCC unroll 4
      for (int i = 0; i < block; ++i) row[i] = load(rows + i * stride + p);
#pragma GCC unroll 8
      for (int c = 0; c < channels; ++c) {
        const Wide value = load(wanted + c * stride + p);
#pragma GCC unroll 4
        for (int i = 0; i < block; ++i) sum[i][c] += row[i] * value;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < block; ++i) {
      double* const out = right + (j + i) * fit_together;
      if constexpr (channels == width) {
        sum_lanes<double, channels>(sum[i], out);
      } else {
        for (int c = 0; c < channels; ++c) out[c] = total(sum[i][c]);
      }
    }
  }
}

// All channels' right-hand sides: as many at once as sums find room in the registers.
void project_all(const FitLowRankEdit& edit, int64_t unknowns, const double* wanted, int64_t count, double* right) {
  constexpr int together = registers >= 32 && width == fit_together ? 8 : 4;
  clear(right, edit.rows * fit_together);
  int64_t c = 0;
  for (; c + together <= count; c += together)
    project<3, together>(edit, unknowns, wanted + c * edit.stride, right + c);
  for (; c < count; ++c) project<4, 1>(edit, unknowns, wanted + c * edit.stride, right + c);
}

// The loss over `vectors` vectors of pixels, added to `loss`: their sums do not wait for each other.
template <int vectors>
inline void add_loss(const FitLowRankEdit& edit, double gain, int64_t unknowns, const double* wanted, const double* x,
                     int64_t p, Wide& loss) {
  Wide value[vectors] = {};
  for (int64_t j = 0; j < unknowns; ++j) {
    const double* const row = edit.basis + j * edit.stride + p;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) value[v] += x[j * fit_together] * load(row + v * width);
  }
  for (int v = 0; v < vectors; ++v, p += width) {
    const Wide rest = load(wanted + p) - gain * value[v];
    loss += load(edit.weights + p) * (rest * rest);
  }
}

// What a channel's change in `x`, whose entries are fit_together apart, leaves over.
double loss_left(const FitLowRankEdit& edit, double gain, int64_t unknowns, const double* wanted, const double* x) {
  Wide loss = {};
  int64_t p = 0;
  for (; p + 4 * width <= edit.stride; p += 4 * width) add_loss<4>(edit, gain, unknowns, wanted, x, p, loss);
  for (; p < edit.stride; p += width) add_loss<1>(edit, gain, unknowns, wanted, x, p, loss);
  return total(loss);
}

// Of every lane, at the solution x: the decrease of the objective, x^T right; the penalty; what rounding errors of the
// decrease are relative to, without the first loss.
struct Decrease {
  alignas(64) double objective[fit_together], penalty[fit_together], size[fit_together];
};

void decrease_of(const FitLowRankProblem& problem, const FitLowRankEdit& edit, const FitLowRankScratch& scratch,
                 double penalty_scale, Decrease& out) {
  const int64_t unknowns = problem.unknowns, leading = edit.leading;
  const double* const x = scratch.many_x;
  double largest = 0.0;  // entry of the matrix
  Lanes objective = {}, penalty = {}, size = {};
  for (int64_t j = 0; j < unknowns; ++j) {
    const Lanes own = load_lanes(x + j * fit_together), right = load_lanes(scratch.many_right + j * fit_together);
    Lanes along = {};
    double diagonal = edit.gram[j * leading + j];
    if (edit.penalty) {
      for (int64_t i = 0; i < unknowns; ++i) {
        add_lanes(along, penalty_scale * edit.penalty[j * leading + i], load_lanes(x + i * fit_together));
      }
      diagonal += penalty_scale * edit.penalty[j * leading + j];
    }
    if (diagonal > largest) largest = diagonal;
    for (int64_t i = 0; i < parts; ++i) {
      objective.part[i] += own.part[i] * right.part[i];
      penalty.part[i] += own.part[i] * along.part[i];
      size.part[i] += magnitude(own.part[i]);
    }
  }
  for (int64_t i = 0; i < parts; ++i) size.part[i] *= largest * size.part[i];
  store_lanes(out.objective, objective);
  store_lanes(out.penalty, penalty);
  store_lanes(out.size, size);
}

// A loss that is at least this share of the terms that it is the difference of is found so, to ten digits: rounding
// errors were below 3 eps of the terms for bases of any condition. A smaller one is summed over the pixels, which takes
// as long as the right-hand side.
constexpr double found_by_difference = 1e-5;

// The linear l2 problem of `count` <= fit_together channels with one penalty scale, with what they want in
// scratch.many_wanted [fit_together, stride]. The results are in scratch.many_x.
void fit_exactly(const FitLowRankProblem& problem, const FitLowRankEdit& edit, const FitLowRankScratch& scratch,
                 double penalty_scale, int64_t count, const FirstLoss* first, Outcome* outcomes) {
  const int64_t unknowns = problem.unknowns, stride = edit.stride;
  double *const wanted = scratch.many_wanted, *const x = scratch.many_x;
  const double* factor = edit.factor;
  int status = edit.factor_status;
  if (edit.penalty && penalty_scale != edit.factor_penalty_scale) {
    status = factor_exact(problem, edit, penalty_scale, scratch.matrix, scratch.factor);
    factor = scratch.factor;
  }
  if (edit.pixels == 0 || problem.gain == 0.0) status = DEGENERATE;
  const bool solvable = status != DEGENERATE && status != NONFINITE;
  Decrease decrease;
  if (solvable) {
    project_all(edit, unknowns, wanted, count, scratch.many_right);
    solve_exactly(problem, edit, scratch, factor, penalty_scale, status == SHIFTED);
    decrease_of(problem, edit, scratch, penalty_scale, decrease);
  }
  for (int64_t c = 0; c < count; ++c) {
    const double initial = first[c].loss;
    outcomes[c] = {initial, initial, 1, status};
    if (!finite(initial) || !finite(first[c].level)) {
      outcomes[c].status = NONFINITE;
    } else if (edit.pixels > 0 && !(square_root(initial) > NEGLIGIBLE * first[c].level)) {
      outcomes[c].status = ZERO_RESIDUAL;
    } else if (solvable) {
      double data = initial - decrease.objective[c] - decrease.penalty[c];
      if (status == SHIFTED || !(data >= found_by_difference * (initial + decrease.size[c]))) {
        data = loss_left(edit, problem.gain, unknowns, wanted + c * stride, x + c);
      }
      if (data + decrease.penalty[c] < initial) {  // false for NaN
        outcomes[c].loss = data;
        continue;
      }
    }
    for (int64_t j = 0; j < unknowns; ++j) x[j * fit_together + c] = 0.0;
  }
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
