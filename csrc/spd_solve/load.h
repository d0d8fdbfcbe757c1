// The matrix: examined, brought to shared memory with its shift, written back.
#pragma once

#include "../spd_solve_cuda.h"
#include "layout.h"

namespace rewrite_core {
namespace spd {

struct Facts {
  double mean, largest, difference;
};

// A diagonal entry with a shift in proportion to it; a dead channel's as if it were of mean size.
GPU_FUNCTION double shifted(double entry, double shift, double mean) {
  return shift > 0 ? entry + shift * (entry > 0 ? entry : mean) : entry;
}

// Each block reads all of the diagonal, so that none waits for another's.
GPU_FUNCTION Facts examine_diagonal(const Space& space, const double* given) {
  const int n = space.layout.n;
  double sum = 0, largest = 0;
  for (int i = gpu::thread(); i < n; i += gpu::threads()) {
    const double entry = gpu::load(given + static_cast<int64_t>(i) * (n + 1));
    sum += entry;
    largest = larger(entry < 0 ? -entry : entry, largest);
  }
  sum = fold_block<false>(space, sum);
  return Facts{sum / n, fold_block<true>(space, largest), 0};
}

// The largest |a_ij - a_ji| of this block's groups of rows, NaN where anything is not finite: tiles of 8 x 8, a few at
// a time, so that their loads do not wait for each other.
GPU_FUNCTION double examine_symmetry(const Space& space, const double* given) {
  constexpr int at_once = 4;
  const int n = space.layout.n, row = gpu::lane() / 4, column = 2 * (gpu::lane() % 4);
  double worst = 0, poison = 0;
  for (int mine = 0; mine < space.own_groups(); ++mine) {
    const int g = space.group_of(mine);
    for (int first = gpu::warp(); first <= g; first += at_once * gpu::warps()) {
      double apart[at_once][2];
      GPU_UNROLL
      for (int tile = 0; tile < at_once; ++tile) {
        const int h = first + tile * gpu::warps();
        GPU_UNROLL
        for (int which = 0; which < 2; ++which) {
          const int64_t i = group * g + row, j = group * h + column + which;
          const bool inside = h <= g && i < n && j < n;
          apart[tile][which] = inside ? gpu::load(given + i * n + j) - gpu::load(given + j * n + i) : 0;
        }
      }
      GPU_UNROLL
      for (int tile = 0; tile < at_once; ++tile) {
        GPU_UNROLL
        for (int which = 0; which < 2; ++which) {
          const double value = apart[tile][which];
          worst = larger(value < 0 ? -value : value, worst);
          poison += value - value;
        }
      }
    }
  }
  return worst + poison;
}

// This block's rows of a lower triangle. What it lacks to whole groups is the unit matrix's.
GPU_FUNCTION void load_rows(const Space& space, const double* from, double shift, double mean) {
  constexpr int at_once = 4;
  const int n = space.layout.n, row = gpu::lane() / 4, column = 2 * (gpu::lane() % 4);
  for (int mine = 0; mine < space.own_groups(); ++mine) {
    const int g = space.group_of(mine), stride = Layout::stride(g);
    double* const to = space.rows_of(g) + row * stride + column;
    for (int first = gpu::warp(); first <= g; first += at_once * gpu::warps()) {
      double values[at_once][2];
      GPU_UNROLL
      for (int tile = 0; tile < at_once; ++tile) {
        const int h = first + tile * gpu::warps();
        GPU_UNROLL
        for (int which = 0; which < 2; ++which) {
          const int64_t i = group * g + row, j = group * h + column + which;
          values[tile][which] = i == j ? 1 : 0;
          if (j <= i && i < n) values[tile][which] = gpu::load(from + i * n + j);
          if (i == j && i < n) values[tile][which] = shifted(values[tile][which], shift, mean);
        }
      }
      GPU_UNROLL
      for (int tile = 0; tile < at_once; ++tile) {
        const int h = first + tile * gpu::warps();
        if (h <= g) {
          to[group * h] = values[tile][0];
          to[group * h + 1] = values[tile][1];
        }
      }
    }
  }
}

// What each pivot must be above.
GPU_FUNCTION void load_limits(const Space& space, const double* matrix, double least, double shift, double mean) {
  const int n = space.layout.n;
  for (int i = gpu::thread(); i < space.layout.rounded(); i += gpu::threads()) {
    const double entry = i < n ? shifted(gpu::load(matrix + static_cast<int64_t>(i) * (n + 1)), shift, mean) : 0;
    space.inverse[i] = larger(least * entry, 0);
  }
}

// One over the diagonal of a factor that is there already.
GPU_FUNCTION void load_inverse(const Space& space, const double* factor) {
  const int n = space.layout.n;
  for (int i = gpu::thread(); i < space.layout.rounded(); i += gpu::threads()) {
    space.inverse[i] = i < n ? 1 / gpu::load(factor + static_cast<int64_t>(i) * (n + 1)) : 1;
  }
}

// The factor's rows of this block, zero above the diagonal.
GPU_FUNCTION void store_rows(const Space& space, double* lower) {
  const int n = space.layout.n;
  for (int mine = 0; mine < space.own_groups(); ++mine) {
    const int g = space.group_of(mine), stride = Layout::stride(g);
    const double* const from = space.rows_of(g);
    for (int row = gpu::warp(); row < group; row += gpu::warps()) {
      const int i = group * g + row;
      for (int j = gpu::lane(); i < n && j < n; j += gpu::warp_size) {
        lower[static_cast<int64_t>(i) * n + j] = j <= i ? from[row * stride + j] : 0;
      }
    }
  }
}

}  // namespace spd
}  // namespace rewrite_core
