// The part of second_moment that is compiled once per instruction set. No standard headers but the integer
// types: an inline function of theirs compiled here for AVX-512 might be the copy the linker keeps for all.
#pragma once

#include <stdint.h>

#include "simd.h"

namespace rewrite_core {

// Keys are packed in runs of run_bytes per channel: a channel's values at neighbouring positions lie next to each
// other, zeros fill the run up to whole vectors, and key_stride bytes on lies the next channel: neighbours fall into
// different sets of the cache, and with a constant all of a tile's addresses are one register and a number.
constexpr int run_bytes = 2048;
constexpr int key_stride = run_bytes + 64;
constexpr int most_block_rows = 96;  // of add_mirrored
constexpr int most_lanes = 8;        // of doubles

// What a tile does at each of its steps besides, where it costs next to nothing: it asks the cache for a line and, if
// `to` is not null, copies a vector of features to where the next keys are packed. Offsets in bytes, one per step.
struct Meanwhile {
  uintptr_t ahead;
  const int64_t* ahead_offsets;
  const char* from;
  const int64_t* from_offsets;
  char* to;  // vector after vector
};

// The kernels for one packed type. Positions lie along a vector's lanes, so products are of whole runs, and their
// lanes are added up at the end of a run.
//
// A lane sums at most 32 products (64 of bfloat16) in the packed type (float for bfloat16); at most four such sums and
// the lanes are added up before they are widened to double. A channel that repeats one value rounds the same way at
// every term, so errors add up: in float32 at worst 3.8e-6 (relative) over 256 terms and an eighth of that over 32.
// Sums of as few bfloat16 squares as these are exact where all are the same.
struct SecondMomentKernels {
  int element;  // bytes of a packed element
  int vector;   // elements that `steps` counts by
  int rows;     // of a tile, at most
  int columns;  // of a tile: channels are padded with zeros to a multiple
  int panel;    // channels that are packed together: a multiple of `columns`

  // Packs `count` positions of `channels` <= panel channels from `from` (position 0 of the first channel) to `to`.
  // dtype is DType's number; strides are in elements.
  void (*pack)(const void* from, int dtype, int64_t channel_stride, int64_t position_stride, int channels, int count,
               void* to);

  // out[i][j] += sum over the run of row i times column j, for `row_count` <= rows and all columns. `meanwhile` may
  // be null.
  void (*tile)(const void* rows, int row_count, const void* columns, int steps, double* out, int64_t out_stride,
               const Meanwhile* meanwhile);

  // The same for the products j <= i of the first `channels` <= columns channels from `block`.
  void (*diagonal)(const void* block, int channels, int steps, double* out, int64_t out_stride);

  // Of each of `count` groups of `size` <= columns channels, one after the other from `block`: out[group][i][j] += the
  // products j <= i of its channels; out is [count, size, size]. Reads `columns` channels from each group's first on.
  void (*blocks)(const void* block, int size, int count, int steps, double* out);

  // sums[c] += the squares of channel c at `count` positions, for `channels` channels that are neighbours in memory.
  void (*squares)(const void* from, int dtype, int64_t position_stride, int64_t channels, int count, double* sums);

  // Few keys: to[position][channel] = those of `count` positions, as doubles; strides as pack's, `stride` is to's.
  void (*doubles)(const void* from, int dtype, int64_t channel_stride, int64_t position_stride, int64_t channels,
                  int count, double* to, int64_t stride);

  // Rows [row, row_end) of the [n, n] matrix `sums`: adds the products of such keys where column <= row, and writes the
  // result to the mirror image too. `keys` has lines of `stride`, whole vectors, and is aligned to them; numbers beyond
  // channel n may be anything. `row` is a multiple of most_lanes, and so is row_end or it is n. Asks the cache for row
  // next_row, where it is not negative.
  void (*outer)(const double* keys, int64_t stride, int positions, int64_t row, int64_t row_end, int64_t n,
                double* sums, int64_t next_row);

  // Adds the products in `part` of channels rows[0] <= i < rows[1], at most most_block_rows, by channels columns[0] <=
  // j < columns[1] to the [n, n] matrix `sums` where j <= i, and writes the result to the mirror image too. Changes
  // `part`.
  void (*add_mirrored)(double* part, int64_t part_stride, const int64_t rows[2], const int64_t columns[2], int64_t n,
                       double* sums);
};

struct SecondMomentTable {
  SecondMomentKernels float32;
  SecondMomentKernels float64;
  SecondMomentKernels bfloat16;  // needs AVX512_BF16; elsewhere element is 0 and bfloat16 is widened to float32
};

REWRITE_CORE_PER_ISA(SecondMomentTable, second_moment_table)

}  // namespace rewrite_core
