// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see fit_projected_isa.h.
// One lane of a vector is one output channel: they share the operator and never meet but in the loss. A step is one
// pass over the inputs in groups that stay in the first-level cache: gradient, Adam, and the new weight's products.
// The operator's part is in fit_projected/products.h and winograd.h.
#include "fit_projected_isa.h"

#include "fit_projected/products.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

// Adam's; one minus a float32 beta would be off by 5e-5.
constexpr float beta2 = static_cast<float>(BETA2), epsilon = static_cast<float>(EPSILON);
constexpr float rest1 = static_cast<float>(1 - BETA1), rest2 = static_cast<float>(1 - BETA2);

// One block of channels.
template <int tile>
struct Descent {
  const FitProjectedProblem& problem;
  const FitProjectedScratch& scratch;
  const int64_t taps = tile ? 9 : problem.taps;
  int64_t count = 0;  // channels of this block
  Floats bend = {};   // demodulation: the gradient by the squared norm, twice
  Floats norm = {};   // and that norm, of the weight as it is

  // Channel c of this block in lane c; absent ones are zero. `columns` numbers each.
  static void gather(const float* rows, int64_t row_stride, int64_t column_stride, int64_t count, int64_t columns,
                     float* out) {
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t p = 0; p < columns; ++p) {
        out[p * width + c] = c < count ? rows[c * row_stride + p * column_stride] : 0.0f;
      }
    }
  }

  // The value of one pixel, and its derivative by the linear output times m.
  Floats value(Floats lin, Floats m, Floats shift, Floats& steep) const {
    const Floats pre = m * lin + shift;
    steep = pre > 0.0f ? fill(problem.gain) : fill(problem.gain * problem.slope);
    return opaque(steep * pre);
  }

  Floats demodulation() const { return problem.weight ? 1.0f / square_root(norm + problem.eps) : fill(1.0f); }

  // Losses and slopes at the present weight.
  double differentiate() {
    const Floats m = demodulation();
    const float share = 1.0f / (static_cast<float>(problem.channels) * static_cast<float>(problem.pixels));
    Floats loss = {}, along = {};
    for (int64_t p = 0; p < problem.pixels * width; p += width) {
      const Floats lin = load(scratch.lin + p);
      Floats steep;
      const Floats r = value(lin, m, load(scratch.shift + p), steep) - load(scratch.target + p);
      Floats slope;
      if (problem.absolute) {
        slope = r > 0.0f ? fill(share) : r < 0.0f ? fill(-share) : r * 0.0f;  // NaN stays NaN
        loss += r > 0.0f ? r : -r;
      } else {
        slope = 2.0f * share * r;
        loss += r * r;
      }
      slope *= steep;
      along += slope * lin;
      store(scratch.slopes + p, slope * m);
    }
    bend = -along * m * m * m;
    double total = 0.0;
    for (int64_t c = 0; c < count; ++c) total += loss[c];
    return total;
  }

  // Adam's update of one input's kernel, whose gradient is given; adds to the norm.
  void adam(int64_t input, Floats* gradient, const float* rates, Floats& norm_part, Floats* change) const {
    const int64_t at = input * taps * width;
    const float square = problem.weight ? problem.square[input] : 0.0f;
    const Floats pull_back = bend * square;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t k = at + t * width;
      Floats g = gradient[t];
      const Floats before = load(scratch.change + k);
      if (problem.weight && !problem.project_gradient) g += pull_back * (load(scratch.weight + k) + before);
      const Floats old_mean = load(scratch.mean + k), old_power = load(scratch.power + k);
      const Floats mean = old_mean + rest1 * (g - old_mean);
      const Floats power = beta2 * old_power + rest2 * g * g;
      const Floats after = before - rates[0] * mean * inverse_of_root(power, rates[1], epsilon);
      store(scratch.mean + k, mean);
      store(scratch.power + k, power);
      store(scratch.change + k, after);
      change[t] = after;
      if (problem.weight) {
        const Floats whole = load(scratch.weight + k) + after;
        norm_part += opaque(square * (whole * whole));
      }
    }
  }

  // The norm of the weight as it is, to the bits that a step makes of the same weight.
  void measure() {
    if (!problem.weight) return;
    norm = Floats{};
    for (int64_t first = 0; first < problem.inputs; first += GROUP) {
      Floats part = {};
      for (int64_t i = first; i < first + GROUP; ++i) {
        for (int64_t k = i * taps * width; k < (i + 1) * taps * width; k += width) {
          const Floats whole = load(scratch.weight + k) + load(scratch.change + k);
          part += opaque(problem.square[i] * (whole * whole));
        }
      }
      norm += part;
    }
  }

  // out [rank, taps] = the products of a weight [inputs, taps] with the directions, each input times its `square`.
  // `whole`: of the weight itself, not of its change.
  void project(bool whole, const float* square, float* out) const {
    for (int64_t r = 0; r < problem.rank; ++r) {
      const float* direction = problem.directions + r * problem.inputs;
      for (int64_t t = 0; t < taps; ++t) {
        Floats sum = {};
        for (int64_t i = 0; i < problem.inputs; ++i) {
          const int64_t k = (i * taps + t) * width;
          Floats weight = load(scratch.change + k);
          if (whole) weight += load(scratch.weight + k);
          sum += (square ? direction[i] * square[i] : direction[i]) * weight;
        }
        store(out + (r * taps + t) * width, sum);
      }
    }
  }

  // The kernel of one input that coefficients [rank, taps] stand for.
  void combine(const float* coefficients, int64_t input, Floats* kernel) const {
    for (int64_t t = 0; t < taps; ++t) kernel[t] = Floats{};
    for (int64_t r = 0; r < problem.rank; ++r) {
      const float scale = problem.directions[r * problem.inputs + input];
      for (int64_t t = 0; t < taps; ++t) kernel[t] += scale * load(coefficients + (r * taps + t) * width);
    }
  }

  // The gradient's products with the directions, without the gradient.
  void project_gradient() const {
    if (problem.weight) project(true, problem.square, scratch.leaning);
    for (int64_t j = 0; j < problem.rank * taps; ++j) {
      Floats sum = problem.weight ? bend * load(scratch.leaning + j * width) : Floats{};
      for (int64_t p = 0; p < problem.pixels; ++p) {
        sum += problem.basis[j * problem.pixels + p] * load(scratch.slopes + p * width);
      }
      store(scratch.gradient + j * width, sum);
    }
  }

  // change <- its projection on the directions, and what follows from it.
  void keep_projection() {
    project(false, nullptr, scratch.coefficients);
    for (int64_t i = 0; i < problem.inputs; ++i) {
      Floats kernel[MOST_TAPS];
      combine(scratch.coefficients, i, kernel);
      for (int64_t t = 0; t < taps; ++t) store(scratch.change + (i * taps + t) * width, kernel[t]);
    }
    measure();
    for (int64_t p = 0; p < problem.pixels; ++p) {
      Floats sum = load(scratch.base + p * width);
      for (int64_t j = 0; j < problem.rank * taps; ++j) {
        sum += problem.basis[j * problem.pixels + p] * load(scratch.coefficients + j * width);
      }
      store(scratch.lin + p * width, sum);
    }
  }

  void step(const Tiles& tiles, const float* rates, bool projects) {
    const int64_t products = problem.products, sums = (tile ? products : 1) * problem.slots * width;
    Floats* const group = reinterpret_cast<Floats*>(scratch.group);
    if (problem.project_gradient) {
      project_gradient();
    } else {
      tiles.gradients(scratch.slopes, scratch.turned);
    }
    for (int64_t k = 0; k < sums; k += width) store(scratch.sums + k, Floats{});
    const float* maps = problem.maps;
    Floats fresh = {};
    for (int64_t first = 0; first < problem.inputs; first += GROUP) {
      if (!problem.project_gradient) pull(problem, maps, scratch.turned, group);
      Floats part = {};
      for (int64_t i = 0; i < GROUP; ++i) {
        Floats gradient[MOST_TAPS], change[MOST_TAPS];
        Floats* const mine = group + i * products;
        if (problem.project_gradient) {
          combine(scratch.gradient, first + i, gradient);
        } else if constexpr (tile != 0) {
          transpose<tile>(mine, gradient);
        } else {
          for (int64_t t = 0; t < taps; ++t) gradient[t] = mine[t];
        }
        adam(first + i, gradient, rates, part, change);
        if constexpr (tile != 0) {
          if (!projects) transform<tile>(change, mine);
        } else {
          for (int64_t t = 0; t < taps; ++t) mine[t] = change[t];
        }
      }
      fresh += part;
      if (!projects) push(problem, maps, group, scratch.sums);
      maps += products * problem.slots * GROUP;
    }
    norm = fresh;
    if (projects) {
      keep_projection();
    } else {
      tiles.outputs(scratch.sums, scratch.base, scratch.lin);
    }
  }

  void run(int64_t block) {
    const FlushToZero flush;
    const int64_t first = block * width, pixels = problem.pixels;
    const int64_t left = problem.channels - first;
    const int64_t weights = problem.inputs * taps;
    count = left < width ? left : width;
    gather(problem.base + first * pixels, pixels, 1, count, pixels, scratch.base);
    gather(problem.target + first * pixels, pixels, 1, count, pixels, scratch.target);
    gather(problem.shift + first * problem.shift_strides[0], problem.shift_strides[0], problem.shift_strides[1], count,
           pixels, scratch.shift);
    if (problem.weight) gather(problem.weight + first * weights, weights, 1, count, weights, scratch.weight);
    for (int64_t k = 0; k < weights * width; k += width) {
      store(scratch.change + k, Floats{});
      store(scratch.mean + k, Floats{});
      store(scratch.power + k, Floats{});
    }
    measure();
    // Where the goal is the layer's own value, to the bit, it must not differ from ours by rounding: the l1 gradient
    // there would be the sign of that.
    const Floats m = demodulation();
    for (int64_t p = 0; p < pixels; ++p) {
      const Floats lin = load(scratch.base + p * width);
      store(scratch.lin + p * width, lin);
      Floats steep;
      const Floats ours = value(lin, m, load(scratch.shift + p * width), steep);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = (first + c) * pixels + p;
        if (problem.target[at] == problem.value[at]) scratch.target[p * width + c] = ours[c];
      }
    }

    const Tiles tiles(problem);
    for (int64_t t = 0; t < problem.steps; ++t) {
      problem.losses[block * problem.steps + t] = differentiate();
      const bool projects = problem.rank && (t % problem.project_every == 0 || t == problem.steps - 1);
      step(tiles, problem.rates + 2 * t, projects);
    }
    const int64_t rows = problem.rank ? problem.rank * taps : weights;
    const float* const from = problem.rank ? scratch.coefficients : scratch.change;
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t k = 0; k < rows; ++k) problem.coefficients[(first + c) * rows + k] = from[k * width + c];
    }
  }
};

void descend(const FitProjectedProblem& problem, int64_t block, const FitProjectedScratch& scratch) {
  switch (problem.tile) {
    case 2:
      return Descent<2>{problem, scratch}.run(block);
    case 4:
      return Descent<4>{problem, scratch}.run(block);
    case 5:
      return Descent<5>{problem, scratch}.run(block);
    default:
      return Descent<0>{problem, scratch}.run(block);
  }
}

}  // namespace

const FitProjectedKernels fit_projected_kernels = {width, descend};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
