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

// The linear l2 problem; the result is in scratch.best_x.
Outcome fit_exactly(const Model& model) {
  const FitLowRankProblem& problem = model.problem;
  const FitLowRankEdit& edit = model.edit;
  const FitLowRankScratch& scratch = model.scratch;
  const int64_t unknowns = problem.unknowns, stride = edit.stride, leading = edit.leading;
  const double gain = problem.gain;
  double *x = scratch.x, *rest = scratch.step, *right = scratch.gradient;
  clear(x, leading);
  clear(rest, leading);
  clear(right, leading);
  clear(scratch.best_x, leading);
  scratch.m[0] = 1.0;
  const double initial = objectives<false, false>(model, scratch.base, scratch.m, 0.0).data;
  Outcome result{initial, initial, 1, CONVERGED};
  double level = 0.0;
  for (int64_t p = 0; p < stride; ++p) level += edit.weights[p] * magnitude(scratch.target[p]);
  if (!finite(initial) || !finite(level)) {
    result.status = NONFINITE;
    return result;
  }
  if (edit.pixels > 0 && !(square_root(initial) > NEGLIGIBLE * level)) {
    result.status = ZERO_RESIDUAL;
    return result;
  }
  const double* factor = edit.factor;
  result.status = edit.factor_status;
  if (edit.penalty && model.penalty_scale != edit.factor_penalty_scale) {
    result.status = factor_exact(problem, edit, model.penalty_scale, scratch.matrix, scratch.factor);
    factor = scratch.factor;
  }
  if (edit.pixels == 0 || gain == 0.0) result.status = DEGENERATE;
  if (result.status == DEGENERATE || result.status == NONFINITE) return result;

  for (int64_t p = 0; p < stride; ++p) {
    const double wanted = scratch.target[p] - gain * (scratch.base[p] + scratch.shift[p]);
    scratch.slopes[p] = gain * edit.weights[p] * wanted;
  }
  for (int64_t j = 0; j < unknowns; ++j) right[j] = dot(edit.basis + j * stride, scratch.slopes, stride);
  for (int round = 0; round < REFINEMENTS; ++round) {  // each time the shift's error shrinks by shift / eigenvalue
    for (int64_t j = 0; j < unknowns; ++j) {
      rest[j] = right[j] - dot(edit.gram + j * leading, x, leading);
      if (edit.penalty) rest[j] -= model.penalty_scale * dot(edit.penalty + j * leading, x, leading);
    }
    substitute(factor, unknowns, leading, rest);
    solve_negative(factor, unknowns, leading, rest, 1, scratch.half);
    for (int64_t j = 0; j < unknowns; ++j) x[j] -= scratch.half[j];
  }
  model.linearise(x, scratch.lin, scratch.m, scratch.dm);
  const double data = objectives<false, false>(model, scratch.lin, scratch.m, 0.0).data;
  if (data + model.penalised(x) < initial) {  // false for NaN
    result.loss = data;
    copy(x, scratch.best_x, unknowns);
  }
  return result;
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
