// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see fit_projected_isa.h.
// One lane of a vector is one output channel: they share the operator and never meet but in the loss. A step is one
// pass over the inputs in groups that stay in the first-level cache: gradient, Adam, and the new weight's products.
#include "fit_projected_isa.h"

#include <immintrin.h>

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

#if defined(REWRITE_CORE_ISA_avx512)
constexpr int lanes = 16;
#elif defined(REWRITE_CORE_ISA_avx2)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float Vec __attribute__((vector_size(lanes * 4)));

inline Vec load(const float* a) { return *reinterpret_cast<const Vec*>(a); }
inline void store(float* a, Vec v) { *reinterpret_cast<Vec*>(a) = v; }
inline Vec fill(float a) { return Vec{} + a; }

inline Vec square_root(Vec a) {
#if defined(REWRITE_CORE_ISA_avx512)
  return _mm512_maskz_sqrt_ps(0xffff, a);  // the plain one warns in GCC 12
#elif defined(REWRITE_CORE_ISA_avx2)
  return _mm256_sqrt_ps(a);
#else
  return _mm_sqrt_ps(a);
#endif
}

// a itself, rounded: the compiler will not fuse the product that it comes from with a later sum.
inline Vec rounded(Vec a) {
#if defined(REWRITE_CORE_ISA_avx512)
  asm("" : "+v"(a));
#else
  asm("" : "+x"(a));
#endif
  return a;
}

// 1 / (sqrt(a) scale + eps) for a >= 0.
inline Vec inverse_size(Vec a, float scale) {
#if defined(REWRITE_CORE_ISA_avx512)
  // 14 bits doubled once each: a fourth of the time of a root and a division, to the last bit or two
  a = a > 1e-36f ? a : fill(1e-36f);  // its root is nothing beside eps
  const Vec y = _mm512_maskz_rsqrt14_ps(0xffff, a), rough = a * y;
  const Vec root = rough + (0.5f * y) * (a - rough * rough);
  const Vec size = root * scale + projected_eps;
  const Vec inverse = _mm512_maskz_rcp14_ps(0xffff, size);
  return inverse * (2.0f - size * inverse);
#else
  return 1.0f / (square_root(a) * scale + projected_eps);
#endif
}

// Tiny numbers count as zero while this lives: the running means of a gradient that stays zero would else decay into
// the numbers that processors are slow with.
struct FlushToZero {
  const unsigned mode = _mm_getcsr();
  FlushToZero() { _mm_setcsr(mode | 0x8040); }
  ~FlushToZero() { _mm_setcsr(mode); }
};

// Winograd's algorithm for tile x tile outputs of a 3x3 kernel: all are polynomials evaluated at tile + 2 points: 0,
// +-1, (+-2), (1/2), infinity. rewrite_core/ops/fit_projected.py holds the transform of the maps.
template <int tile>
struct Points;
template <>
struct Points<2> {
  static constexpr int pairs = 1, singles = 0;
};
template <>
struct Points<4> {
  static constexpr int pairs = 2, singles = 0;
};
template <>
struct Points<5> {
  static constexpr int pairs = 2, singles = 1;
};

// out[n * step] = the polynomial a + b x + c x^2 at the points
template <int tile>
inline void evaluate(Vec a, Vec b, Vec c, Vec* out, int step) {
  typedef Points<tile> At;
  out[0] = a;
#pragma GCC unroll 2
  for (int j = 0; j < At::pairs; ++j) {
    const float x = static_cast<float>(1 + j);
    const Vec even = a + x * x * c;
    out[(1 + 2 * j) * step] = even + x * b;
    out[(2 + 2 * j) * step] = even - x * b;
  }
  if (At::singles) out[(1 + 2 * At::pairs) * step] = a + 0.5f * b + 0.25f * c;
  out[(1 + 2 * At::pairs + At::singles) * step] = c;
}

// The transpose of `evaluate`.
template <int tile>
inline void collect(const Vec* in, int step, Vec& a, Vec& b, Vec& c) {
  typedef Points<tile> At;
  a = in[0];
  c = in[(1 + 2 * At::pairs + At::singles) * step];
  b = Vec{};
#pragma GCC unroll 2
  for (int j = 0; j < At::pairs; ++j) {
    const float x = static_cast<float>(1 + j);
    const Vec plus = in[(1 + 2 * j) * step], minus = in[(2 + 2 * j) * step];
    const Vec sum = plus + minus;
    a += sum;
    b += x * (plus - minus);
    c += x * x * sum;
  }
  if (At::singles) {
    const Vec single = in[(1 + 2 * At::pairs) * step];
    a += single;
    b += 0.5f * single;
    c += 0.25f * single;
  }
}

// A kernel [9] as its values at all pairs of points, [(tile + 2)^2]; and the transpose.
template <int tile>
inline void transform(const Vec* kernel, Vec* products) {
  constexpr int n = tile + 2;
  Vec columns[3][n];
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) evaluate<tile>(kernel[x], kernel[3 + x], kernel[6 + x], columns[x], 1);
#pragma GCC unroll 7
  for (int y = 0; y < n; ++y) evaluate<tile>(columns[0][y], columns[1][y], columns[2][y], products + y * n, 1);
}

template <int tile>
inline void transpose(const Vec* products, Vec* kernel) {
  constexpr int n = tile + 2;
  Vec columns[3][n];
#pragma GCC unroll 7
  for (int y = 0; y < n; ++y) {
    collect<tile>(products + y * n, 1, columns[0][y], columns[1][y], columns[2][y]);
  }
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) collect<tile>(columns[x], 1, kernel[x], kernel[3 + x], kernel[6 + x]);
}

// power[k][j]: the j-th point to the power k, what a tile's k-th output takes of the j-th product.
void powers(int tile, float power[5][7]) {
  const int n = tile + 2;
  const float points[] = {0.0f, 1.0f, -1.0f, tile == 2 ? 0.0f : 2.0f, -2.0f, 0.5f};
  for (int j = 0; j < n - 1; ++j) {
    float value = 1.0f;
    for (int k = 0; k < tile; ++k, value *= points[j]) power[k][j] = value;
  }
  for (int k = 0; k < tile; ++k) power[k][n - 1] = k == tile - 1 ? 1.0f : 0.0f;
}

// Output pixels from the sums of products, and the transpose.
struct Tiles {
  const ProjectedProblem& problem;
  float power[5][7];
  explicit Tiles(const ProjectedProblem& problem) : problem(problem) {
    if (problem.tile) powers(problem.tile, power);
  }

  // lin = base + A^T sums A of each tile
  void outputs(const float* sums, const float* base, float* lin) const {
    const int64_t tile = problem.tile;
    if (tile == 0) {
      for (int64_t p = 0; p < problem.pixels * lanes; p += lanes) store(lin + p, load(base + p) + load(sums + p));
      return;
    }
    const int64_t n = tile + 2, across = (problem.width + tile - 1) / tile;
    for (int64_t s = 0; s < problem.slots; ++s) {
      const int64_t top = s / across * tile, left = s % across * tile;
      Vec half[5][7];
      for (int64_t k = 0; k < tile; ++k) {
        for (int64_t x = 0; x < n; ++x) {
          Vec sum = {};
          for (int64_t y = 0; y < n; ++y) {
            sum += power[k][y] * load(sums + ((y * n + x) * problem.slots + s) * lanes);
          }
          half[k][x] = sum;
        }
      }
      for (int64_t y = 0; y < tile && top + y < problem.height; ++y) {
        for (int64_t x = 0; x < tile && left + x < problem.width; ++x) {
          const int64_t p = ((top + y) * problem.width + left + x) * lanes;
          Vec sum = load(base + p);
          for (int64_t j = 0; j < n; ++j) sum += power[x][j] * half[y][j];
          store(lin + p, sum);
        }
      }
    }
  }

  void gradients(const float* slopes, float* turned) const {
    const int64_t tile = problem.tile;
    if (tile == 0) {
      for (int64_t p = 0; p < problem.pixels * lanes; p += lanes) store(turned + p, load(slopes + p));
      return;
    }
    const int64_t n = tile + 2, across = (problem.width + tile - 1) / tile;
    for (int64_t s = 0; s < problem.slots; ++s) {
      const int64_t top = s / across * tile, left = s % across * tile;
      Vec half[5][7] = {};
      for (int64_t y = 0; y < tile && top + y < problem.height; ++y) {
        for (int64_t x = 0; x < tile && left + x < problem.width; ++x) {
          const Vec slope = load(slopes + ((top + y) * problem.width + left + x) * lanes);
          for (int64_t j = 0; j < n; ++j) half[y][j] += power[x][j] * slope;
        }
      }
      for (int64_t y = 0; y < n; ++y) {
        for (int64_t x = 0; x < n; ++x) {
          Vec sum = {};
          for (int64_t k = 0; k < tile; ++k) sum += power[k][y] * half[k][x];
          store(turned + ((y * n + x) * problem.slots + s) * lanes, sum);
        }
      }
    }
  }
};

// group[i][q] = sum_s maps[q][s][i] turned[q][s] for the inputs i of one group
void pull(const ProjectedProblem& problem, const float* maps, const float* turned, Vec* group) {
  const int64_t slots = problem.slots, products = problem.products;
  const int64_t step = problem.tile ? slots * lanes : 0;
  for (int64_t q = 0; q < products; ++q, maps += slots * projected_group, turned += step) {
    Vec sum[projected_group] = {};
    for (int64_t s = 0; s < slots; ++s) {
      const Vec slope = load(turned + s * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < projected_group; ++i) sum[i] += maps[s * projected_group + i] * slope;
    }
#pragma GCC unroll 8
    for (int i = 0; i < projected_group; ++i) group[i * products + q] = sum[i];
  }
}

// sums[q][s] += sum_i maps[q][s][i] group[i][q]
template <int block>
inline void push_slots(const float* maps, const Vec* weights, float* sums) {
  Vec sum[block];
#pragma GCC unroll 8
  for (int s = 0; s < block; ++s) sum[s] = load(sums + s * lanes);
#pragma GCC unroll 8
  for (int i = 0; i < projected_group; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < block; ++s) sum[s] += maps[s * projected_group + i] * weights[i];
  }
#pragma GCC unroll 8
  for (int s = 0; s < block; ++s) store(sums + s * lanes, sum[s]);
}

void push(const ProjectedProblem& problem, const float* maps, const Vec* group, float* sums) {
  const int64_t slots = problem.slots, products = problem.products;
  const int64_t step = problem.tile ? slots * lanes : 0;
  for (int64_t q = 0; q < products; ++q, maps += slots * projected_group, sums += step) {
    Vec weights[projected_group];
#pragma GCC unroll 8
    for (int i = 0; i < projected_group; ++i) weights[i] = group[i * products + q];
    int64_t s = 0;
    for (; s + 8 <= slots; s += 8) push_slots<8>(maps + s * projected_group, weights, sums + s * lanes);
    if (slots - s >= 4) {
      push_slots<4>(maps + s * projected_group, weights, sums + s * lanes);
      s += 4;
    }
    for (; s < slots; ++s) push_slots<1>(maps + s * projected_group, weights, sums + s * lanes);
  }
}

// One block of channels.
template <int tile>
struct Descent {
  const ProjectedProblem& problem;
  const ProjectedScratch& scratch;
  const int64_t taps = tile ? 9 : problem.taps;
  int64_t count = 0;  // channels of this block
  Vec bend = {};      // demodulation: the gradient by the squared norm, twice
  Vec norm = {};      // and that norm, of the weight as it is

  // Channel c of this block in lane c; absent ones are zero. `columns` numbers each.
  static void gather(const float* rows, int64_t row_stride, int64_t column_stride, int64_t count, int64_t columns,
                     float* out) {
    for (int64_t c = 0; c < lanes; ++c) {
      for (int64_t p = 0; p < columns; ++p) {
        out[p * lanes + c] = c < count ? rows[c * row_stride + p * column_stride] : 0.0f;
      }
    }
  }

  // The value of one pixel, and its derivative by the linear output times m.
  Vec value(Vec lin, Vec m, Vec shift, Vec& steep) const {
    const Vec pre = m * lin + shift;
    steep = pre > 0.0f ? fill(problem.gain) : fill(problem.gain * problem.slope);
    return rounded(steep * pre);
  }

  Vec demodulation() const { return problem.weight ? 1.0f / square_root(norm + problem.eps) : fill(1.0f); }

  // Losses and slopes at the present weight.
  double differentiate() {
    const Vec m = demodulation();
    const float share = 1.0f / (static_cast<float>(problem.channels) * static_cast<float>(problem.pixels));
    Vec loss = {}, along = {};
    for (int64_t p = 0; p < problem.pixels * lanes; p += lanes) {
      const Vec lin = load(scratch.lin + p);
      Vec steep;
      const Vec r = value(lin, m, load(scratch.shift + p), steep) - load(scratch.target + p);
      Vec slope;
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
  void adam(int64_t input, Vec* gradient, const float* rates, Vec& norm_part, Vec* change) const {
    const int64_t at = input * taps * lanes;
    const float square = problem.weight ? problem.square[input] : 0.0f;
    const Vec pull_back = bend * square;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t k = at + t * lanes;
      Vec g = gradient[t];
      const Vec before = load(scratch.change + k);
      if (problem.weight && !problem.project_gradient) g += pull_back * (load(scratch.weight + k) + before);
      const Vec old_mean = load(scratch.mean + k), old_power = load(scratch.power + k);
      const Vec mean = old_mean + projected_rest1 * (g - old_mean);
      const Vec power = projected_beta2 * old_power + projected_rest2 * g * g;
      const Vec after = before - rates[0] * mean * inverse_size(power, rates[1]);
      store(scratch.mean + k, mean);
      store(scratch.power + k, power);
      store(scratch.change + k, after);
      change[t] = after;
      if (problem.weight) {
        const Vec whole = load(scratch.weight + k) + after;
        norm_part += rounded(square * (whole * whole));
      }
    }
  }

  // The norm of the weight as it is, to the bits that a step makes of the same weight.
  void measure() {
    if (!problem.weight) return;
    norm = Vec{};
    for (int64_t first = 0; first < problem.inputs; first += projected_group) {
      Vec part = {};
      for (int64_t i = first; i < first + projected_group; ++i) {
        for (int64_t k = i * taps * lanes; k < (i + 1) * taps * lanes; k += lanes) {
          const Vec whole = load(scratch.weight + k) + load(scratch.change + k);
          part += rounded(problem.square[i] * (whole * whole));
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
        Vec sum = {};
        for (int64_t i = 0; i < problem.inputs; ++i) {
          const int64_t k = (i * taps + t) * lanes;
          Vec weight = load(scratch.change + k);
          if (whole) weight += load(scratch.weight + k);
          sum += (square ? direction[i] * square[i] : direction[i]) * weight;
        }
        store(out + (r * taps + t) * lanes, sum);
      }
    }
  }

  // The kernel of one input that coefficients [rank, taps] stand for.
  void combine(const float* coefficients, int64_t input, Vec* kernel) const {
    for (int64_t t = 0; t < taps; ++t) kernel[t] = Vec{};
    for (int64_t r = 0; r < problem.rank; ++r) {
      const float scale = problem.directions[r * problem.inputs + input];
      for (int64_t t = 0; t < taps; ++t) kernel[t] += scale * load(coefficients + (r * taps + t) * lanes);
    }
  }

  // The gradient's products with the directions, without the gradient.
  void project_gradient() const {
    if (problem.weight) project(true, problem.square, scratch.leaning);
    for (int64_t j = 0; j < problem.rank * taps; ++j) {
      Vec sum = problem.weight ? bend * load(scratch.leaning + j * lanes) : Vec{};
      for (int64_t p = 0; p < problem.pixels; ++p) {
        sum += problem.basis[j * problem.pixels + p] * load(scratch.slopes + p * lanes);
      }
      store(scratch.gradient + j * lanes, sum);
    }
  }

  // change <- its projection on the directions, and what follows from it.
  void keep_projection() {
    project(false, nullptr, scratch.coefficients);
    for (int64_t i = 0; i < problem.inputs; ++i) {
      Vec kernel[projected_taps];
      combine(scratch.coefficients, i, kernel);
      for (int64_t t = 0; t < taps; ++t) store(scratch.change + (i * taps + t) * lanes, kernel[t]);
    }
    measure();
    for (int64_t p = 0; p < problem.pixels; ++p) {
      Vec sum = load(scratch.base + p * lanes);
      for (int64_t j = 0; j < problem.rank * taps; ++j) {
        sum += problem.basis[j * problem.pixels + p] * load(scratch.coefficients + j * lanes);
      }
      store(scratch.lin + p * lanes, sum);
    }
  }

  void step(const Tiles& tiles, const float* rates, bool projects) {
    const int64_t products = problem.products, sums = (tile ? products : 1) * problem.slots * lanes;
    Vec* const group = reinterpret_cast<Vec*>(scratch.group);
    if (problem.project_gradient) {
      project_gradient();
    } else {
      tiles.gradients(scratch.slopes, scratch.turned);
    }
    for (int64_t k = 0; k < sums; k += lanes) store(scratch.sums + k, Vec{});
    const float* maps = problem.maps;
    Vec fresh = {};
    for (int64_t first = 0; first < problem.inputs; first += projected_group) {
      if (!problem.project_gradient) pull(problem, maps, scratch.turned, group);
      Vec part = {};
      for (int64_t i = 0; i < projected_group; ++i) {
        Vec gradient[projected_taps], change[projected_taps];
        Vec* const mine = group + i * products;
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
      maps += products * problem.slots * projected_group;
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
    const int64_t first = block * lanes, pixels = problem.pixels;
    const int64_t left = problem.channels - first;
    const int64_t weights = problem.inputs * taps;
    count = left < lanes ? left : lanes;
    gather(problem.base + first * pixels, pixels, 1, count, pixels, scratch.base);
    gather(problem.target + first * pixels, pixels, 1, count, pixels, scratch.target);
    gather(problem.shift + first * problem.shift_strides[0], problem.shift_strides[0], problem.shift_strides[1], count,
           pixels, scratch.shift);
    if (problem.weight) gather(problem.weight + first * weights, weights, 1, count, weights, scratch.weight);
    for (int64_t k = 0; k < weights * lanes; k += lanes) {
      store(scratch.change + k, Vec{});
      store(scratch.mean + k, Vec{});
      store(scratch.power + k, Vec{});
    }
    measure();
    // Where the goal is the layer's own value, to the bit, it must not differ from ours by rounding: the l1 gradient
    // there would be the sign of that.
    const Vec m = demodulation();
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec lin = load(scratch.base + p * lanes);
      store(scratch.lin + p * lanes, lin);
      Vec steep;
      const Vec ours = value(lin, m, load(scratch.shift + p * lanes), steep);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = (first + c) * pixels + p;
        if (problem.target[at] == problem.value[at]) scratch.target[p * lanes + c] = ours[c];
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
      for (int64_t k = 0; k < rows; ++k) problem.coefficients[(first + c) * rows + k] = from[k * lanes + c];
    }
  }
};

void descend(const ProjectedProblem& problem, int64_t block, const ProjectedScratch& scratch) {
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

const ProjectedKernel projected_kernel = {lanes, descend};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
