// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see second_moment_isa.h.
// second_moment/packing.h brings keys into order, second_moment/products.h multiplies them, and second_moment/outer.h
// where there are few.
#include "second_moment_isa.h"

#include "second_moment/outer.h"
#include "second_moment/packing.h"
#include "second_moment/products.h"
#include "second_moment/squares.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

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
          blocks<Element>, squares,
          doubles,         outer,
          add_mirrored};
}

template <bool exist>
constexpr SecondMomentKernels bfloat16_kernels() {
  if constexpr (exist) {
    return kernels<BFloat16>(pack_same<BFloat16>);
  } else {
    return {};
  }
}

}  // namespace

const SecondMomentTable second_moment_table = {
    kernels<float>(pack_float32),
    kernels<double>(pack_same<double>),
    bfloat16_kernels<has_pairs>(),
};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
