// The model: value, residual and derivatives of one channel; float64, unknowns scaled.
#pragma once

#include "../fit_low_rank_isa.h"
#include "arrays.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

using namespace fit_low_rank_constants;

constexpr int64_t symmetric_from = 32;  // unknowns: below, rows are too short for it to pay

struct Model {
  const FitLowRankProblem& problem;
  const FitLowRankEdit& edit;
  const FitLowRankScratch& scratch;
  int64_t channel;
  double penalty_scale = 0.0;

  int64_t place(int64_t style) const { return (edit.number * problem.styles + style) * problem.channels + channel; }

  // lin [pixels]; m [styles]; dm [styles, unknowns], nothing without demodulation. Returns x^T quadratic x over its
  // largest allowed value, of the style where that is most; 0 without demodulation.
  double linearise(const double* x, double* lin, double* m, double* dm) const {
    const int64_t unknowns = problem.unknowns, stride = edit.stride;
    int64_t p = 0;
    for (; p + 4 * width <= stride; p += 4 * width) {
      const double* at = scratch.base + p;
      Wide a = load(at), b = load(at + width), c = load(at + 2 * width), d = load(at + 3 * width);
      for (int64_t j = 0; j < unknowns; ++j) {
        const double* row = edit.basis + j * stride + p;
        a += x[j] * load(row);
        b += x[j] * load(row + width);
        c += x[j] * load(row + 2 * width);
        d += x[j] * load(row + 3 * width);
      }
      store(lin + p, a);
      store(lin + p + width, b);
      store(lin + p + 2 * width, c);
      store(lin + p + 3 * width, d);
    }
    for (; p < stride; p += width) {
      Wide a = load(scratch.base + p);
      for (int64_t j = 0; j < unknowns; ++j) a += x[j] * load(edit.basis + j * stride + p);
      store(lin + p, a);
    }
    if (!problem.constant) {
      m[0] = 1.0;
      return 0.0;
    }
    double reach = 0.0;
    for (int64_t style = 0; style < problem.styles; ++style, dm += edit.leading) {
      const double constant = problem.constant[place(style)];
      const double* linear = problem.linear + place(style) * unknowns;
      double square = constant, own = 0.0;
      const double* const quadratic = edit.quadratic + style * unknowns * edit.leading;
      (unknowns < symmetric_from ? multiply : multiply_symmetric)(quadratic, edit.leading, unknowns, x, dm);
      for (int64_t j = 0; j < unknowns; ++j) {
        const double slant = linear[j] / edit.size[j];
        own += x[j] * dm[j];
        dm[j] += slant;  // half the gradient of the squared norm
        square += (slant + dm[j]) * x[j];
      }
      m[style] = 1.0 / square_root(square);  // NaN or infinite where not positive: rejected
      const double factor = -m[style] * m[style] * m[style];
      for (int64_t j = 0; j < unknowns; ++j) dm[j] *= factor;
      own /= REACH * REACH * constant;
      if (own > reach) reach = own;
    }
    return reach;
  }

  double penalised(const double* x) const {
    if (!edit.penalty) return 0.0;
    double sum = 0.0;
    for (int64_t j = 0; j < problem.unknowns; ++j) {
      sum += x[j] * dot(edit.penalty + j * edit.leading, x, edit.leading);
    }
    return penalty_scale * sum;
  }
};

struct Objectives {
  double smooth;  // with the rounded kink and, for l1, the rounded absolute value
  double data;    // the loss itself
};

template <bool absolute, bool rounded>
Objectives objectives(const Model& model, const double* lin, const double* m, double smoothing) {
  const FitLowRankScratch& scratch = model.scratch;
  const double slope = model.problem.slope, gain = model.problem.gain;
  const double kink = rounded ? KINK / magnitude(gain) * smoothing : 0.0;
  const double up = 0.5 * gain * (1.0 + slope), down = 0.5 * gain * (1.0 - slope);
  Wide smooth = {}, data = {};
  for (int64_t style = 0; style < model.problem.styles; ++style) {
    const double by = m[style];
    for (int64_t p = model.edit.starts[style]; p < model.edit.starts[style + 1]; p += width) {
      const Wide pre = by * load(lin + p) + load(scratch.shift + p);
      const Wide target = load(scratch.target + p), weight = load(model.edit.weights + p);
      Wide sharp, r;
      if (rounded) {
        const Wide steep = pre > 0.0 ? fill(gain) : fill(gain * slope);
        sharp = steep * pre - target;
        const Wide square = pre * pre + kink * kink;
        r = up * pre + down * (square * inverse_root(square)) - target;
      } else {
        r = sharp = gain * pre - target;
      }
      if (absolute) {
        const Wide square = r * r + smoothing * smoothing;
        smooth += weight * (square * inverse_root(square));
        data += weight * magnitude(sharp);
      } else {
        smooth += weight * (r * r);
        data += weight * (sharp * sharp);
      }
    }
  }
  return {total(smooth), total(data)};
}

// At the current point: r, inverse (1 / eta), steep, slopes, curvature. Returns the smooth objective.
template <bool absolute, bool rounded>
double derive(const Model& model, const double* lin, const double* m, double smoothing) {
  const FitLowRankScratch& scratch = model.scratch;
  const double slope = model.problem.slope, gain = model.problem.gain;
  const double kink = rounded ? KINK / magnitude(gain) * smoothing : 0.0;
  const double up = 0.5 * gain * (1.0 + slope), down = 0.5 * gain * (1.0 - slope);
  Wide smooth = {};
  for (int64_t style = 0; style < model.problem.styles; ++style) {
    const double by = m[style];
    for (int64_t p = model.edit.starts[style]; p < model.edit.starts[style + 1]; p += width) {
      const Wide pre = by * load(lin + p) + load(scratch.shift + p);
      const Wide target = load(scratch.target + p), weight = load(model.edit.weights + p);
      Wide r, steep, bend = {};
      if (rounded) {
        const Wide square = pre * pre + kink * kink, flat = inverse_root(square);
        const Wide sine = pre * flat;
        r = up * pre + down * (square * flat) - target;
        steep = up + down * sine;
        bend = (down * kink * kink) * (flat * flat * flat);
      } else {
        r = gain * pre - target;
        steep = fill(gain);
      }
      Wide slopes, curvature;
      if (absolute) {
        const Wide square = r * r + smoothing * smoothing, inverse = inverse_root(square);
        const Wide ratio = r * inverse;
        smooth += weight * (square * inverse);
        slopes = weight * ratio;
        curvature = weight * (1.0 - load(scratch.dual + p) * ratio) * inverse;
        store(scratch.inverse + p, inverse);
      } else {
        smooth += weight * (r * r);
        slopes = 2.0 * weight * r;
        curvature = 2.0 * weight;
      }
      curvature *= steep * steep;
      if (rounded) {  // the kink bends the value: the half of its curvature that is convex
        const Wide more = slopes * bend;
        curvature += more > 0.0 ? more : Wide{};
      }
      store(scratch.r + p, r);
      store(scratch.steep + p, steep);
      store(scratch.slopes + p, slopes * steep);
      store(scratch.curvature + p, curvature);
    }
  }
  return total(smooth);
}

// The running estimate of r / eta moves with the step that was taken.
void follow(const Model& model, const double* lin, const double* new_lin, const double* m, const double* dm) {
  const FitLowRankScratch& scratch = model.scratch;
  for (int64_t style = 0; style < model.problem.styles; ++style) {
    const int64_t leading = model.edit.leading;
    const double by = m[style], turn = model.problem.constant ? dot(dm + style * leading, scratch.step, leading) : 0.0;
    for (int64_t p = model.edit.starts[style]; p < model.edit.starts[style + 1]; p += width) {
      const Wide old = load(lin + p), r = load(scratch.r + p), inverse = load(scratch.inverse + p);
      const Wide change = (by * (load(new_lin + p) - old) + turn * old) * load(scratch.steep + p);
      Wide dual = load(scratch.dual + p);
      dual = (r + change - dual * (r * inverse) * change) * inverse;
      dual = dual > 1.0 ? fill(1.0) : dual;
      store(scratch.dual + p, dual < -1.0 ? fill(-1.0) : dual);
    }
  }
}
}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
