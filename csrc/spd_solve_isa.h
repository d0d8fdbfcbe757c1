// The part of spd_solve that is compiled once per instruction set (see second_moment_isa.h).
#pragma once

#include <stdint.h>

#include "simd.h"

namespace rewrite_core {

// Rows of the matrix are packed in panels of `width`, [size][width]; a tile is `rows` rows (a divisor of width) by up
// to `panels` panels.
struct SPDSolveKernels {
  int width;
  int rows;
  int panels;

  // Packs `count` <= width rows of `size` values and zeros for the missing ones.
  void (*pack)(const double* from, int64_t stride, int count, int size, double* packed);

  // sums[rows][panel_count * width] += the products of one panel's rows with those of others.
  // row: `rows` neighbours inside their panel; columns: panel_count panels, panel_stride apart.
  void (*tile)(const double* row, const double* columns, int64_t panel_stride, int panel_count, int size, double* sums);

  // Cholesky factor of one small block in place (row-major, row stride `stride`); column: scratch of `size`.
  // Returns 0, or the 1-based number of the first pivot that is not positive.
  int (*factor_block)(double* block, int64_t stride, int size, double* column);

  // packed [size][width]: row <- row * lower^-T for each row of the panel. transposed [size][size] is lower^T; size is
  // a multiple of 4.
  void (*solve_panel)(double* packed, const double* transposed, int size);

  // Up to solve_rows right-hand sides x[r * n] at once: L y = x, then L^T x = y, in place.
  void (*solve)(const double* lower, int64_t n, double* x, int rows);
};

constexpr int solve_rows = 4;

REWRITE_CORE_PER_ISA(SPDSolveKernels, spd_solve_kernels)

}  // namespace rewrite_core
