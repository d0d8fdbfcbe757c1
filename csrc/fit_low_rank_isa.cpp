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
    for (int64_t j = 0; j < unknowns; ++j) edit.inverse[j] = 1.0 / edit.size[j];
    for (int64_t j = 0; j < edit.rows; ++j) {
      for (int64_t p = 0; p < stride; p += width) {
        store(edit.sloped + j * stride + p, problem.gain * load(edit.weights + p) * load(edit.basis + j * stride + p));
      }
    }
    edit.factor_penalty_scale = problem.penalty ? problem.penalty_scale[edit.number * problem.channels] : 0.0;
    edit.factor_status = factor_exact(problem, edit, edit.factor_penalty_scale, scratch.matrix, edit.factor);
  }
}

// A channel's result, whose coefficients are written; `fits`: they are finite in the output's type.
template <class Real>
void write(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t channel, bool fits, Outcome result) {
  const int64_t unknowns = problem.unknowns, at = edit.number * problem.channels + channel;
  if (!fits) {
    Real* const coefficients = static_cast<Real*>(problem.coefficients) + at * unknowns;
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
  Real* const coefficients = static_cast<Real*>(problem.coefficients) + at * problem.unknowns;
  bool fits = true;
  for (int64_t j = 0; j < problem.unknowns; ++j) {
    coefficients[j] = static_cast<Real>(scratch.best_x[j] / edit.size[j]);
    fits = fits && finite(static_cast<double>(coefficients[j]));
  }
  write<Real>(problem, edit, channel, fits, result);
}

// Where a channel's pixels do not lie side by side they are gathered.
template <class Real>
FirstLoss wanted_of(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t channel,
                    const FitLowRankScratch& scratch, double* wanted) {
  const int64_t at = (edit.number * problem.channels + channel) * problem.pixels;
  const int64_t step = problem.shift ? problem.shift_strides[2] : 0;
  const Real *const base = static_cast<const Real*>(problem.base) + at,
                    *const target = static_cast<const Real*>(problem.target) + at, *shift = nullptr;
  if (problem.shift) {
    shift = static_cast<const Real*>(problem.shift) + edit.number * problem.shift_strides[0] +
            channel * problem.shift_strides[1];
  }
  const double same_shift = shift && step == 0 ? static_cast<double>(*shift) : 0.0;
  if (edit.all && step <= 1 && edit.pixels >= width) {
    return gather_wanted<Real>(edit, problem.gain, {base, target, step ? shift : nullptr, same_shift, edit.pixels},
                               wanted);
  }
  gather(edit, base, 1, scratch.base);
  gather(edit, target, 1, scratch.target);
  if (step) gather(edit, shift, step, scratch.shift);
  return gather_wanted<double>(edit, problem.gain,
                               {scratch.base, scratch.target, step ? scratch.shift : nullptr, same_shift, edit.stride},
                               wanted);
}

template <class Real>
void fit_exactly_of(const FitLowRankProblem& problem, const FitLowRankEdit& edit, int64_t first, int64_t count,
                    const FitLowRankScratch& scratch) {
  FirstLoss losses[fit_together];
  for (int64_t c = 0; c < count; ++c) {
    losses[c] = wanted_of<Real>(problem, edit, first + c, scratch, scratch.many_wanted + c * edit.stride);
  }
  const double penalty_scale = problem.penalty ? problem.penalty_scale[edit.number * problem.channels + first] : 0.0;
  Outcome outcomes[fit_together];
  fit_exactly(problem, edit, scratch, penalty_scale, count, losses, outcomes);
  // In the output's type and no longer scaled, side by side at first: single numbers of a vector are slow to convert.
  Real* const values = reinterpret_cast<Real*>(scratch.many_rest);
  Lanes largest = {};
  for (int64_t j = 0; j < problem.unknowns; ++j) {
    Lanes x = load_lanes(scratch.many_x + j * fit_together);
    for (int64_t i = 0; i < parts; ++i) {
      x.part[i] *= edit.inverse[j];
      const Wide size = magnitude(x.part[i]);
      largest.part[i] = size > largest.part[i] ? size : largest.part[i];
      store_as(values + j * fit_together + i * width, x.part[i]);
    }
  }
  double sizes[fit_together];
  __builtin_memcpy(sizes, &largest, sizeof(sizes));
  Real* coefficients =
      static_cast<Real*>(problem.coefficients) + (edit.number * problem.channels + first) * problem.unknowns;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t j = 0; j < problem.unknowns; ++j) *coefficients++ = values[j * fit_together + c];
    write<Real>(problem, edit, first + c, finite(static_cast<double>(static_cast<Real>(sizes[c]))), outcomes[c]);
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