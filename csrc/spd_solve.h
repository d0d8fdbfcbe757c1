// Cholesky factors of symmetric positive definite matrices, and solves with them, in double.
#pragma once

#include <cstdint>

#include "common.h"

namespace rewrite_core {

// Of each matrix [n, n]: its mean diagonal, its largest absolute diagonal entry, and the largest difference between an
// entry and its mirror image, which is NaN where anything is not finite. found [batch, 3].
Status examine(const double* matrices, int64_t batch, int64_t n, double* found, int threads);

// matrices  [batch, n, n], each contiguous row-major: the lower triangle is read and becomes L (A = L L^T),
//           the upper one becomes zero
// info      [batch]: 0, or the 1-based number of the first pivot that is not above `least` times its diagonal entry and
//           so may be nothing but rounding (of one that is not positive the matrix is left half done)
// The result has the same bits for any number of threads.
Status cholesky(double* matrices, int64_t batch, int64_t n, double least, int64_t* info, int threads, Isa isa);

// Solves L L^T x = b in place. lower [batch, n, n]; x [batch, m, n], one right-hand side a row.
Status cholesky_solve(const double* lower, int64_t batch, int64_t n, double* x, int64_t m, int threads, Isa isa);

}  // namespace rewrite_core
