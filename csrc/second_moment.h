// C += sum over positions of k k^T, for features read where they lie.
#pragma once

#include <cstdint>

#include "common.h"

namespace rewrite_core {

// features  element (n, c, h, w) at n*strides[0] + c*strides[1] + h*strides[2] + w*strides[3]; strides >= 0
// sizes     n, c, h, w (h = w = 1 for rows); any but c may be 0
// out       double [c, c], contiguous: its lower triangle is added to, then mirrored into the upper one
// threads   at most this many; the result has the same bits for any number
// isa       the instruction set to use, at most detect_isa()
// groups    of channels, c / groups one after the other, each with a matrix of its own: out is [groups, c / groups, c /
//           groups] then
Status second_moment(const void* features, DType dtype, const int64_t sizes[4], const int64_t strides[4], double* out,
                     int threads, Isa isa, int64_t groups = 1);

}  // namespace rewrite_core
