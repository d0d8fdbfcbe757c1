// Few keys: outer products, with channels along the lanes, so that no lanes are left to add up. The sums are added to
// the matrix at once, and turned in registers for its mirror image: reading and writing it is most of the work.
#pragma once

#include "packing.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

inline double wide(float value) { return value; }
inline double wide(double value) { return value; }
template <class Half>
inline double wide(Half value) {
  float number;
  widen(value, number);
  return number;
}

template <class Element>
void doubles_of(const Element* from, int64_t channel_stride, int64_t position_stride, int64_t channels, int count,
                double* to, int64_t stride) {
  if (channel_stride == 1) {
    for (int k = 0; k < count; ++k) {
      for (int64_t c = 0; c < channels; ++c) to[k * stride + c] = wide(from[k * position_stride + c]);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int k = 0; k < count; ++k) to[k * stride + c] = wide(from[c * channel_stride + k * position_stride]);
  }
}

// SecondMomentKernels::doubles, of any type.
void doubles(const void* from, int dtype, int64_t channel_stride, int64_t position_stride, int64_t channels, int count,
             double* to, int64_t stride) {
  with_element(from, dtype,
               [&](auto* keys) { doubles_of(keys, channel_stride, position_stride, channels, count, to, stride); });
}

constexpr int outer_lanes = lanes<double>;
constexpr int outer_vectors = 2;  // of columns of a tile, whose sums stay in registers, by as many rows as lanes
constexpr int outer_ahead = 4;    // tiles whose memory is asked for before they are computed

// Where the tile lies whose memory is asked for next. Another core may have written it: then it comes slowly.
struct Asked {
  double* sums;
  int64_t n, row, column, row_end, next_row;

  void advance() {
    constexpr int line = 64 / sizeof(double), columns = outer_vectors * outer_lanes;
    if (row < 0) return;
    for (int i = 0; i < outer_lanes; ++i) {
      for (int j = 0; j < columns; j += line) ask_to_write(sums + (row + i) * n + column + j);
    }
    for (int j = 0; j < columns && column + j < row; ++j) ask_to_write(sums + (column + j) * n + row);
    column += columns;
    if (column <= row) return;
    column = 0;
    row += outer_lanes;
    if (row + outer_lanes > row_end) {
      row = next_row;
      row_end = n;
      next_row = -1;
    }
  }
};

// The products of as many rows as lanes and `vectors` vectors of columns: [vector][row].
template <int vectors>
inline void outer_of(const double* keys, int64_t stride, int positions, int64_t row, int64_t column,
                     Vec<double> (&sum)[vectors][outer_lanes]) {
#pragma GCC unroll 2
  for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < outer_lanes; ++i) sum[v][i] = Vec<double>{};
  }
  for (int position = 0; position < positions; ++position) {
    const double* key = keys + position * stride;
    Vec<double> right[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) right[v] = load(key + column + v * outer_lanes);
#pragma GCC unroll 8
    for (int i = 0; i < outer_lanes; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[v][i] += key[row + i] * right[v];
    }
  }
}

// A tile that lies all below the diagonal.
template <int vectors>
inline void outer_tile(const double* keys, int64_t stride, int positions, int64_t row, int64_t column, int64_t n,
                       double* sums) {
  Vec<double> sum[vectors][outer_lanes];
  outer_of(keys, stride, positions, row, column, sum);
#pragma GCC unroll 2
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = column + v * outer_lanes;
#pragma GCC unroll 8
    for (int i = 0; i < outer_lanes; ++i) {
      double* const to = sums + (row + i) * n + first;
      store_wide(to, sum[v][i] += load_wide(to));
    }
    turn<vector_bytes, double>(sum[v]);
#pragma GCC unroll 8
    for (int j = 0; j < outer_lanes; ++j) store_wide(sums + (first + j) * n + row, sum[v][j]);
  }
}

// A square on the diagonal: what lies above it is not read.
inline void outer_corner(const double* keys, int64_t stride, int positions, int64_t row, int64_t n, double* sums) {
  Vec<double> sum[1][outer_lanes], turned[outer_lanes];
  outer_of(keys, stride, positions, row, row, sum);
#pragma GCC unroll 8
  for (int i = 0; i < outer_lanes; ++i) {
    turned[i] = sum[0][i] += load_wide(sums + (row + i) * n + row);
  }
  turn<vector_bytes, double>(turned);
#pragma GCC unroll 8
  for (int i = 0; i < outer_lanes; ++i) {
    Vec<int64_t> lower;
#pragma GCC unroll 8
    for (int lane = 0; lane < outer_lanes; ++lane) lower[lane] = lane <= i ? -1 : 0;
    store_wide(sums + (row + i) * n + row, lower ? sum[0][i] : turned[i]);
  }
}

// One row of those that fill no tile.
inline void outer_row(const double* keys, int64_t stride, int positions, int64_t row, int64_t n, double* sums) {
  for (int64_t column = 0; column <= row; column += outer_lanes) {
    Vec<double> sum = {};
    for (int position = 0; position < positions; ++position) {
      const double* key = keys + position * stride;
      sum += key[row] * load(key + column);
    }
    for (int j = 0; j < outer_lanes && column + j <= row; ++j) {
      sums[(column + j) * n + row] = sums[row * n + column + j] += sum[j];
    }
  }
}

// SecondMomentKernels::outer. Each line of the image is written once, and whole where rows begin at lines: it does not
// matter that the rows of a power of two of channels share the cache's sets.
void outer(const double* keys, int64_t stride, int positions, int64_t row, int64_t row_end, int64_t n, double* sums,
           int64_t next_row) {
  constexpr int columns = outer_vectors * outer_lanes;
  Asked asked = {sums, n, row + outer_lanes <= row_end ? row : -1, 0, row_end, next_row};
  for (int tile = 0; tile < outer_ahead; ++tile) asked.advance();
  for (; row + outer_lanes <= row_end; row += outer_lanes) {
    int64_t column = 0;
    for (; column + columns <= row; column += columns) {
      asked.advance();
      outer_tile<outer_vectors>(keys, stride, positions, row, column, n, sums);
    }
    asked.advance();
    for (; column < row; column += outer_lanes) outer_tile<1>(keys, stride, positions, row, column, n, sums);
    outer_corner(keys, stride, positions, row, n, sums);
  }
  for (; row < row_end; ++row) outer_row(keys, stride, positions, row, n, sums);
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
