// The Cholesky factor, in place: panels of 32 columns. Every block factors the panel's diagonal block for itself,
// solves for its own rows below, and subtracts their products with the other blocks' rows from its own.
#pragma once

#include "layout.h"

namespace rewrite_core {
namespace spd {

// The diagonal block from column k on, from the blocks that have its rows.
template <bool many>
GPU_FUNCTION void copy_diagonal(const Space& space, int k) {
  const Layout& layout = space.layout;
  for (int at = gpu::thread(); at < panel * panel; at += gpu::threads()) {
    const int i = at / panel, j = at % panel, g = (k + i) / group;
    double value = i == j ? 1 : 0;
    if (g < layout.groups && j <= i) {
      value = peer<many>(space.rows_of(g), g % layout.blocks)[(k + i) % group * Layout::stride(g) + k + j];
    }
    space.diagonal[i * diagonal_stride + j] = value;
  }
}

// By one warp, a lane a row: L of the diagonal block, and one over its diagonal. Returns 0, or which pivot is bad.
GPU_FUNCTION int factor_diagonal(const Space& space, int k) {
  const int lane = gpu::lane();
  double row[panel];
  GPU_UNROLL
  for (int j = 0; j < panel; ++j) row[j] = space.diagonal[lane * diagonal_stride + j];
  const double limit = space.inverse[k + lane];
  double mine = 1;
  int bad = 0;
  GPU_UNROLL
  for (int j = 0; j < panel; ++j) {
    const double pivot = gpu::shuffle(row[j], j), least = gpu::shuffle(limit, j);
    if (!bad && !(pivot > least)) bad = j + 1;  // also NaN; the same in all lanes
    const double scale = gpu::inverse_root(bad ? 1 : pivot);
    row[j] *= scale;
    if (lane == j) mine = scale;
    double* const column = space.column + j % 2 * panel;
    column[lane] = row[j];
    gpu::sync_warp<column_written>();
    GPU_UNROLL
    for (int l = j + 1; l < panel; ++l) row[l] -= row[j] * column[l];
  }
  GPU_UNROLL
  for (int j = 0; j < panel; ++j) space.diagonal[lane * diagonal_stride + j] = j <= lane ? row[j] : 0;
  space.inverse[k + lane] = mine;
  return bad ? k + bad : 0;
}

// This block's rows below the panel: x L^T = a, a thread a row.
GPU_FUNCTION void solve_panel(const Space& space, int k) {
  const int first = space.layout.first_from((k + panel) / group, gpu::rank());
  const int count = group * (space.own_groups() - first);
  for (int at = gpu::thread(); at < count; at += gpu::threads()) {
    const int g = space.group_of(first + at / group);
    double* const to = space.rows_of(g) + at % group * Layout::stride(g) + k;
    double row[panel];
    GPU_UNROLL
    for (int j = 0; j < panel; ++j) row[j] = to[j];
    GPU_UNROLL
    for (int j = 0; j < panel; ++j) {
      row[j] *= space.inverse[k + j];
      GPU_UNROLL
      for (int l = j + 1; l < panel; ++l) row[l] -= row[j] * space.diagonal[l * diagonal_stride + j];
    }
    GPU_UNROLL
    for (int j = 0; j < panel; ++j) to[j] = row[j];
  }
}

// What is right of the panel in this block's rows: a_ij -= l_ik . l_jk, a warp a group j of columns. Its operand comes
// from the block that has the rows j, once.
template <bool many>
GPU_FUNCTION void update_rest(const Space& space, int k) {
  const Layout& layout = space.layout;
  const int row = gpu::lane() / 4, inner = gpu::lane() % 4;
  for (int j = (k + panel) / group + gpu::warp(); j < layout.groups; j += gpu::warps()) {
    const double* const other = peer<many>(space.rows_of(j), j % layout.blocks) + row * Layout::stride(j) + k + inner;
    double b[steps];
    GPU_UNROLL
    for (int s = 0; s < steps; ++s) b[s] = other[4 * s];
    for (int mine = layout.first_from(j, gpu::rank()); mine < space.own_groups(); ++mine) {
      const int g = space.group_of(mine);
      double* const rows = space.rows_of(g) + row * Layout::stride(g);
      double* const to = rows + group * j + 2 * inner;
      double c[2] = {to[0], to[1]};
      GPU_UNROLL
      for (int s = 0; s < steps; ++s) gpu::mma(c, -rows[k + 4 * s + inner], b[s]);
      to[0] = c[0], to[1] = c[1];
    }
  }
}

// The factored diagonal block, to the rows of it that are this block's.
GPU_FUNCTION void store_diagonal(const Space& space, int k) {
  for (int at = gpu::thread(); at < panel * panel; at += gpu::threads()) {
    const int i = at / panel, j = at % panel, g = (k + i) / group;
    if (g < space.layout.groups && g % space.layout.blocks == gpu::rank() && k + j < group * (g + 1)) {
      space.rows_of(g)[(k + i) % group * Layout::stride(g) + k + j] = space.diagonal[i * diagonal_stride + j];
    }
  }
}

// Returns 0, or the first bad pivot, from 1 on: the same in all threads of the team, and then the rows hold nothing.
template <bool many>
GPU_FUNCTION int factor_rows(const Space& space) {
  for (int k = 0; k < space.layout.n; k += panel) {
    sync_team<many, rows_there>();
    copy_diagonal<many>(space, k);
    gpu::sync_block<diagonal_there>();
    if (gpu::warp() == 0) {
      const int bad = factor_diagonal(space, k);
      if (gpu::lane() == 0) space.mail[0] = bad;
    }
    gpu::sync_block<diagonal_factored>();
    const int bad = static_cast<int>(space.mail[0]);
    if (bad) return bad;
    solve_panel(space, k);
    sync_team<many, panel_solved>();
    update_rest<many>(space, k);
    store_diagonal(space, k);
  }
  return 0;
}

}  // namespace spd
}  // namespace rewrite_core
