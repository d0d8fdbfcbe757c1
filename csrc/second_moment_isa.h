// The part of second_moment that is compiled once per instruction set. No standard headers but the integer
// types: an inline function of theirs compiled here for AVX-512 might be the copy the linker keeps for all.
#pragma once

#include <stdint.h>

namespace rewrite_core {

// Kernels for one accumulation type. Features are packed into panels of `width` channels, [positions][width];
// one tile is `rows` channels (a divisor of width) by up to `panels` panels.
template <class Real>
struct SecondMomentKernels {
  int width;
  int rows;
  int panels;

  // Packs `count` <= max_run positions of `channels` <= width channels, and zeros for the missing ones.
  // dtype is DType's number; strides are in elements; scratch holds width * max_run Reals.
  void (*pack)(const void* features, int dtype, int64_t channel_stride, int64_t position_stride, int channels,
               int count, Real* packed, Real* scratch);

  // sums[rows][panel_count * width] += the products of one run, summed in Real, then widened.
  // row: `rows` neighbouring channels inside their panel; columns: panel_count panels, panel_stride apart.
  void (*tile)(const Real* row, const Real* columns, int64_t panel_stride, int panel_count, int run,
               double* sums);
};

// Positions summed in Real before widening to double, in short runs whose sums are then summed. A channel
// that repeats one value rounds the same way at every term, so errors add up: in float32 at worst 3.8e-6
// (relative) over a straight run of 256, 5.5e-7 over 8 short runs of 32. Many keys just too small to count
// beside one in their short run reach 1.9e-6.
constexpr int max_run = 256;
constexpr int short_run = 32;

struct SecondMomentTable {
  SecondMomentKernels<float> float32;
  SecondMomentKernels<double> float64;
};

namespace portable {
extern const SecondMomentTable second_moment_table;
}
namespace avx2 {
extern const SecondMomentTable second_moment_table;
}
namespace avx512 {
extern const SecondMomentTable second_moment_table;
}

}  // namespace rewrite_core
