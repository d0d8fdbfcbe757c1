// The part of spd_solve that is compiled once per instruction set (see second_moment_isa.h).
#pragma once

#include <stdint.h>

#include "simd.h"

namespace rewrite_core {

// Which terms of |A| v a product adds up: for a lower bound of it a fourth of them will do.
enum class Sizes { none, some, all };

struct Range {
  int64_t begin, end;
};

// A symmetric matrix [n, n] and what it is multiplied by: A w and |A| v, v >= 0.
struct SymmetricProduct {
  const double* a;
  int64_t n;
  const double *w, *v;
};

// Terms of A w and |A| v. All of them, or those of one block of rows, in which case y and z are the first of these.
struct ProductSums {
  double *y, *z;
};

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

  // Cholesky factor of one small block in place (row-major, row stride `stride`, `room` numbers of the row from the
  // block on); columns: scratch of 4 * factor_length numbers. What is above the diagonal is left with anything.
  // Returns 0, or the 1-based number of the first pivot that is not positive.
  int (*factor_block)(double* block, int64_t stride, int64_t room, int size, double* columns);

  // packed [size][width]: row <- row * lower^-T for each row of the panel. transposed [size][size] is lower^T; size is
  // a multiple of 4.
  void (*solve_panel)(double* packed, const double* transposed, int size);

  // A few right-hand sides x[r * length], fewer than `wide_from`, in place, and a triangle [n, n] with rows `stride`
  // apart: L y = x, and L^T x = y.
  void (*forward)(const double* lower, int64_t stride, int64_t n, double* x, int64_t length, int rows);
  void (*backward)(const double* lower, int64_t stride, int64_t n, double* x, int64_t length, int rows);

  // Parts of the same for a triangle that is solved block by block. x[i] -= the sum over k < columns, a multiple of
  // width, of L_ik x[k] for i in [first, end).
  void (*take_left)(const double* lower, int64_t n, double* x, int rows, int64_t first, int64_t end, int64_t columns);
  // x[k] -= the sum over i in [first, end) of L_ik x[i] for k in [columns, columns_end).
  void (*take_below)(const double* lower, int64_t n, double* x, int rows, int64_t first, int64_t end, int64_t columns,
                     int64_t columns_end);

  // Many: the same for x [n][vectors * width], vectors <= wide_vectors, one right-hand side a lane.
  void (*solve_wide)(const double* lower, int64_t n, double* x, int vectors);

  // What a block of the lower triangle, on its diagonal or left of it, adds to the product in its rows, and what its
  // mirror image adds in the rows that are its columns; on the diagonal mirrored is the same as own. What was there is
  // overwritten. Bounds are multiples of `width`, but for n.
  void (*multiply)(const SymmetricProduct& product, Range rows, Range columns, Sizes sizes, ProductSums own,
                   ProductSums mirrored);
};

inline int64_t factor_length(int64_t size, int width) { return size + width; }

constexpr int wide_from = 4, wide_vectors = 3;

REWRITE_CORE_PER_ISA(SPDSolveKernels, spd_solve_kernels)

}  // namespace rewrite_core
