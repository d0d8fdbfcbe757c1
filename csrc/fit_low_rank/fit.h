// Levenberg-Marquardt on one channel.
#pragma once

#include "linear_system.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

struct Outcome {
  double loss, initial;
  int32_t iterations, status;
};

// The fit of a channel as it goes; the result is in scratch.best_x.
template <bool absolute, bool rounded>
struct Fit {
  const Model& model;
  const FitLowRankProblem& problem = model.problem;
  const FitLowRankEdit& edit = model.edit;
  const FitLowRankScratch& scratch = model.scratch;
  // the present point, and the trial one: they change places when it is taken
  double *x = scratch.x, *lin = scratch.lin, *m = scratch.m, *dm = scratch.dm;
  double *new_x = scratch.new_x, *new_lin = scratch.new_lin, *new_m = scratch.new_m, *new_dm = scratch.new_dm;

  Outcome result = {};
  double scale = 0.0;  // the typical residual
  double smoothing = 0.0, smoothing_end = 0.0;
  double damping = DAMPING_START, growth = DAMPING_UP;
  double best = 0.0, best_reach = 0.0;  // the true objective of the best point, and its reach
  double now = 0.0, mean = 0.0;         // the objective and the mean curvature at the present point
  double after = 0.0, predicted = 0.0;  // the objective at the trial point, and the decrease that was predicted
  bool good = false, taken = false;     // the step exists; it was taken
  bool stalled = false, small = false, well = false;

  Point point() const { return {x, lin, m, dm}; }

  // The first point; false where there is nothing to fit.
  bool begin() {
    const int64_t stride = edit.stride, leading = edit.leading;
    double* const over_unknowns[] = {x, new_x, scratch.best_x, scratch.step, scratch.gradient};
    for (double* vector : over_unknowns) clear(vector, leading);
    clear(dm, problem.styles * leading);
    clear(new_dm, problem.styles * leading);
    clear(scratch.dual, stride);
    model.linearise(x, lin, m, dm);
    double level = 0.0;
    for (int64_t p = 0; p < stride; ++p) level += edit.weights[p] * magnitude(scratch.target[p]);
    const double initial = objectives<absolute, rounded>(model, lin, m, 0.0).data;
    result = {initial, initial, 0, MAX_ITERATIONS};
    best = initial;
    scale = absolute ? initial : square_root(initial);
    smoothing_end = SMOOTHING_END * scale;
    smoothing = absolute || rounded ? scale : smoothing_end;
    const bool negligible = !(scale > NEGLIGIBLE * level);
    if (!finite(initial) || !finite(level)) {
      result.status = NONFINITE;
    } else if (edit.pixels > 0 && negligible) {
      result.status = ZERO_RESIDUAL;
    } else if (edit.pixels == 0 || problem.gain == 0.0) {
      result.status = DEGENERATE;
    }
    return result.status == MAX_ITERATIONS;
  }

  // Matrix and gradient at the present point; false where the fit ends here.
  bool derive_point() {
    now = derive<absolute, rounded>(model, lin, m, smoothing) + model.penalised(x);
    mean = assemble(model, point());
    if (!finite(mean) || !finite(now)) {
      result.status = NONFINITE;
      return false;
    }
    if (mean == 0.0) {  // nothing bends: no coefficient matters here
      result.status = result.iterations == 0 ? DEGENERATE : CONVERGED;
      return false;
    }
    return true;
  }

  // A damped step, shortened to where W0 still counts, and its objective.
  void try_step() {
    const int64_t unknowns = problem.unknowns;
    const double mu = damping * mean;
    good = damped_step(model, point(), mu);
    taken = false;
    after = predicted = 0.0;
    if (!good) return;
    double along = 0.0, square = 0.0;
    for (int64_t j = 0; j < unknowns; ++j) {
      along += scratch.gradient[j] * scratch.step[j];
      square += scratch.step[j] * scratch.step[j];
      new_x[j] = x[j] + scratch.step[j];
    }
    predicted = 0.5 * (mu * square - along);
    double reach = model.linearise(new_x, new_lin, new_m, new_dm);
    if (reach > 1.0) {
      const double shorten = 1.0 / square_root(reach);
      for (int64_t j = 0; j < unknowns; ++j) {
        new_x[j] *= shorten;
        scratch.step[j] = new_x[j] - x[j];
      }
      reach = model.linearise(new_x, new_lin, new_m, new_dm);
    }
    const Objectives trial = objectives<absolute, rounded>(model, new_lin, new_m, smoothing);
    const double extra = model.penalised(new_x);
    after = trial.smooth + extra;
    taken = after < now;  // false for NaN
    if (taken && trial.data + extra < best) {
      best = trial.data + extra;
      best_reach = reach;
      result.loss = trial.data;
      copy(new_x, scratch.best_x, unknowns);
    }
  }

  // Takes the step or not, and sets the damping of the next.
  void judge_step() {
    stalled = small = well = false;
    if (taken) {
      const double drop = now - after, quality = drop / predicted;
      if (absolute) follow(model, lin, new_lin, m, dm);
      exchange(x, new_x);
      exchange(lin, new_lin);
      exchange(dm, new_dm);
      exchange(m, new_m);
      well = quality > GOOD;
      damping *= well ? DAMPING_DOWN : quality > POOR ? 1.0 : 2.0;
      growth = DAMPING_UP;
      const double exact = EXACT * scale;
      small = drop <= problem.tolerance * now || (!absolute && after <= exact * exact);
    } else {
      stalled = damping > DAMPING_STALL || (good && predicted <= STATIONARY * now);
      damping = stalled ? DAMPING_START : damping * growth;
      growth *= 2.0;
    }
    if (damping < DAMPING_MIN) damping = DAMPING_MIN;
  }

  void shrink_smoothing() {
    const bool slow = smoothing > SMOOTHING_SLOW * scale;
    smoothing *=
        slow ? (well ? problem.slow_rate_well : problem.slow_rate) : (well ? problem.fast_rate_well : SMOOTHING_RATE);
    if (smoothing < smoothing_end) smoothing = smoothing_end;
  }

  Outcome run() {
    if (!begin()) return result;
    bool moved = true;
    while (result.iterations < problem.max_iterations) {
      if (moved && !derive_point()) break;
      ++result.iterations;
      try_step();
      const bool at_end = smoothing <= smoothing_end;
      judge_step();
      if (at_end && (small || stalled)) {
        result.status = CONVERGED;
        break;
      }
      moved = taken || stalled;
      if (moved) shrink_smoothing();
    }
    if (result.status != NONFINITE && best_reach > REACHED) result.status = BOUNDED;
    return result;
  }
};

Outcome fit_channel(const Model& model) {
  const bool rounded = model.problem.slope != 1.0;
  if (model.problem.absolute) return rounded ? Fit<true, true>{model}.run() : Fit<true, false>{model}.run();
  return rounded ? Fit<false, true>{model}.run() : Fit<false, false>{model}.run();
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
