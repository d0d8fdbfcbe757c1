// Short loops over arrays of doubles that are whole vectors long.
#pragma once

#include "../simd.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

typedef Vec<double> Wide;
constexpr int64_t width = lanes<double>;

inline Wide magnitude(Wide a) { return a < 0.0 ? -a : a; }
inline double magnitude(double a) { return a < 0.0 ? -a : a; }
inline bool finite(double a) { return a - a == 0.0; }

inline double dot(const double* a, const double* b, int64_t n) {
  Wide sum = {};
  for (int64_t i = 0; i < n; i += width) sum += load(a + i) * load(b + i);
  return total(sum);
}

inline void clear(double* a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] = 0.0;
}

// matrix [n, leading] times x; n <= leading, both padded with zeros.
inline void multiply(const double* matrix, int64_t leading, int64_t n, const double* x, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(matrix + i * leading, x, leading);
}

// out += the part of a symmetric matrix's product that `rows` rows from `row` on begin: with the columns of their own
// tile, and with those after it, where each entry counts in its column's row, too.
template <int rows>
inline void add_symmetric_rows(const double* matrix, int64_t leading, int64_t row, const double* x, double* out) {
  constexpr int64_t tile = width < 4 ? 4 : width;
  const double* const first = matrix + row * leading;
  const int64_t own = row / tile * tile;
  Wide sums[rows] = {};
  for (int64_t k = own; k < own + tile; k += width) {
#pragma GCC unroll 4
    for (int q = 0; q < rows; ++q) sums[q] += load(first + q * leading + k) * load(x + k);
  }
  for (int64_t k = own + tile; k < leading; k += width) {
    const Wide value = load(x + k);
    Wide mirrored = load(out + k);
#pragma GCC unroll 4
    for (int q = 0; q < rows; ++q) {
      const Wide entry = load(first + q * leading + k);
      sums[q] += entry * value;
      mirrored += x[row + q] * entry;
    }
    store(out + k, mirrored);
  }
#pragma GCC unroll 4
  for (int q = 0; q < rows; ++q) out[row + q] += total(sums[q]);
}

// The same as `multiply` for a symmetric matrix, which is read by half: what a large one takes is its way from memory.
inline void multiply_symmetric(const double* matrix, int64_t leading, int64_t n, const double* x, double* out) {
  clear(out, leading);
  int64_t row = 0;
  for (; row + 4 <= n; row += 4) add_symmetric_rows<4>(matrix, leading, row, x, out);
  for (; row < n; ++row) add_symmetric_rows<1>(matrix, leading, row, x, out);
}

inline Wide places(int64_t first) {  // first, first + 1, ...
  Wide v;
  for (int i = 0; i < width; ++i) v[i] = static_cast<double>(first + i);
  return v;
}

inline void copy(const double* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

inline void exchange(double*& a, double*& b) {
  double* const c = a;
  a = b;
  b = c;
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
