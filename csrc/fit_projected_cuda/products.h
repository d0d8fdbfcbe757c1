// The two products of a step.
#pragma once

#include "layout.h"

namespace rewrite_core {
namespace projected {

// Numbers in two parts of TF32, 22 bits together. By bits: the conversion that rounds is six instructions a number,
// more than the products take.
template <int count>
struct Split {
  float big[count], small[count];

  GPU_FUNCTION explicit Split(const float (&values)[count]) {
    GPU_UNROLL
    for (int i = 0; i < count; ++i) {
      big[i] = gpu::cut_tf32(values[i]);
      small[i] = gpu::round_tf32(values[i] - big[i]);
    }
  }
};

GPU_FUNCTION void multiply(float (&sum)[4], const Split<4>& a, const Split<2>& b) {
  gpu::mma(sum, a.small, b.big);
  gpu::mma(sum, a.big, b.small);
  gpu::mma(sum, a.big, b.big);
}

// What this block's changes add to the outputs, to the buffer: a warp a strip of channels and some of the pixels.
template <class Form>
GPU_FUNCTION void add_up_outputs(const Space<Form>& space) {
  constexpr int at_once = 7;  // tiles of pixels
  const int stride = space.layout.stride, g = gpu::lane() / 4, t = gpu::lane() % 4;
  const int all = space.layout.width / edge, share = (all + Form::sides - 1) / Form::sides;
  const int which = gpu::warp() % Form::strips, from = gpu::warp() / Form::strips * share;
  const int end = from + share < all ? from + share : all;
  for (int first = from; first < end; first += at_once) {
    float sums[at_once][4] = {};
    const float* row = space.maps + row_of(2 * t) * stride + edge * first + g;
    const float* next = space.maps + row_of(2 * t + 1) * stride + edge * first + g;
    for (int tile = 0; tile < Form::tiles; ++tile, row += edge * stride, next += edge * stride) {
      float change[4];
      gpu::load_four(space.tile(which, tile), change);
      const Split<4> a({change[0], change[2], change[1], change[3]});
      GPU_UNROLL
      for (int j = 0; j < at_once; ++j) {
        if (first + j < end) multiply(sums[j], a, Split<2>({row[edge * j], next[edge * j]}));
      }
    }
    float* const to = space.buffer + (strip * which + g) * stride + edge * first + 2 * t;
    GPU_UNROLL
    for (int j = 0; j < at_once; ++j) {
      if (first + j >= end) continue;
      to[edge * j] = sums[j][0], to[edge * j + 1] = sums[j][1];
      to[edge * (stride + j)] = sums[j][2], to[edge * (stride + j) + 1] = sums[j][3];
    }
  }
}

// The gradient of some tiles of this warp's, from the slopes in the buffer.
template <class Form>
GPU_FUNCTION void make_gradient(const Space<Form>& space, int tile, float (&gradient)[Form::together][Form::half][4]) {
  const int stride = space.layout.stride, g = gpu::lane() / 4, t = gpu::lane() % 4;
  const float* const steep = space.buffer + (strip * own_strip<Form>() + g) * stride + 2 * t;
  const float* const maps = space.maps + (edge * tile + row_of(g)) * stride + 2 * t;
  for (int p = 0; p < space.layout.width; p += edge) {
    float pairs[Form::half][2][2];
    GPU_UNROLL
    for (int s = 0; s < Form::half; ++s) {
      gpu::load_two(steep + strip * s * stride + p, pairs[s][0]);
      gpu::load_two(steep + (strip * s + edge) * stride + p, pairs[s][1]);
    }
    GPU_UNROLL
    for (int j = 0; j < Form::together; ++j) {
      float pair[2];
      gpu::load_two(maps + edge * j * stride + p, pair);
      const Split<2> b(pair);
      GPU_UNROLL
      for (int s = 0; s < Form::half; ++s) {
        const Split<4> a({pairs[s][0][0], pairs[s][1][0], pairs[s][0][1], pairs[s][1][1]});
        multiply(gradient[j][s], a, b);
      }
    }
  }
}

}  // namespace projected
}  // namespace rewrite_core
