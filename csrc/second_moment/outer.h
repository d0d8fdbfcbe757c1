// Few keys: outer products, with channels along the lanes, so that no lanes are left to add up.
#pragma once

#include "elements.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

inline double wide(float value) { return value; }
inline double wide(double value) { return value; }
inline double wide(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float number;
  __builtin_memcpy(&number, &bits, sizeof(number));
  return number;
}

// SecondMomentKernels::widen.
template <class Element>
void widen(const void* packed, int channels, int positions, double* to, int64_t stride) {
  for (int channel = 0; channel < channels; ++channel) {
    const char* run = static_cast<const char*>(packed) + channel * key_stride;
    for (int position = 0; position < positions; ++position) {
      Element value;
      __builtin_memcpy(&value, run + position * sizeof(Element), sizeof(Element));
      to[position * stride + channel] = wide(value);
    }
  }
}

// All sums of `rows` rows and four vectors of columns stay in registers.
template <int rows>
inline void outer_of(const double* keys, int64_t stride, int positions, int64_t row, int64_t column, double* part) {
  typedef Vector<double>::unaligned Unaligned;
  Vec<double> sum[rows][4] = {};
  for (int position = 0; position < positions; ++position) {
    const double* key = keys + position * stride;
    Vec<double> right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = *reinterpret_cast<const Unaligned*>(key + column + j * lanes<double>);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const double left = key[row + i];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) *reinterpret_cast<Unaligned*>(part + i * outer_columns + j * lanes<double>) = sum[i][j];
  }
}

// SecondMomentKernels::outer.
void outer(const double* keys, int64_t stride, int positions, int64_t row, int row_count, int64_t column,
           double* part) {
  constexpr int rows = registers >= 32 ? 4 : 2, columns = 4 * lanes<double>;
  for (int j = 0; j < outer_columns; j += columns) {
    int i = 0;
    for (; i + rows <= row_count; i += rows) {
      outer_of<rows>(keys, stride, positions, row + i, column + j, part + i * outer_columns + j);
    }
    for (; i < row_count; ++i) outer_of<1>(keys, stride, positions, row + i, column + j, part + i * outer_columns + j);
  }
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
