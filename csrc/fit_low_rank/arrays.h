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

// matrix [n, leading] times x; n <= leading, both padded with zeros.
inline void multiply(const double* matrix, int64_t leading, int64_t n, const double* x, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(matrix + i * leading, x, leading);
}

inline Wide places(int64_t first) {  // first, first + 1, ...
  Wide v;
  for (int i = 0; i < width; ++i) v[i] = static_cast<double>(first + i);
  return v;
}

inline void copy(const double* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

inline void clear(double* a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] = 0.0;
}

inline void exchange(double*& a, double*& b) {
  double* const c = a;
  a = b;
  b = c;
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
