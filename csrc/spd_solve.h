// Cholesky factors of symmetric positive definite matrices, and solves with them, in double.
#pragma once

#include <cstdint>

#include "common.h"

namespace rewrite_core {

// matrices  [batch, n, n], each contiguous row-major: the lower triangle is read and becomes L (A = L L^T),
//           the upper one becomes zero
// info      [batch]: 0, or the 1-based number of the first pivot that is not positive (that matrix is then
//           left half done)
// The result has the same bits for any number of threads.
Status cholesky(double* matrices, int64_t batch, int64_t n, int64_t* info, int threads, Isa isa);

// Solves L L^T x = b in place. lower [batch, n, n]; x [batch, m, n], one right-hand side a row.
Status cholesky_solve(const double* lower, int64_t batch, int64_t n, double* x, int64_t m, int threads,
                      Isa isa);

}  // namespace rewrite_core
