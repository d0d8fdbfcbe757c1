// Solves with the factor, for 8 right-hand sides at a time, and the residual.
//
// Substitution in a diagonal block is done by every block for itself, a warp a right-hand side; the products with the
// rest of the factor by the blocks that have its rows.
#pragma once

#include "factor.h"
#include "load.h"

namespace rewrite_core {
namespace spd {

// x of a panel, in place: L y = c, or with `transposed` L^T x = y.
template <bool transposed>
GPU_FUNCTION void substitute(const Space& space, int k) {
  const int lane = gpu::lane();
  const double scale = space.inverse[k + lane];
  for (int side = gpu::warp(); side < sides; side += gpu::warps()) {
    double* const to = space.x + (k + lane) * side_stride + side;
    double value = *to;
    GPU_UNROLL
    for (int at = 0; at < panel; ++at) {
      const int j = transposed ? panel - 1 - at : at;
      const double solved = gpu::shuffle(value * scale, j);
      const int from = transposed ? j * diagonal_stride + lane : lane * diagonal_stride + j;
      if (lane == j) value = solved;
      if (transposed ? lane < j : lane > j) value -= space.diagonal[from] * solved;
    }
    *to = value;
  }
}

// L y = c with c in the blocks' own rows; y comes to x, in every block.
template <bool many>
GPU_FUNCTION void solve_forward(const Space& space) {
  const Layout& layout = space.layout;
  const int row = gpu::lane() / 4, inner = gpu::lane() % 4;
  for (int k = 0; k < layout.n; k += panel) {
    if (many) gpu::sync_team<sides_there>();
    copy_diagonal<many>(space, k);
    for (int at = gpu::thread(); at < panel * sides; at += gpu::threads()) {
      const int i = k + at / sides, side = at % sides, g = i / group;
      double* const to = space.x + i * side_stride + side;
      if (g >= layout.groups) {
        *to = 0;
      } else if (many) {  // one block alone has its rows there
        *to = *gpu::peer(space.own + (g / layout.blocks * group + i % group) * side_stride + side, g % layout.blocks);
      }
    }
    gpu::sync_block<side_block_there>();
    substitute<false>(space, k);
    gpu::sync_block<side_block_solved>();
    const int first = layout.first_from((k + panel) / group, gpu::rank());
    for (int mine = first + gpu::warp(); mine < space.own_groups(); mine += gpu::warps()) {
      const int g = space.group_of(mine);
      const double* const rows = space.rows_of(g) + row * Layout::stride(g) + k + inner;
      double* const to = space.own + (mine * group + row) * side_stride + 2 * inner;
      double c[2] = {to[0], to[1]};
      GPU_UNROLL
      for (int s = 0; s < steps; ++s) {
        gpu::mma(c, -rows[4 * s], space.x[(k + 4 * s + inner) * side_stride + row]);
      }
      to[0] = c[0], to[1] = c[1];
    }
  }
}

// What this block's rows below the panel add to L^T x there: a warp 8 rows of the sum, and one part of the rows.
GPU_FUNCTION void sum_below(const Space& space, int k, double* partial) {
  const int row = gpu::lane() / 4, inner = gpu::lane() % 4, parts = Parts::parts(gpu::warps());
  const int first = space.layout.first_from((k + panel) / group, gpu::rank());
  for (int task = gpu::warp(); task < panel / group * parts; task += gpu::warps()) {
    const int tile = task % (panel / group), part = task / (panel / group);
    double c[2] = {0, 0};
    for (int mine = first + part; mine < space.own_groups(); mine += parts) {
      const int g = space.group_of(mine), stride = Layout::stride(g);
      const double* const rows = space.rows_of(g) + k + group * tile + row;
      GPU_UNROLL
      for (int s = 0; s < 2; ++s) {
        const int inside = 4 * s + inner;
        gpu::mma(c, rows[inside * stride], space.x[(group * g + inside) * side_stride + row]);
      }
    }
    double* const to = partial + (part * panel + group * tile + row) * side_stride + 2 * inner;
    to[0] = c[0], to[1] = c[1];
  }
}

// L^T x = y, in place in x, in every block.
template <bool many>
GPU_FUNCTION void solve_backward(const Space& space) {
  const Layout& layout = space.layout;
  const int parts = Parts::parts(gpu::warps());
  for (int k = layout.rounded() - panel; k >= 0; k -= panel) {
    // in turns, as other blocks may still read the last one
    double* const partial = space.partial + k / panel % 2 * parts * panel * side_stride;
    sum_below(space, k, partial);
    sync_team<many, partials_there>();
    copy_diagonal<many>(space, k);
    for (int at = gpu::thread(); at < panel * sides; at += gpu::threads()) {
      const int i = at / sides, side = at % sides;
      double sum = 0;
      for (int rank = 0; rank < layout.blocks; ++rank) {
        const double* const theirs = peer<many>(partial, rank);
        for (int part = 0; part < parts; ++part) sum += theirs[(part * panel + i) * side_stride + side];
      }
      space.x[(k + i) * side_stride + side] -= sum;
    }
    gpu::sync_block<back_block_there>();
    substitute<true>(space, k);
    gpu::sync_block<back_block_solved>();
  }
}

// Right-hand sides `from`, ..., `from` + 7, or solutions: those of one system, [n, sides] in memory.
struct Sides {
  int64_t all, from;

  GPU_FUNCTION bool has(int side) const { return from + side < all; }
  GPU_FUNCTION int64_t at(int i, int side) const { return i * all + from + side; }
};

// This block's own rows of the right-hand sides. The threads are those of store_solution(), so that neither waits.
GPU_FUNCTION void load_sides(const Space& space, const double* rhs, Sides which) {
  for (int at = gpu::thread(); at < space.own_groups() * group * sides; at += gpu::threads()) {
    const int mine = at / sides, side = at % sides, i = space.group_of(mine / group) * group + mine % group;
    const bool inside = i < space.layout.n && which.has(side);
    space.own[mine * side_stride + side] = inside ? gpu::load(rhs + which.at(i, side)) : 0;
  }
}

// A residual is at rounding error where no entry of b - A x is above this times |A| |x| + |b|, as on the CPU.
constexpr double solved_to = 32 * 2.220446049250313e-16;

struct System {
  const double* matrix;  // [n, n]
  double shift, mean;    // of its diagonal
  const double* rhs;
  double* out;
};

// Writes b - A x to `out`. Returns how many of this thread's entries are above rounding error; NaN is not.
GPU_FUNCTION int store_residual(const Space& space, const System& system, Sides which) {
  const int n = space.layout.n, row = gpu::lane() / 4, inner = gpu::lane() % 4;
  int above = 0;
  for (int mine = gpu::warp(); mine < space.own_groups(); mine += gpu::warps()) {
    const int i = space.group_of(mine) * group + row;
    double c[2], size[2];
    for (int side = 0; side < 2; ++side) {
      const bool inside = i < n && which.has(2 * inner + side);
      c[side] = inside ? gpu::load(system.rhs + which.at(i, 2 * inner + side)) : 0;
      size[side] = c[side] < 0 ? -c[side] : c[side];
    }
    for (int k = 0; k < n; k += panel) {
      double a[steps];
      GPU_UNROLL
      for (int s = 0; s < steps; ++s) {
        const int j = k + 4 * s + inner;
        a[s] = i < n && j < n ? gpu::load(system.matrix + static_cast<int64_t>(i) * n + j) : 0;
        if (i == j) a[s] = shifted(a[s], system.shift, system.mean);
      }
      GPU_UNROLL
      for (int s = 0; s < steps; ++s) {
        const double b = space.x[(k + 4 * s + inner) * side_stride + row];
        gpu::mma(c, -a[s], b);
        gpu::mma(size, a[s] < 0 ? -a[s] : a[s], b < 0 ? -b : b);
      }
    }
    for (int side = 0; side < 2; ++side) {
      if (i < n && which.has(2 * inner + side)) {
        system.out[which.at(i, 2 * inner + side)] = c[side];
        above += (c[side] < 0 ? -c[side] : c[side]) > solved_to * size[side];
      }
    }
  }
  return above;
}

// x goes out. With `swap` what was there comes in as the next right-hand sides; with `add` x is added to it.
template <bool swap, bool add>
GPU_FUNCTION void store_solution(const Space& space, const System& system, Sides which) {
  for (int at = gpu::thread(); at < space.own_groups() * group * sides; at += gpu::threads()) {
    const int mine = at / sides, side = at % sides, i = space.group_of(mine / group) * group + mine % group;
    const bool inside = i < space.layout.n && which.has(side);
    double* const to = system.out + which.at(i, side);
    const double before = inside && (swap || add) ? *to : 0;
    const double value = space.x[i * side_stride + side];
    if (inside) *to = add ? before + value : value;
    if (swap) space.own[mine * side_stride + side] = before;
  }
}

GPU_FUNCTION void store_nan(const Space& space, const System& system, Sides which) {
  for (int at = gpu::thread(); at < space.own_groups() * group * sides; at += gpu::threads()) {
    const int mine = at / sides, side = at % sides, i = space.group_of(mine / group) * group + mine % group;
    if (i < space.layout.n && which.has(side)) system.out[which.at(i, side)] = gpu::not_a_number();
  }
}

// Solves, looks at the residual, and where that is above rounding error refines once.
template <bool many>
GPU_FUNCTION void solve_sides(const Space& space, const System& system, Sides which) {
  load_sides(space, system.rhs, which);
  solve_forward<many>(space);
  solve_backward<many>(space);
  const int above = store_residual(space, system, which);
  const bool refine = largest_in_team<many>(space, above, 2) > 0;  // its barriers: the residual is there
  if (!refine) {
    store_solution<false, false>(space, system, which);
    return;
  }
  store_solution<true, false>(space, system, which);
  solve_forward<many>(space);
  solve_backward<many>(space);
  store_solution<false, true>(space, system, which);
}

}  // namespace spd
}  // namespace rewrite_core
