// Tiles: the products of a run's packed keys, added up in registers.
#pragma once

#include "elements.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

// A tile fills the register file: rows x columns vectors of sums, the rows' vectors and one column's.
constexpr int tile_rows = 3, tile_columns = registers >= 32 ? 8 : 4;

// The sums of vectors of packed elements, lane by lane.
template <class Element>
struct Products {
  typedef Element Real;
  static inline void add(Vec<Real>& sum, Vec<Real> a, Vec<Real> b) { sum += a * b; }
};
template <>
struct Products<BFloat16> {  // two positions per lane; only where has_pairs
  typedef float Real;
  static inline void add(Vec<float>& sum, Vec<float> a, Vec<float> b) { add_pairs(sum, a, b); }
};

// out[i] += the sum over the lanes of vectors[i].
template <class Real, int count>
inline void add_lanes(Vec<Real>* vectors, double* out) {
  Real sums[count];
  sum_lanes<Real, count>(vectors, sums);
  for (int i = 0; i < count; ++i) out[i] += static_cast<double>(sums[i]);
}

// A lane's sums of so many terms at most join a total: see second_moment_isa.h. Doubles need no totals.
constexpr int most_terms = 32;
template <class Real>
constexpr bool has_totals = sizeof(Real) == 4 && run_bytes / vector_bytes > most_terms;

template <class Real>
inline int end_of_terms(int start, int steps) {
  return has_totals<Real> && start + most_terms < steps ? start + most_terms : steps;
}

template <class Real, int count>
inline void add_all(Vec<Real>* total, const Vec<Real>* sum) {
#pragma GCC unroll 32
  for (int i = 0; i < count; ++i) total[i] = has_totals<Real> ? total[i] + sum[i] : sum[i];
}

enum class Besides { nothing, ask, ask_and_copy };  // which parts of Meanwhile

// SecondMomentKernels::tile for a known number of rows: all sums stay in registers over a run.
template <class Element, int row_count, int columns, Besides besides>
void tile_of(const char* row, const char* column, int steps, double* out, int64_t out_stride,
             const Meanwhile* meanwhile) {
  typedef typename Products<Element>::Real Real;
  typedef typename Vector<Real, vector_bytes>::packed Packed;
  typedef typename Vector<Real, vector_bytes>::unaligned Unaligned;
  Meanwhile also = {};
  if constexpr (besides != Besides::nothing) also = *meanwhile;
  Vec<Real> total[row_count][columns] = {};
  for (int start = 0, end; start < steps; start = end) {
    end = end_of_terms<Real>(start, steps);
    Vec<Real> sum[row_count][columns] = {};
    for (int step = start; step < end; ++step) {
      Vec<Real> left[row_count];
      if constexpr (besides != Besides::nothing) {
        __builtin_prefetch(reinterpret_cast<const void*>(also.ahead + also.ahead_offsets[step]));
      }
      if constexpr (besides == Besides::ask_and_copy) {
        *reinterpret_cast<Unaligned*>(also.to + step * vector_bytes) =
            *reinterpret_cast<const Unaligned*>(also.from + also.from_offsets[step]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < row_count; ++i) {
        left[i] = *reinterpret_cast<const Packed*>(row + i * key_stride + step * vector_bytes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        // opaque, or every product loads it again, and loads become the limit
        const Vec<Real> right =
            opaque(Vec<Real>(*reinterpret_cast<const Packed*>(column + j * key_stride + step * vector_bytes)));
#pragma GCC unroll 4
        for (int i = 0; i < row_count; ++i) Products<Element>::add(sum[i][j], left[i], right);
      }
    }
    add_all<Real, row_count * columns>(total[0], sum[0]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < row_count; ++i) add_lanes<Real, columns>(total[i], out + i * out_stride);
}

template <class Element, Besides besides>
void tile_rows_of(const char* row, int row_count, const char* column, int steps, double* out, int64_t out_stride,
                  const Meanwhile* meanwhile) {
  constexpr int columns = tile_columns;
  if (row_count == 3) return tile_of<Element, 3, columns, besides>(row, column, steps, out, out_stride, meanwhile);
  if (row_count == 2) return tile_of<Element, 2, columns, besides>(row, column, steps, out, out_stride, meanwhile);
  return tile_of<Element, 1, columns, besides>(row, column, steps, out, out_stride, meanwhile);
}

template <class Element>
void tile(const void* rows, int row_count, const void* columns, int steps, double* out, int64_t out_stride,
          const Meanwhile* meanwhile) {
  const char *row = static_cast<const char*>(rows), *column = static_cast<const char*>(columns);
  if (!meanwhile) {
    tile_rows_of<Element, Besides::nothing>(row, row_count, column, steps, out, out_stride, nullptr);
  } else if (!meanwhile->to) {
    tile_rows_of<Element, Besides::ask>(row, row_count, column, steps, out, out_stride, meanwhile);
  } else {
    tile_rows_of<Element, Besides::ask_and_copy>(row, row_count, column, steps, out, out_stride, meanwhile);
  }
}

// out[i][j] += the products j <= i of four channels.
template <class Element>
void triangle(const char* block, int steps, double* out, int64_t out_stride) {
  typedef typename Products<Element>::Real Real;
  typedef typename Vector<Real, vector_bytes>::packed Packed;
  Vec<Real> total[10] = {};
  for (int start = 0, end; start < steps; start = end) {
    end = end_of_terms<Real>(start, steps);
    Vec<Real> sum[10] = {};
    for (int step = start; step < end; ++step) {
      Vec<Real> value[4];
      int place = 0;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        value[i] = *reinterpret_cast<const Packed*>(block + i * key_stride + step * vector_bytes);
#pragma GCC unroll 4
        for (int j = 0; j <= i; ++j) Products<Element>::add(sum[place++], value[i], value[j]);
      }
    }
    add_all<Real, 10>(total, sum);
  }
  double sums[10] = {};
  add_lanes<Real, 4>(total, sums);
  add_lanes<Real, 4>(total + 4, sums + 4);
  add_lanes<Real, 2>(total + 8, sums + 8);
  for (int i = 0, place = 0; i < 4; ++i) {
    for (int j = 0; j <= i; ++j) out[i * out_stride + j] += sums[place++];
  }
}

// SecondMomentKernels::diagonal: triangles of four channels along the diagonal, and for eight columns the square
// between two of them. Channels beyond `channels` are zeros, whose products are left out.
template <class Element>
void diagonal(const void* block, int channels, int steps, double* out, int64_t out_stride) {
  const char* first = static_cast<const char*>(block);
  double sums[tile_columns * tile_columns] = {};
  for (int corner = 0; corner < tile_columns; corner += 4) {
    triangle<Element>(first + corner * key_stride, steps, sums + corner * (tile_columns + 1), tile_columns);
  }
  if constexpr (tile_columns == 8) {
    tile_of<Element, 4, 4, Besides::nothing>(first + 4 * key_stride, first, steps, sums + 4 * tile_columns,
                                             tile_columns, nullptr);
  }
  for (int i = 0; i < channels; ++i) {
    for (int j = 0; j <= i; ++j) out[i * out_stride + j] += sums[i * tile_columns + j];
  }
}

// sums[i] = the sum of squares of channel i, for `count` channels.
template <class Element, int count>
void squares(const char* block, int steps, double* sums) {
  typedef typename Products<Element>::Real Real;
  typedef typename Vector<Real, vector_bytes>::packed Packed;
  Vec<Real> total[count] = {};
  for (int start = 0, end; start < steps; start = end) {
    end = end_of_terms<Real>(start, steps);
    Vec<Real> sum[count] = {};
    for (int step = start; step < end; ++step) {
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        const Vec<Real> value = *reinterpret_cast<const Packed*>(block + i * key_stride + step * vector_bytes);
        Products<Element>::add(sum[i], value, value);
      }
    }
    add_all<Real, count>(total, sum);
  }
  add_lanes<Real, count>(total, sums);
}

// SecondMomentKernels::blocks. A triangle of four channels serves two groups of two.
template <class Element>
void blocks(const void* block, int size, int count, int steps, double* out) {
  const char* first = static_cast<const char*>(block);
  if (size == 1) {
    int group = 0;
    for (; group + 8 <= count; group += 8) squares<Element, 8>(first + group * key_stride, steps, out + group);
    for (; group < count; ++group) squares<Element, 1>(first + group * key_stride, steps, out + group);
    return;
  }
  const int together = size == 2 ? 2 : 1;
  for (int group = 0; group < count; group += together) {
    const char* keys = first + group * size * key_stride;
    double* target = out + group * size * size;
    if (size > 4) {
      diagonal<Element>(keys, size, steps, target, size);
      continue;
    }
    double sums[4 * 4] = {};
    triangle<Element>(keys, steps, sums, 4);
    for (int other = 0; other < together && group + other < count; ++other) {
      for (int i = 0; i < size; ++i) {
        for (int j = 0; j <= i; ++j) {
          target[(other * size + i) * size + j] += sums[(other * size + i) * 4 + other * size + j];
        }
      }
    }
  }
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
