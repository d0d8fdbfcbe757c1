// How the fit is spread. A team of blocks has some channels for all steps, and nobody else's: channels never meet. Each
// of its blocks has a slice of the weights, for all of the team's channels:
//
//   in shared memory   the operator's rows of these weights, and their change
//   in registers       Adam's mean and power
//
// A step: what the changes add to the outputs, block by block; of a few channels each block adds up all blocks' parts,
// in their order, and makes the loss and its slopes; these go to all blocks; gradient and Adam's update. Products are
// on the tensor cores, each number in two parts of TF32, three products.
#pragma once

#include <cstdint>

#include "../gpu.h"

namespace rewrite_core {
namespace projected {

#if defined(__CUDACC__)
#define PROJECTED_BOTH __host__ __device__ constexpr
#else
#define PROJECTED_BOTH constexpr
#endif

constexpr int edge = 8;    // weights or pixels of a tile of the tensor cores
constexpr int strip = 16;  // and channels

// tiles        of weights that a warp has
// half         strips of channels that it has: two warps have those of the team
// warps        of a block
template <int tiles_, int half_, int warps_>
struct Form {
  static constexpr int own_tiles = tiles_, half = half_, warps = warps_;
  static constexpr int threads = warps * 32;
  static constexpr int strips = 2 * half, channels = strips * strip;
  static constexpr int shares = warps / 2;  // warps that share the weights out among them
  static constexpr int tiles = shares * own_tiles, rows = tiles * edge;
  static constexpr int sides = warps / strips;                 // warps that share the pixels of an output out
  static constexpr int together = own_tiles % 3 == 0 ? 3 : 1;  // tiles whose gradient is made at once
  static_assert(warps % 2 == 0 && warps % strips == 0 && sides > 0, "every warp has its part");
};

template <class Form>
struct Layout {
  int pixels, taps, blocks, width, stride, own;

  // Rows are a multiple of 8 apart that is none of 16: so the loads of a warp are of different banks.
  PROJECTED_BOTH Layout(int64_t pixels_, int64_t taps_, int blocks)
      : pixels(static_cast<int>(pixels_)),
        taps(static_cast<int>(taps_)),
        blocks(blocks),
        width((pixels + edge - 1) / edge * edge),
        stride(((width > taps ? width : taps) + 23) / 32 * 32 + 8),
        own(Form::channels / blocks) {}
};

// How many bytes each part takes; parts follow each other in this order, each from a multiple of 16 on. Those of
// constant size come first: where they are is then known to the compiler, and takes no register.
template <class Form>
struct Parts {
  static constexpr int64_t whole(int64_t floats) { return (4 * floats + 15) / 16 * 16; }
  static constexpr int64_t change = whole(Form::channels * Form::rows), square = whole(Form::rows);
  static constexpr int64_t norms = whole(Form::shares * Form::channels), bend = whole(Form::channels);
  static constexpr int64_t fold = whole(2 * Form::warps);
  int64_t buffer, maps, slopes, own_bend;

  PROJECTED_BOTH explicit Parts(const Layout<Form>& layout)
      : buffer(rounded(Form::channels * layout.stride)),
        maps(rounded(Form::rows * layout.stride)),
        slopes(rounded(layout.own * layout.width)),
        own_bend(rounded(layout.own)) {}
  PROJECTED_BOTH static int64_t rounded(int64_t floats) { return (4 * floats + 15) / 16 * 16; }
  PROJECTED_BOTH int64_t bytes() const {
    return change + square + norms + bend + fold + buffer + maps + slopes + own_bend;
  }
};

// A block's shared memory.
template <class Form>
struct Space {
  Layout<Form> layout;
  float* maps;      // [rows, stride]
  float* change;    // [strips, tiles, 32 lanes, 4]: as the tensor cores give and take it
  float* buffer;    // [channels, stride]: what this block adds to the outputs; then slopes by the outputs; then what it
                    // adds to products with directions
  float* slopes;    // [own, width]: those of the channels that this block adds up
  float* square;    // [rows]
  float* norms;     // [shares, channels]: what each share adds to demodulation's norm
  float* bend;      // [channels]: the loss's slope by the norm, twice
  float* own_bend;  // [own]
  double* fold;     // [warps]

  GPU_FUNCTION explicit Space(const Layout<Form>& layout) : layout(layout) {
    const Parts<Form> parts(layout);
    char* at = gpu::shared();
    change = take(at, parts.change);
    square = take(at, parts.square);
    norms = take(at, parts.norms);
    bend = take(at, parts.bend);
    fold = reinterpret_cast<double*>(take(at, parts.fold));
    buffer = take(at, parts.buffer);
    maps = take(at, parts.maps);
    slopes = take(at, parts.slopes);
    own_bend = take(at, parts.own_bend);
  }
  GPU_FUNCTION static float* take(char*& at, int64_t bytes) {
    float* const found = reinterpret_cast<float*>(at);
    at += bytes;
    return found;
  }
  GPU_FUNCTION int rank() const { return layout.blocks > 1 ? gpu::rank() : 0; }
  GPU_FUNCTION int first_own() const { return rank() * layout.own; }  // of the team's channels
  GPU_FUNCTION int64_t first_channel() const { return static_cast<int64_t>(gpu::team()) * Form::channels; }
  GPU_FUNCTION int first_row() const { return rank() * Form::rows; }  // of all weights
  GPU_FUNCTION float* tile(int strip_, int tile_) const {             // this lane's four numbers
    return change + ((strip_ * Form::tiles + tile_) * gpu::warp_size + gpu::lane()) * 4;
  }
};

// Which row of a tile the tensor cores' column is: so chosen that neither product has two lanes at one bank.
GPU_FUNCTION int row_of(int column) { return column < 4 ? column : column ^ 1; }

// What this warp has of the weights and channels for Adam.
template <class Form>
GPU_FUNCTION int own_strip() {
  return gpu::warp() % 2 * Form::half;
}
template <class Form>
GPU_FUNCTION int own_tile() {
  return gpu::warp() / 2 * Form::own_tiles;
}

// Every barrier of the kernel by its number.
enum Barrier : int {
  ready,
  partials_there,
  partials_read,
  slopes_there,
  updated,
  products_there,
  products_read,
  projected_there,
  barriers
};

using gpu::peer;
using gpu::sync_team;

// The sum over a warp's lanes, in all of them. Together.
template <class T>
GPU_FUNCTION T fold_warp(T value) {
  for (int mask = gpu::warp_size / 2; mask > 0; mask /= 2) value += gpu::shuffle_xor(value, mask);
  return value;
}

// A number that all blocks of the team have at the same place, added up in their order.
template <bool many>
GPU_FUNCTION float fold_team(float* mine, int blocks) {
  float total = *peer<many>(mine, 0);
  if (many) {
    GPU_UNROLL_BY_4
    for (int rank = 1; rank < blocks; ++rank) total += *peer<many>(mine, rank);
  }
  return total;
}

}  // namespace projected
}  // namespace rewrite_core
