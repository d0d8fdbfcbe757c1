// Where a team of blocks keeps a matrix and its right-hand sides in shared memory.
//
// The lower triangle by groups of 8 rows, group g in block g % blocks: 8 (g + 1) columns, and 4 that are never used, so
// that the tensor cores' operands of 8 rows lie in different banks. The last group is filled up with rows of the unit
// matrix. Each block has all of x; right-hand sides and residuals, by rows, are with their groups.
#pragma once

#include <cstdint>

#include "../gpu.h"

namespace rewrite_core {
namespace spd {

constexpr int group = 8;          // rows and columns of a product of the tensor cores
constexpr int panel = 32;         // columns that are factored at a time
constexpr int steps = panel / 4;  // products of 4 columns that a panel takes
constexpr int sides = 8;          // right-hand sides that are solved for at a time
constexpr int side_stride = 12;   // numbers from one row of them to the next
constexpr int diagonal_stride = panel + 1;
constexpr int mails = 4;

#if defined(__CUDACC__)
#define SPD_BOTH __host__ __device__
#else
#define SPD_BOTH
#endif

struct Layout {
  int n, groups, blocks;

  SPD_BOTH Layout(int n, int blocks) : n(n), groups((n + group - 1) / group), blocks(blocks) {}
  SPD_BOTH int padded() const { return groups * group; }
  SPD_BOTH int rounded() const { return (n + panel - 1) / panel * panel; }
  SPD_BOTH int most_groups() const { return (groups + blocks - 1) / blocks; }  // of one block
  SPD_BOTH int own_groups(int rank) const { return (groups - rank + blocks - 1) / blocks; }
  SPD_BOTH int first_from(int g, int rank) const { return g <= rank ? 0 : (g - rank + blocks - 1) / blocks; }
  SPD_BOTH static int stride(int g) { return group * (g + 1) + 4; }

  // Of a group's first number in its block: what the groups before it there take.
  SPD_BOTH int offset(int g) const {
    const int before = g / blocks, rank = g % blocks;
    return before * group * stride(rank) + group * group * blocks * (before * (before - 1) / 2);
  }
  SPD_BOTH int rows_count() const { return offset(blocks * most_groups() + blocks - 1); }  // the last block has most
};

// How many numbers each part takes; parts follow each other in this order.
struct Parts {
  int rows, x, own, diagonal, inverse, partial, column, fold, mail;

  SPD_BOTH Parts(const Layout& layout, int warps)
      : rows(layout.rows_count()),
        x(layout.rounded() * side_stride),
        own(layout.blocks > 1 ? layout.most_groups() * group * side_stride : 0),
        diagonal(panel * diagonal_stride),
        inverse(layout.rounded()),
        partial(2 * parts(warps) * panel * side_stride),
        column(2 * panel),
        fold(warps),
        mail(mails) {}
  SPD_BOTH static int parts(int warps) { return warps < 4 ? 1 : warps / 4; }
  SPD_BOTH int64_t bytes() const {
    return 8 * static_cast<int64_t>(rows + x + own + diagonal + inverse + partial + column + fold + mail);
  }
};

// A block's shared memory.
struct Space {
  Layout layout;
  double* rows;      // of the matrix, then of its factor
  double* x;         // [rounded, sides]
  double* own;       // [own rows, sides]: what is left of the right-hand sides; one block alone: x itself
  double* diagonal;  // [panel, panel]: a copy of the factor's diagonal block, filled up with the unit matrix
  double* inverse;   // [rounded]: one over the factor's diagonal; before, what each pivot must be above
  double* partial;   // [2, parts, panel, sides]: sums of one block
  double* column;    // [2, panel]
  double* fold;      // [warps]
  double* mail;      // what the blocks tell each other, and what one warp tells the others

  GPU_FUNCTION explicit Space(const Layout& layout) : layout(layout) {
    const Parts parts(layout, gpu::warps());
    rows = reinterpret_cast<double*>(gpu::shared());
    x = rows + parts.rows;
    own = layout.blocks > 1 ? x + parts.x : x;
    diagonal = x + parts.x + parts.own;
    inverse = diagonal + parts.diagonal;
    partial = inverse + parts.inverse;
    column = partial + parts.partial;
    fold = column + parts.column;
    mail = fold + parts.fold;
  }
  GPU_FUNCTION int own_groups() const { return layout.own_groups(gpu::rank()); }
  GPU_FUNCTION int group_of(int mine) const { return gpu::rank() + layout.blocks * mine; }
  GPU_FUNCTION double* rows_of(int g) const { return rows + layout.offset(g); }  // in the block that has them
};

// Every barrier of the kernel by its number.
// All but `sides_there`, `mails_sent`, `before_reload` and `before_end`, which are a cluster's, are one block's too.
enum Barrier : int {
  folded,
  fold_read,
  mails_sent,
  rows_there,
  diagonal_there,
  diagonal_factored,
  panel_solved,
  column_written,
  sides_there,
  side_block_there,
  side_block_solved,
  partials_there,
  back_block_there,
  back_block_solved,
  before_reload,
  factor_there,
  before_end,
  barriers
};

using gpu::peer;
using gpu::sync_team;

// NaN wins.
GPU_FUNCTION double larger(double a, double b) { return a > b || a != a ? a : b; }

// Of all threads' values, in every thread: their sum or, with `largest`, the largest; in an order that is always the
// same.
template <bool largest>
GPU_FUNCTION double fold_block(const Space& space, double value) {
  for (int mask = gpu::warp_size / 2; mask > 0; mask /= 2) {
    const double other = gpu::shuffle_xor(value, mask);
    value = largest ? larger(value, other) : value + other;
  }
  if (gpu::lane() == 0) space.fold[gpu::warp()] = value;
  gpu::sync_block<folded>();
  value = space.fold[0];
  for (int w = 1; w < gpu::warps(); ++w) value = largest ? larger(value, space.fold[w]) : value + space.fold[w];
  gpu::sync_block<fold_read>();
  return value;
}

// The largest of all threads of the team. A mail box is used again only after another barrier of the team.
template <bool many>
GPU_FUNCTION double largest_in_team(const Space& space, double value, int box) {
  value = fold_block<true>(space, value);
  if (!many) return value;
  if (gpu::thread() == 0) space.mail[box] = value;
  gpu::sync_team<mails_sent>();
  value = *gpu::peer(space.mail + box, 0);
  for (int rank = 1; rank < space.layout.blocks; ++rank) value = larger(value, *gpu::peer(space.mail + box, rank));
  return value;
}

}  // namespace spd
}  // namespace rewrite_core
