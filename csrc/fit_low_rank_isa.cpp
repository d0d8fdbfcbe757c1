// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see fit_low_rank_isa.h.
// The mathematics and the names are those of rewrite_core/ops/fit_low_rank_op/reference.py. One difference: the
// Jacobian m basis + dm lin^T is never formed, its products are expanded. The parts, each built on the one before:
// fit_low_rank/model.h, linear_system.h, fit.h and exact.h.
#include "fit_low_rank_isa.h"

#include "fit_low_rank/exact.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

template <class Real>
void gather(const FitLowRankEdit& edit, const Real* row, int64_t pixel_stride, double* out) {
  const int64_t whole = edit.all && pixel_stride == 1 ? edit.pixels : 0;
  for (int64_t p = 0; p < whole; ++p) out[p] = static_cast<double>(row[p]);
  for (int64_t p = whole; p < edit.stride; ++p) {
    out[p] = edit.kept[p] < 0 ? 0.0 : static_cast<double>(row[edit.kept[p] * pixel_stride]);
  }
}

// [unknowns, unknowns] in scaled unknowns, its rows padded with zeros.
void scale_matrix(const FitLowRankEdit& edit, int64_t unknowns, const double* matrix, double* out) {
  clear(out, unknowns * edit.leading);
  for (int64_t i = 0; i < unknowns; ++i) {
    for (int64_t j = 0; j < unknowns; ++j) {
      out[i * edit.leading + j] = matrix[i * unknowns + j] / edit.size[i] / edit.size[j];
    }
  }
}

template <class Real>
void gather_basis(const FitLowRankProblem& problem, FitLowRankEdit& edit) {
  const int64_t unknowns = problem.unknowns, stride = edit.stride;
  edit.finite = 1;
  for (int64_t j = 0; j < edit.rows; ++j) {
    double* row = edit.basis + j * stride;
    if (j >= unknowns) {
      clear(row, stride);
      continue;
    }
    gather(edit, static_cast<const Real*>(problem.basis) + (edit.number * unknowns + j) * problem.pixels, 1, row);
    Wide squares = {};
    for (int64_t p = 0; p < stride; p += width) squares += load(edit.weights + p) * load(row + p) * load(row + p);
    const double square = total(squares);
    edit.finite = edit.finite && finite(square);
    edit.size[j] = square > 0.0 ? square_root(square) : 1.0;
    for (int64_t p = 0; p < stride; ++p) row[p] /= edit.size[j];
  }
  for (int64_t j = 0; edit.single && j < edit.rows; ++j) {
    float* row = edit.single + j * edit.single_stride;
    for (int64_t p = 0; p < edit.single_stride; ++p) {
      row[p] = p < stride ? static_cast<float>(edit.basis[j * stride + p]) : 0.0f;
    }
  }
}

template <class Real>
void prepare_of(const FitLowRankProblem& problem, FitLowRankEdit& edit, const FitLowRankScratch& scratch) {
  const int64_t unknowns = problem.unknowns, stride = edit.stride, leading = edit.leading;
  gather_basis<Real>(problem, edit);
  const int64_t square = unknowns * unknowns;
  for (int64_t style = 0; edit.quadratic && style < problem.styles; ++style) {
    const int64_t place = edit.number * problem.styles + style;
    scale_matrix(edit, unknowns, problem.quadratic + place * square, edit.quadratic + style * unknowns * leading);
  }
  if (edit.penalty) scale_matrix(edit, unknowns, problem.penalty + edit.number * square, edit.penalty);
  if (edit.dual_form) {
    for (int64_t i = 0; i < edit.order; ++i) {
      double* row = edit.gram + i * edit.order_leading;
      clear(row, stride);
      for (int64_t j = 0; j < unknowns; ++j) {
        const double* map = edit.basis + j * stride;
        for (int64_t p = 0; p < stride; p += width) store(row + p, load(row + p) + map[i] * load(map + p));
      }
    }
  }
  if (edit.exact) {
    for (int64_t p = 0; p < stride; ++p) scratch.curvature[p] = problem.gain * problem.gain * edit.weights[p];
    gram<double>(edit, problem.styles, unknowns, {scratch.curvature}, {edit.gram}, scratch.weighted);
    for (int64_t i = 0; i < unknowns; ++i) {
      for (int64_t j = 0; j < i; ++j) edit.gram[i * leading + j] = edit.gram[j * leading + i];
    }
    edit.factor_penalty_scale = problem.penalty ? problem.penalty_scale[edit.number * problem.channels] : 0.0;
    edit.factor_status = factor_exact(problem, edit, edit.factor_penalty_scale, scratch.matrix, edit.factor);
  }
}

// A channel's result, `stride` from one unknown to the next; these are no longer scaled.
template <class Real>
void write(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t channel, const double* x,
           int64_t stride, Outcome result) {
  const int64_t unknowns = problem.unknowns, at = edit.number * problem.channels + channel;
  Real* coefficients = static_cast<Real*>(problem.coefficients) + at * unknowns;
  bool fits = true;  // in the output's type
  for (int64_t j = 0; j < unknowns; ++j) {
    coefficients[j] = static_cast<Real>(x[j * stride]);
    fits = fits && finite(static_cast<double>(coefficients[j]));
  }
  if (!fits) {
    for (int64_t j = 0; j < unknowns; ++j) coefficients[j] = Real(0);
    result.loss = result.initial;
    result.status = NONFINITE;
  }
  problem.loss[at] = result.loss;
  problem.initial_loss[at] = result.initial;
  problem.iterations[at] = result.iterations;
  problem.status[at] = result.status;
}

template <class Real>
void fit_of(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t channel,
            const FitLowRankScratch& scratch) {
  const int64_t at = edit.number * problem.channels + channel;
  Model model{problem, edit, scratch, channel};
  gather(edit, static_cast<const Real*>(problem.base) + at * problem.pixels, 1, scratch.base);
  gather(edit, static_cast<const Real*>(problem.target) + at * problem.pixels, 1, scratch.target);
  if (problem.shift) {
    const int64_t* strides = problem.shift_strides;
    gather(edit, static_cast<const Real*>(problem.shift) + edit.number * strides[0] + channel * strides[1], strides[2],
           scratch.shift);
  } else {
    clear(scratch.shift, edit.stride);
  }
  if (problem.penalty) model.penalty_scale = problem.penalty_scale[at];
  const Outcome result = fit_channel(model);
  for (int64_t j = 0; j < problem.unknowns; ++j) scratch.best_x[j] /= edit.size[j];
  write<Real>(problem, edit, channel, scratch.best_x, 1, result);
}

// out[p][c] = row[c][p] for four pixels of four channels, in registers (see transpose_block in
// second_moment/packing.h).
inline void turn_four(const float* const row[4], int64_t first, double* out) {
  typedef Vector<float, 16> Part;
  typedef Vector<double, 32> Four;
  constexpr Vector<int32_t, 16>::type low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  typename Part::type value[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) value[c] = *reinterpret_cast<const typename Part::unaligned*>(row[c] + first);
#pragma GCC unroll 2
  for (int round = 0; round < 2; ++round) {
    const typename Part::type a = value[0], b = value[1], c = value[2], d = value[3];
    value[0] = shuffle(a, c, low), value[1] = shuffle(a, c, high);
    value[2] = shuffle(b, d, low), value[3] = shuffle(b, d, high);
  }
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    *reinterpret_cast<typename Four::unaligned*>(out + p * fit_together) =
        __builtin_convertvector(value[p], typename Four::type);
  }
}

// The first pixels, where they lie side by side; how many.
inline int64_t turn_lanes(const FitLowRankEdit& edit, const float* const* row, double* out) {
  const int64_t whole = edit.all ? edit.pixels & ~int64_t{3} : 0;
  for (int64_t p = 0; p < whole; p += 4) {
    for (int64_t c = 0; c < fit_together; c += 4) turn_four(row + c, p, out + p * fit_together + c);
  }
  return whole;
}
inline int64_t turn_lanes(const FitLowRankEdit&, const double* const*, double*) { return 0; }

// out [stride, fit_together] = or += channels first, first + 1, ..., the last one in what is left of the lanes.
template <class Real, bool add>
void gather_lanes(const FitLowRankEdit& edit, const Real* rows, int64_t channel_stride, int64_t pixel_stride,
                  int64_t count, double* out) {
  const Real* row[fit_together];
  for (int64_t c = 0; c < fit_together; ++c) row[c] = rows + (c < count ? c : count - 1) * channel_stride;
  for (int64_t p = !add && pixel_stride == 1 ? turn_lanes(edit, row, out) : 0; p < edit.stride; ++p) {
    const int64_t at = edit.kept[p] * pixel_stride;
    double* const to = out + p * fit_together;
#pragma GCC unroll 8
    for (int64_t c = 0; c < fit_together; ++c) {
      // opaque, or GCC gathers, which takes longer than eight loads
      const double value = opaque(at < 0 ? 0.0 : static_cast<double>(row[c][at]));
      to[c] = add ? to[c] + value : value;
    }
  }
}

template <class Real>
void fit_exactly_of(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t first, int64_t count,
                    const FitLowRankScratch& scratch) {
  const int64_t at = edit.number * problem.channels + first, pixels = problem.pixels;
  const Real *base = static_cast<const Real*>(problem.base) + at * pixels,
             *target = static_cast<const Real*>(problem.target) + at * pixels;
  gather_lanes<Real, false>(edit, base, pixels, 1, count, scratch.many_start);
  gather_lanes<Real, false>(edit, target, pixels, 1, count, scratch.many_target);
  if (problem.shift) {
    const int64_t* strides = problem.shift_strides;
    const Real* shift = static_cast<const Real*>(problem.shift) + edit.number * strides[0] + first * strides[1];
    gather_lanes<Real, true>(edit, shift, strides[1], strides[2], count, scratch.many_start);
  }
  Outcome outcomes[fit_together];
  fit_exactly(problem, edit, scratch, problem.penalty ? problem.penalty_scale[at] : 0.0, count, outcomes);
  for (int64_t j = 0; j < problem.unknowns; ++j) {
    double* const x = scratch.many_x + j * fit_together;
    for (int64_t c = 0; c < fit_together; c += width) store(x + c, load(x + c) / edit.size[j]);
  }
  for (int64_t c = 0; c < count; ++c) {
    write<Real>(problem, edit, first + c, scratch.many_x + c, fit_together, outcomes[c]);
  }
}

void prepare(const FitLowRankProblem& problem, FitLowRankEdit& edit, const FitLowRankScratch& scratch) {
  if (problem.is_double) return prepare_of<double>(problem, edit, scratch);
  prepare_of<float>(problem, edit, scratch);
}

void fit(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t channel,
         const FitLowRankScratch& scratch) {
  if (problem.is_double) return fit_of<double>(problem, edit, channel, scratch);
  fit_of<float>(problem, edit, channel, scratch);
}

void fit_exact(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t first, int64_t count,
               const FitLowRankScratch& scratch) {
  if (problem.is_double) return fit_exactly_of<double>(problem, edit, first, count, scratch);
  fit_exactly_of<float>(problem, edit, first, count, scratch);
}

}  // namespace

const FitLowRankKernels fit_low_rank_kernels = {prepare, fit, fit_exact};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core