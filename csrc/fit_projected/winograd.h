// Winograd's algorithm: 3x3 kernels as products, sums of products as output pixels, and both transposed.
#pragma once

#include "../fit_projected_isa.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

using namespace fit_projected_constants;

typedef Vec<float> Floats;
constexpr int width = lanes<float>;

// Winograd's algorithm for tile x tile outputs of a 3x3 kernel: all are polynomials evaluated at tile + 2 points: 0,
// +-1, (+-2), (1/2), infinity. rewrite_core/ops/fit_projected_op/winograd.py holds the transform of the maps.
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
inline void evaluate(Floats a, Floats b, Floats c, Floats* out, int step) {
  typedef Points<tile> At;
  out[0] = a;
#pragma GCC unroll 2
  for (int j = 0; j < At::pairs; ++j) {
    const float x = static_cast<float>(1 + j);
    const Floats even = a + x * x * c;
    out[(1 + 2 * j) * step] = even + x * b;
    out[(2 + 2 * j) * step] = even - x * b;
  }
  if (At::singles) out[(1 + 2 * At::pairs) * step] = a + 0.5f * b + 0.25f * c;
  out[(1 + 2 * At::pairs + At::singles) * step] = c;
}

// The transpose of `evaluate`.
template <int tile>
inline void collect(const Floats* in, int step, Floats& a, Floats& b, Floats& c) {
  typedef Points<tile> At;
  a = in[0];
  c = in[(1 + 2 * At::pairs + At::singles) * step];
  b = Floats{};
#pragma GCC unroll 2
  for (int j = 0; j < At::pairs; ++j) {
    const float x = static_cast<float>(1 + j);
    const Floats plus = in[(1 + 2 * j) * step], minus = in[(2 + 2 * j) * step];
    const Floats sum = plus + minus;
    a += sum;
    b += x * (plus - minus);
    c += x * x * sum;
  }
  if (At::singles) {
    const Floats single = in[(1 + 2 * At::pairs) * step];
    a += single;
    b += 0.5f * single;
    c += 0.25f * single;
  }
}

// A kernel [9] as its values at all pairs of points, [(tile + 2)^2]; and the transpose.
template <int tile>
inline void transform(const Floats* kernel, Floats* products) {
  constexpr int n = tile + 2;
  Floats columns[3][n];
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) evaluate<tile>(kernel[x], kernel[3 + x], kernel[6 + x], columns[x], 1);
#pragma GCC unroll 7
  for (int y = 0; y < n; ++y) evaluate<tile>(columns[0][y], columns[1][y], columns[2][y], products + y * n, 1);
}

template <int tile>
inline void transpose(const Floats* products, Floats* kernel) {
  constexpr int n = tile + 2;
  Floats columns[3][n];
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
  const FitProjectedProblem& problem;
  float power[5][7];
  explicit Tiles(const FitProjectedProblem& problem) : problem(problem) {
    if (problem.tile) powers(problem.tile, power);
  }

  // lin = base + A^T sums A of each tile
  void outputs(const float* sums, const float* base, float* lin) const {
    const int64_t tile = problem.tile;
    if (tile == 0) {
      for (int64_t p = 0; p < problem.pixels * width; p += width) store(lin + p, load(base + p) + load(sums + p));
      return;
    }
    const int64_t n = tile + 2, across = (problem.width + tile - 1) / tile;
    for (int64_t s = 0; s < problem.slots; ++s) {
      const int64_t top = s / across * tile, left = s % across * tile;
      Floats half[5][7];
      for (int64_t k = 0; k < tile; ++k) {
        for (int64_t x = 0; x < n; ++x) {
          Floats sum = {};
          for (int64_t y = 0; y < n; ++y) {
            sum += power[k][y] * load(sums + ((y * n + x) * problem.slots + s) * width);
          }
          half[k][x] = sum;
        }
      }
      for (int64_t y = 0; y < tile && top + y < problem.height; ++y) {
        for (int64_t x = 0; x < tile && left + x < problem.width; ++x) {
          const int64_t p = ((top + y) * problem.width + left + x) * width;
          Floats sum = load(base + p);
          for (int64_t j = 0; j < n; ++j) sum += power[x][j] * half[y][j];
          store(lin + p, sum);
        }
      }
    }
  }

  void gradients(const float* slopes, float* turned) const {
    const int64_t tile = problem.tile;
    if (tile == 0) {
      for (int64_t p = 0; p < problem.pixels * width; p += width) store(turned + p, load(slopes + p));
      return;
    }
    const int64_t n = tile + 2, across = (problem.width + tile - 1) / tile;
    for (int64_t s = 0; s < problem.slots; ++s) {
      const int64_t top = s / across * tile, left = s % across * tile;
      Floats half[5][7] = {};
      for (int64_t y = 0; y < tile && top + y < problem.height; ++y) {
        for (int64_t x = 0; x < tile && left + x < problem.width; ++x) {
          const Floats slope = load(slopes + ((top + y) * problem.width + left + x) * width);
          for (int64_t j = 0; j < n; ++j) half[y][j] += power[x][j] * slope;
        }
      }
      for (int64_t y = 0; y < n; ++y) {
        for (int64_t x = 0; x < n; ++x) {
          Floats sum = {};
          for (int64_t k = 0; k < tile; ++k) sum += power[k][y] * half[k][x];
          store(turned + ((y * n + x) * problem.slots + s) * width, sum);
        }
      }
    }
  }
};

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
