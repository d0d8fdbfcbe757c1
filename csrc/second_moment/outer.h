// Few keys: outer products, with channels along the lanes, so that no lanes are left to add up.
#pragma once

#include "packing.h"

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

typedef Vector<double>::unaligned Unaligned;
constexpr int outer_rows = registers >= 32 ? 4 : 2, outer_vectors = 4;  // whose sums stay in registers

// The products of `rows` rows and four vectors of columns.
template <int rows>
inline void outer_of(const double* keys, int64_t stride, int positions, int64_t row, int64_t column,
                     Vec<double> (&sum)[rows][outer_vectors]) {
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < outer_vectors; ++j) sum[i][j] = Vec<double>{};
  }
  for (int position = 0; position < positions; ++position) {
    const double* key = keys + position * stride;
    Vec<double> right[outer_vectors];
#pragma GCC unroll 4
    for (int j = 0; j < outer_vectors; ++j) {
      right[j] = *reinterpret_cast<const Unaligned*>(key + column + j * lanes<double>);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const double left = key[row + i];
#pragma GCC unroll 4
      for (int j = 0; j < outer_vectors; ++j) sum[i][j] += left * right[j];
    }
  }
}

template <int rows>
inline void outer_to(const double* keys, int64_t stride, int positions, int64_t row, int64_t column, double* part) {
  Vec<double> sum[rows][outer_vectors];
  outer_of<rows>(keys, stride, positions, row, column, sum);
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < outer_vectors; ++j) {
      *reinterpret_cast<Unaligned*>(part + i * outer_columns + j * lanes<double>) = sum[i][j];
    }
  }
}

// SecondMomentKernels::outer.
void outer(const double* keys, int64_t stride, int positions, int64_t row, int row_count, int64_t column,
           double* part) {
  constexpr int columns = outer_vectors * lanes<double>;
  for (int j = 0; j < outer_columns; j += columns) {
    int i = 0;
    for (; i + outer_rows <= row_count; i += outer_rows) {
      outer_to<outer_rows>(keys, stride, positions, row + i, column + j, part + i * outer_columns + j);
    }
    for (; i < row_count; ++i) outer_to<1>(keys, stride, positions, row + i, column + j, part + i * outer_columns + j);
  }
}

// Asks for the lines of `outer_tall` rows by outer_columns columns of `sums`, and of their mirror image.
inline void ask_for(const double* sums, int64_t n, int64_t row, int64_t column) {
  constexpr int line = 64 / sizeof(double);
  for (int i = 0; i < outer_tall; ++i) {
    for (int j = 0; j < outer_columns; j += line) __builtin_prefetch(sums + (row + i) * n + column + j, 1);
  }
  for (int j = 0; j < outer_columns; ++j) __builtin_prefetch(sums + (column + j) * n + row, 1);
}

// SecondMomentKernels::outer_below. Each line of the image is written once, and whole where rows begin at lines: it
// does not matter that the rows of a power of two of channels share the cache's sets.
void outer_below(const double* keys, int64_t stride, int positions, int64_t row, int64_t row_end, int64_t column,
                 int64_t n, double* sums, int64_t next_row, int64_t next_column) {
  constexpr int n_lanes = lanes<double>, columns = outer_vectors * n_lanes;
  alignas(64) double added[outer_tall * outer_columns];
  for (; row < row_end; row += outer_tall) {
    const bool last = row + outer_tall >= row_end;
    if (!last) ask_for(sums, n, row + outer_tall, column);
    if (last && next_row >= 0) ask_for(sums, n, next_row, next_column);
    for (int j = 0; j < outer_columns; j += columns) {
      for (int i = 0; i < outer_tall; i += outer_rows) {
        Vec<double> sum[outer_rows][outer_vectors];
        outer_of<outer_rows>(keys, stride, positions, row + i, column + j, sum);
#pragma GCC unroll 4
        for (int q = 0; q < outer_rows; ++q) {
          double* const to = sums + (row + i + q) * n + column + j;
#pragma GCC unroll 4
          for (int v = 0; v < outer_vectors; ++v) {
            const Vec<double> now = *reinterpret_cast<const Unaligned*>(to + v * n_lanes) + sum[q][v];
            *reinterpret_cast<Unaligned*>(to + v * n_lanes) = now;
            store(added + (i + q) * outer_columns + j + v * n_lanes, now);
          }
        }
      }
    }
    for (int j = 0; j < outer_columns; j += n_lanes) {
      for (int i = 0; i < outer_tall; i += n_lanes) {
        transpose_block<vector_bytes>(added + i * outer_columns + j, outer_columns, sums + (column + j) * n + row + i,
                                      n);
      }
    }
  }
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
