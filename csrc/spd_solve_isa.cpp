// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see spd_solve_isa.h.
#include "spd_solve_isa.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

typedef Vec<double> Wide;
typedef Vector<double>::unaligned Unaligned;
constexpr int width = lanes<double>;

// A tile fills the register file: rows x panels vectors of sums, `panels` of columns, one broadcast.
constexpr int most_rows = registers >= 32 ? 8 : 4;
constexpr int tile_rows = width < most_rows ? width : most_rows;
constexpr int tile_panels = (registers - 1) / (tile_rows + 1) < 4 ? (registers - 1) / (tile_rows + 1) : 4;

int factor_block(double* block, int64_t stride, int size, double* column) {
  for (int j = 0; j < size; ++j) {
    const double pivot = block[j * stride + j];
    if (!(pivot > 0.0)) return j + 1;  // also for NaN
    const double root = __builtin_sqrt(pivot);
    block[j * stride + j] = root;
    for (int i = j + 1; i < size; ++i) column[i] = block[i * stride + j] /= root;
    for (int i = j + 1; i < size; ++i) {
      double* row = block + i * stride;
      const double scale = column[i];
      for (int k = j + 1; k <= i; ++k) row[k] -= scale * column[k];
    }
  }
  return 0;
}

void pack(const double* from, int64_t stride, int count, int size, double* packed) {
  for (int k = 0; k < size; ++k) {
    for (int row = 0; row < count; ++row) packed[k * width + row] = from[row * stride + k];
    for (int row = count; row < width; ++row) packed[k * width + row] = 0.0;
  }
}

template <int panels>
void tile_of(const double* row, const double* columns, int64_t panel_stride, int size, double* sums) {
  Wide sum[tile_rows][panels] = {};
  for (int k = 0; k < size; ++k) {
    Wide column[panels];
#pragma GCC unroll 4
    for (int j = 0; j < panels; ++j) column[j] = *reinterpret_cast<const Wide*>(columns + j * panel_stride + k * width);
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
      const double scale = row[k * width + i];
#pragma GCC unroll 4
      for (int j = 0; j < panels; ++j) sum[i][j] += scale * column[j];
    }
  }
  const double* flat = reinterpret_cast<const double*>(sum);
  for (int i = 0; i < tile_rows * panels * width; ++i) sums[i] += flat[i];
}

void tile(const double* row, const double* columns, int64_t panel_stride, int panel_count, int size, double* sums) {
  if (panel_count == 1) return tile_of<1>(row, columns, panel_stride, size, sums);
  if (panel_count == 2) return tile_of<2>(row, columns, panel_stride, size, sums);
  if (panel_count == 3) return tile_of<3>(row, columns, panel_stride, size, sums);
  return tile_of<tile_panels>(row, columns, panel_stride, size, sums);
}

void solve_panel(double* packed, const double* transposed, int size) {
  Wide* x = reinterpret_cast<Wide*>(packed);
  for (int j = 0; j < size; j += 4) {
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < i; ++k) x[j + i] -= transposed[(j + k) * size + j + i] * x[j + k];
      x[j + i] /= transposed[(j + i) * size + j + i];
    }
    const Wide x0 = x[j], x1 = x[j + 1], x2 = x[j + 2], x3 = x[j + 3];
    const double* row = transposed + j * size;
    for (int k = j + 4; k < size; ++k) {
      x[k] = x[k] - row[k] * x0 - row[size + k] * x1 - row[2 * size + k] * x2 - row[3 * size + k] * x3;
    }
  }
}

inline double sum_lanes(Wide v) {
  double sum = 0;
  for (int lane = 0; lane < width; ++lane) sum += v[lane];
  return sum;
}

// Four rows of L at a time: every load of x serves four products, and four chains of sums run side by side.
template <int rows>
void solve_of(const double* lower, int64_t n, double* x) {
  const int64_t whole = n & ~int64_t{3};
  for (int64_t i = 0; i < whole; i += 4) {  // forward: dot products with the rows of L
    const double* row = lower + i * n;
    Wide sum[4][rows] = {};
    const int64_t vectors = i - i % width;
    for (int64_t k = 0; k < vectors; k += width) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Wide value = *reinterpret_cast<const Unaligned*>(x + r * n + k);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sum[q][r] += value * *reinterpret_cast<const Unaligned*>(row + q * n + k);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        double rest = x[r * n + i + q] - sum_lanes(sum[q][r]);
        for (int64_t k = vectors; k < i + q; ++k) rest -= row[q * n + k] * x[r * n + k];
        x[r * n + i + q] = rest / row[q * n + i + q];
      }
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    for (int r = 0; r < rows; ++r) {
      double rest = x[r * n + i];
      for (int64_t k = 0; k < i; ++k) rest -= lower[i * n + k] * x[r * n + k];
      x[r * n + i] = rest / lower[i * n + i];
    }
  }

  for (int64_t i = n - 1; i >= whole; --i) {  // backward: multiples of the same rows
    for (int r = 0; r < rows; ++r) {
      const double value = x[r * n + i] /= lower[i * n + i];
      for (int64_t k = 0; k < i; ++k) x[r * n + k] -= value * lower[i * n + k];
    }
  }
  for (int64_t i = whole - 4; i >= 0; i -= 4) {
    const double* row = lower + i * n;
    double value[4][rows];
    for (int r = 0; r < rows; ++r) {
      for (int q = 3; q >= 0; --q) {
        value[q][r] = x[r * n + i + q] /= row[q * n + i + q];
        for (int k = 0; k < q; ++k) x[r * n + i + k] -= value[q][r] * row[q * n + i + k];
      }
    }
    int64_t k = 0;
    for (; k + width <= i; k += width) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        Wide rest = *reinterpret_cast<const Unaligned*>(x + r * n + k);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) rest -= value[q][r] * *reinterpret_cast<const Unaligned*>(row + q * n + k);
        *reinterpret_cast<Unaligned*>(x + r * n + k) = rest;
      }
    }
    for (; k < i; ++k) {
      for (int r = 0; r < rows; ++r) {
        for (int q = 0; q < 4; ++q) x[r * n + k] -= value[q][r] * row[q * n + k];
      }
    }
  }
}

void solve(const double* lower, int64_t n, double* x, int rows) {
  if (rows == 1) return solve_of<1>(lower, n, x);
  if (rows == 2) return solve_of<2>(lower, n, x);
  if (rows == 3) return solve_of<3>(lower, n, x);
  return solve_of<solve_rows>(lower, n, x);
}

}  // namespace

const SPDSolveKernels spd_solve_kernels = {width, tile_rows, tile_panels, pack, tile, factor_block, solve_panel, solve};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
