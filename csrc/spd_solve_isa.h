// The part of spd_solve that is compiled once per instruction set (see second_moment_isa.h, whose packing and
// tile kernel do the rest of the work).
#pragma once

#include <stdint.h>

namespace rewrite_core {

struct SPDSolveKernels {
  // Cholesky factor of one small block in place (row-major, row stride `stride`); column: scratch of `size`.
  // Returns 0, or the 1-based number of the first pivot that is not positive.
  int (*factor_block)(double* block, int64_t stride, int size, double* column);

  // packed [size][width] (second_moment's panel: `width` rows side by side): row <- row * lower^-T for each.
  // transposed [size][size] is lower^T; size is a multiple of 4.
  void (*solve_panel)(double* packed, const double* transposed, int size);

  // Up to solve_rows right-hand sides x[r * n] at once: L y = x, then L^T x = y, in place.
  void (*solve)(const double* lower, int64_t n, double* x, int rows);
};

constexpr int solve_rows = 4;

namespace portable { extern const SPDSolveKernels spd_solve_kernels; }
namespace avx2 { extern const SPDSolveKernels spd_solve_kernels; }
namespace avx512 { extern const SPDSolveKernels spd_solve_kernels; }

}  // namespace rewrite_core
