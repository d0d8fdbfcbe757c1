// Cholesky factors of symmetric positive definite matrices, and solves with them, in double.
#pragma once

#include <cstdint>

#include "common.h"

namespace rewrite_core {

// Of each matrix [n, n]: its mean diagonal, its largest absolute diagonal entry, and the largest difference between an
// entry and its mirror image, which is NaN where anything is not finite. found [batch, 3].
Status examine(const double* matrices, int64_t batch, int64_t n, double* found, int threads);

// matrices  [batch, n, n], each contiguous row-major; the lower triangle is read
// lower     [batch, n, n]: L (A = L L^T), its upper triangle zeros
// info      [batch]: 0, or the 1-based number of the first pivot that is not above `least` times its diagonal entry and
//           so may be nothing but rounding (of one that is not positive L is left half done)
// The result has the same bits for any number of threads.
Status cholesky(const double* matrices, double* lower, int64_t batch, int64_t n, double least, int64_t* info,
                int threads, Isa isa);

// Sums of each matrix's equations, with weights W that look like chance. With them a solve sees whether A x = b, in
// steps of n: W A x = W b is all but sure to fail where A x = b does.
// sketches [batch, n, 2, sketch_rows]: columns of W, which make up for the sizes of A's rows, and of W A; the same bits
//          for any number of threads
constexpr int64_t sketch_rows = 2;
Status sketch(const double* matrices, int64_t batch, int64_t n, double* sketches, int threads, Isa isa);

// Solves A x = b with the factor L of A = L L^T: x and rhs [batch, n, m]. What is not solved to rounding error (the
// residual of a mixture of the right-hand sides tells, see spd_solve.cpp) is refined once.
// sketches  of the matrices; or null, and each solve reads the matrices to see its residual
// finite    whether every number of rhs is; where one is not, x holds nothing
Status cholesky_solve(const double* matrices, const double* lower, const double* sketches, int64_t batch, int64_t n,
                      const double* rhs, int64_t m, double* x, bool& finite, int threads, Isa isa);

// What a matrix must be for `spd_solve` to go on.
struct SPDLimits {
  double asymmetry;      // largest |a_ij - a_ji|, of the largest diagonal entry
  double smallest_mean;  // of the diagonal
  double least;          // of each pivot, of its diagonal entry
};

// All of it in one call: examine, factor, solve.
// good  whether every matrix is within `limits` and every number finite; else x holds nothing
Status spd_solve(const double* matrices, int64_t batch, int64_t n, const SPDLimits& limits, const double* rhs,
                 int64_t m, double* x, bool& good, int threads, Isa isa);

}  // namespace rewrite_core
