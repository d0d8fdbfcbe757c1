// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see second_moment_isa.h.
#include "second_moment_isa.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

// A tile fills the register file: rows x columns vectors of sums, the rows' vectors and one column's.
#if defined(REWRITE_CORE_ISA_avx512)
constexpr int vector_bytes = 64, tile_columns = 8;
#elif defined(REWRITE_CORE_ISA_avx2)
constexpr int vector_bytes = 32, tile_columns = 4;
#else
constexpr int vector_bytes = 16, tile_columns = 4;
#endif
constexpr int tile_rows = 3;
constexpr int panel_channels = 16;

template <class Element, int bytes>
struct Vector {
  typedef Element type __attribute__((vector_size(bytes)));
  typedef Element packed __attribute__((vector_size(bytes), may_alias));  // stored as another type, aligned
  typedef Element unaligned __attribute__((vector_size(bytes), aligned(sizeof(Element)), may_alias));
};
template <class Real>
using Vec = typename Vector<Real, vector_bytes>::type;
template <class Real>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(Real));

template <int bytes>
struct Integer;
template <>
struct Integer<2> {
  typedef int16_t type;
};
template <>
struct Integer<4> {
  typedef int32_t type;
};
template <>
struct Integer<8> {
  typedef int64_t type;
};

// The sums of vectors of packed elements, lane by lane.
template <class Element>
struct Products {
  typedef Element Real;
  static inline void add(Vec<Real>& sum, Vec<Real> a, Vec<Real> b) { sum += a * b; }
};
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
#if defined(REWRITE_CORE_ISA_avx512)
template <>
struct Products<BFloat16> {  // two positions per lane
  typedef float Real;
  // The one instruction that processors of this set may lack: second_moment.cpp asks for it before it comes here.
  static inline void add(Vec<float>& sum, Vec<float> a, Vec<float> b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
};
#endif

// The lanes of a, then b, that `places` name; constants once loops are unrolled, so one instruction.
template <class V, class Places>
inline V shuffle(V a, V b, Places places) {
#if defined(__clang__)  // has no __builtin_shuffle
  constexpr int n = sizeof(V) / sizeof(a[0]);
  V result;
#pragma GCC unroll 16
  for (int lane = 0; lane < n; ++lane) result[lane] = places[lane] < n ? a[places[lane]] : b[places[lane] - n];
  return result;
#else
  return __builtin_shuffle(a, b, places);
#endif
}

// Vectors of lanes / group groups each, and the sums of their groups wanted: adds the halves of every group. Where a
// group was, the result holds a's, then b's, of half the size: every lane of one term stays where it is, which costs a
// blend in place of a shuffle.
template <class Real, int group>
inline Vec<Real> add_halves(Vec<Real> a, Vec<Real> b) {
  constexpr int n = lanes<Real>, half = group / 2;
  typename Vector<typename Integer<sizeof(Real)>::type, vector_bytes>::type lower, other;
#pragma GCC unroll 16
  for (int lane = 0; lane < n; ++lane) {
    lower[lane] = lane % group < half ? -1 : 0;
    other[lane] = lane % group < half ? lane + half : n + lane - half;  // lanes of b count from n on
  }
  return (lower ? a : b) + shuffle(a, b, other);
}

// The same for one vector: its groups move up to fill the first half.
template <class Real, int group>
inline Vec<Real> add_halves(Vec<Real> a) {
  constexpr int n = lanes<Real>, half = group / 2;
  typename Vector<typename Integer<sizeof(Real)>::type, vector_bytes>::type first, second;
#pragma GCC unroll 16
  for (int lane = 0; lane < n; ++lane) {
    first[lane] = lane / half * group % n + lane % half;
    second[lane] = first[lane] + half;
  }
  return shuffle(a, a, first) + shuffle(a, a, second);
}

// out[i] += the sum over the lanes of vectors[i], for i < wanted; count and group are how far the sums are.
template <class Real, int wanted, int count = wanted, int group = lanes<Real>>
inline void add_lanes(Vec<Real>* vectors, double* out) {
  constexpr int n = lanes<Real>;
  if constexpr (count > n) {  // a vector holds no more sums than lanes
    add_lanes<Real, n>(vectors, out);
    add_lanes<Real, wanted - n>(vectors + n, out + n);
  } else if constexpr (group == 1) {
    Real sums[n];
    __builtin_memcpy(sums, vectors, sizeof(sums));
    for (int i = 0; i < wanted; ++i) out[i] += static_cast<double>(sums[i]);
  } else if constexpr (count == 1) {
    vectors[0] = add_halves<Real, group>(vectors[0]);
    add_lanes<Real, wanted, 1, group / 2>(vectors, out);
  } else {
    static_assert(count % 2 == 0, "pairs of vectors");
    constexpr int pairs = count / 2;  // i and i + pairs: in the end the sums are in order
#pragma GCC unroll 4
    for (int i = 0; i < pairs; ++i) vectors[i] = add_halves<Real, group>(vectors[i], vectors[i + pairs]);
    add_lanes<Real, wanted, pairs, group / 2>(vectors, out);
  }
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
        Vec<Real> right = *reinterpret_cast<const Packed*>(column + j * key_stride + step * vector_bytes);
        asm("" : "+v"(right));  // or every product loads it again, and loads become the limit
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

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

template <class Element>
inline void widen(Element value, Element& to) {
  to = value;
}
inline void widen(BFloat16 value, float& to) { to = from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline void widen(Float16 value, float& to) {
  // Exponent and mantissa moved into place and the exponent's bias mended. A subnormal half is the difference of
  // two normal floats, so that it survives flushing to zero. Compilers vectorise all this without F16C.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, exponent = value.bits & 0x7c00u;
  const uint32_t normal = magnitude + (exponent == 0x7c00u ? 224u << 23 : 112u << 23);  // infinity and NaN
  const uint32_t subnormal = to_bits(from_bits(magnitude + (113u << 23)) - from_bits(113u << 23));
  to = from_bits((exponent ? normal : subnormal) | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
}

// to[c][k] = from[k][c] for a square block that fills 16-byte vectors, in registers: every round interleaves the
// upper and the lower half of the rows, which rotates the bits of the index (row, lane) by one.
template <class Element>
inline void transpose_block(const Element* from, int64_t from_stride, Element* to, int64_t to_stride) {
  typedef typename Integer<sizeof(Element)>::type Bits;
  typedef Vector<Bits, 16> Part;
  constexpr int n = 16 / sizeof(Element);
  typename Part::type low, high, row[n];
#pragma GCC unroll 8
  for (int lane = 0; lane < n; ++lane) {
    low[lane] = lane / 2 + lane % 2 * n;
    high[lane] = low[lane] + n / 2;
  }
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) row[k] = *reinterpret_cast<const typename Part::unaligned*>(from + k * from_stride);
#pragma GCC unroll 3
  for (int round = 1; round < n; round *= 2) {
    typename Part::type mixed[n];
#pragma GCC unroll 4
    for (int k = 0; k < n / 2; ++k) {
      mixed[2 * k] = shuffle(row[k], row[k + n / 2], low);
      mixed[2 * k + 1] = shuffle(row[k], row[k + n / 2], high);
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) row[k] = mixed[k];
  }
#pragma GCC unroll 8
  for (int c = 0; c < n; ++c) *reinterpret_cast<typename Part::unaligned*>(to + c * to_stride) = row[c];
}

// to[c][k] = from[k][c] for any numbers of channels and positions: whole blocks, then what is left over.
template <class Element>
void transpose(const Element* from, int64_t from_stride, int channels, int count, Element* to, int64_t to_stride) {
  constexpr int n = 16 / sizeof(Element);
  const int whole_channels = channels / n * n, whole = count / n * n;
  for (int k = 0; k < whole; k += n) {
    for (int c = 0; c < whole_channels; c += n) {
      transpose_block(from + k * from_stride + c, from_stride, to + c * to_stride + k, to_stride);
    }
  }
  for (int c = 0; c < channels; ++c) {
    for (int k = c < whole_channels ? whole : 0; k < count; ++k) to[c * to_stride + k] = from[k * from_stride + c];
  }
}

// SecondMomentKernels::pack for one pair of types. Strides say which copy is fast: along positions (NCHW), or, where
// channels are neighbours (rows, channels_last), a transposition in registers; anything else goes element by element.
template <class Element, class Packed>
void pack_of(const Element* from, int64_t channel_stride, int64_t position_stride, int channels, int count, char* to) {
  if (position_stride == 1 || channel_stride != 1) {
    for (int c = 0; c < channels; ++c) {
      const Element* source = from + c * channel_stride;
      Packed* target = reinterpret_cast<Packed*>(to + c * key_stride);
      if (position_stride == 1) {
        for (int k = 0; k < count; ++k) widen(source[k], target[k]);
      } else {
        for (int k = 0; k < count; ++k) widen(source[k * position_stride], target[k]);
      }
    }
  } else if constexpr (sizeof(Element) == sizeof(Packed)) {  // rows and channels_last
    transpose(from, position_stride, channels, count, reinterpret_cast<Element*>(to),
              key_stride / static_cast<int64_t>(sizeof(Element)));
  } else {
    constexpr int some = 32;
    Element turned[panel_channels * some];
    for (int first = 0; first < count; first += some) {
      const int length = count - first < some ? count - first : some;
      transpose(from + first * position_stride, position_stride, channels, length, turned, some);
      for (int c = 0; c < channels; ++c) {
        Packed* target = reinterpret_cast<Packed*>(to + c * key_stride) + first;
        for (int k = 0; k < length; ++k) widen(turned[c * some + k], target[k]);
      }
    }
  }
}

void pack_float32(const void* from, int dtype, int64_t channel_stride, int64_t position_stride, int channels, int count,
                  void* to) {
  char* target = static_cast<char*>(to);
  if (dtype == 0) {
    pack_of<float, float>(static_cast<const float*>(from), channel_stride, position_stride, channels, count, target);
  } else if (dtype == 2) {
    pack_of<BFloat16, float>(static_cast<const BFloat16*>(from), channel_stride, position_stride, channels, count,
                             target);
  } else {
    pack_of<Float16, float>(static_cast<const Float16*>(from), channel_stride, position_stride, channels, count,
                            target);
  }
}

template <class Element>
void pack_same(const void* from, int, int64_t channel_stride, int64_t position_stride, int channels, int count,
               void* to) {
  pack_of<Element, Element>(static_cast<const Element*>(from), channel_stride, position_stride, channels, count,
                            static_cast<char*>(to));
}

// SecondMomentKernels::add_mirrored. Rows of the image are turned in a small buffer and written at once, to lines that
// are not in the cache; a column of the matrix at a time, the rows of a power of two of channels share the cache's
// sets.
void add_mirrored(double* __restrict part, int64_t part_stride, const int64_t rows[2], const int64_t columns[2],
                  int64_t n, double* __restrict sums) {
  constexpr int some = 8;
  double turned[some * most_block_rows];
  for (int64_t i = rows[0]; i < rows[1]; ++i) {
    const int64_t count = (columns[1] < i + 1 ? columns[1] : i + 1) - columns[0];
    double* __restrict products = part + (i - rows[0]) * part_stride;
    double* __restrict row = sums + i * n + columns[0];
    for (int64_t j = 0; j < count; ++j) products[j] = row[j] += products[j];
  }
  for (int64_t column = columns[0]; column < columns[1]; column += some) {
    const int64_t end = columns[1] - column < some ? columns[1] : column + some;
    const int64_t from = rows[0] < column ? column : rows[0];  // what lies above the diagonal is turned, not written
    if (from >= rows[1]) continue;
    transpose(part + (from - rows[0]) * part_stride + column - columns[0], part_stride, static_cast<int>(end - column),
              static_cast<int>(rows[1] - from), turned, most_block_rows);
    for (int64_t j = column; j < end; ++j) {
      const int64_t first = from < j + 1 ? j + 1 : from;
      if (first >= rows[1]) continue;
      __builtin_memcpy(sums + j * n + first, turned + (j - column) * most_block_rows + first - from,
                       static_cast<__SIZE_TYPE__>(rows[1] - first) * sizeof(double));
    }
  }
}

template <class Element>
constexpr SecondMomentKernels kernels(decltype(SecondMomentKernels::pack) pack) {
  return {sizeof(Element), vector_bytes / static_cast<int>(sizeof(Element)),
          tile_rows,       tile_columns,
          panel_channels,  pack,
          tile<Element>,   diagonal<Element>,
          add_mirrored};
}

}  // namespace

const SecondMomentTable second_moment_table = {
    kernels<float>(pack_float32),
    kernels<double>(pack_same<double>),
#if defined(REWRITE_CORE_ISA_avx512)
    kernels<BFloat16>(pack_same<BFloat16>),
#else
    {},
#endif
};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
