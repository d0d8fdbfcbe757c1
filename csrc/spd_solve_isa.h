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

// Rows and columns of a matrix that may be written, with rows `stride` apart.
struct Part {
  double* data;
  int64_t stride, rows, columns;
};

constexpr int64_t block_size = 64;  // columns factored before the rest of the matrix is updated

// Rows of the matrix are packed in panels of `width`, [block_size][width]; a tile is one panel's rows by the rows of up
// to `panels` others.
struct SPDSolveKernels {
  int width;
  int panels;

  // Cholesky factor of one block of at most block_size rows, in place (row-major, row stride `stride`), and its
  // transpose in [block_size][block_size]. Returns 0, or the 1-based number of the first pivot that is not positive.
  int (*factor_block)(double* block, int64_t stride, int size, double* transposed);

  // row <- row * lower^-T for `count` <= width rows of block_size numbers, and the same packed, with zeros for the
  // missing ones. transposed is lower^T.
  void (*solve_rows)(double* rows, int64_t stride, int count, const double* transposed, double* packed);

  // target -= the products of one panel's rows with those of `panel_count` <= panels others in a row.
  void (*subtract)(const double* row, const double* columns, int panel_count, Part target);

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

  // Many: the same for a panel x [n][vectors * width], vectors <= wide_vectors, one right-hand side a lane. From the
  // rows of x what these columns of L (backward: of L^T) make of their solution is taken; where the columns are the
  // rows, the rows are solved.
  void (*forward_wide)(const double* lower, int64_t n, double* x, int vectors, Range rows, Range columns);
  void (*backward_wide)(const double* lower, int64_t n, double* x, int vectors, Range rows, Range columns);

  // What a block of the lower triangle, on its diagonal or left of it, adds to the product in its rows, and what its
  // mirror image adds in the rows that are its columns; on the diagonal mirrored is the same as own. What was there is
  // overwritten. Bounds are multiples of `width`, but for n.
  void (*multiply)(const SymmetricProduct& product, Range rows, Range columns, Sizes sizes, ProductSums own,
                   ProductSums mirrored);
};

constexpr int wide_from = 4, wide_vectors = 3;

REWRITE_CORE_PER_ISA(SPDSolveKernels, spd_solve_kernels)

}  // namespace rewrite_core
