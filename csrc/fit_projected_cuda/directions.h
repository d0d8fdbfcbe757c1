// Products with the directions, which run over all blocks' weights: of the change, and of its gradient.
#pragma once

#include "../fit_projected_cuda.h"
#include "layout.h"

namespace rewrite_core {
namespace projected {

GPU_FUNCTION int weights_of(const FitProjectedTask& task) { return static_cast<int>(task.inputs * task.taps); }

// One number of the change, of whatever warp.
template <class Form>
GPU_FUNCTION float change_at(const Space<Form>& space, int channel, int row) {
  const int column = row_of(row % edge), lane = channel % edge * 4 + column / 2;
  const int tile = channel / strip * Form::tiles + row / edge;
  return space.change[(tile * gpu::warp_size + lane) * 4 + channel % strip / edge * 2 + column % 2];
}

// One number of the layer's own weight; 0 where there is none.
template <class Form>
GPU_FUNCTION float original_at(const Space<Form>& space, const FitProjectedTask& task, int in_team, int row) {
  const int weights = weights_of(task), at = space.first_row() + row;
  const float* const own = task.weight + space.first_channel() * weights;
  return space.first_channel() + in_team < task.channels && at < weights ? gpu::load(own + (in_team * weights + at))
                                                                         : 0;
}

// What this block's weights add to the change's products with directions part, ..., part + count - 1; for the
// gradient's, to those of square (weight + change), by which its slope by the norm leans. To the buffer: [channels,
// count, taps].
template <class Form, bool leans>
GPU_FUNCTION void add_up_products(const Space<Form>& space, const FitProjectedTask& task, int part, int count) {
  const int taps = space.layout.taps, each = count * taps;
  const int first = space.first_row(), weights = weights_of(task);
  const int end = first + Form::rows < weights ? first + Form::rows : weights;
  for (int at = gpu::thread(); at < Form::channels * each; at += Form::threads) {
    const int channel = at / each, place = at % each, tap = place % taps;
    const float* const direction = task.directions + (part + place / taps) * task.inputs;
    float total = 0;
    for (int i = first > tap ? (first - tap + taps - 1) / taps : 0; i * taps + tap < end; ++i) {
      const int row = i * taps + tap - first;
      float factor = change_at(space, channel, row);
      if (leans) factor = (factor + original_at(space, task, channel, row)) * space.square[row];
      total += factor * gpu::load(direction + i);
    }
    space.buffer[channel * space.layout.stride + place] = total;
  }
}

// The products of this block's own channels, of all blocks' parts, to an array [channels, ranks, taps].
template <class Form, bool many, bool leans>
GPU_FUNCTION void finish_products(const Space<Form>& space, const FitProjectedTask& task, float* to, int part,
                                  int count) {
  const Layout<Form>& layout = space.layout;
  const int each = count * layout.taps;
  for (int at = gpu::thread(); at < layout.own * each; at += Form::threads) {
    const int mine = at / each, place = at % each, in_team = space.first_own() + mine;
    const int64_t channel = space.first_channel() + in_team;
    if (channel >= task.channels) continue;
    float total = 0;
    if (!leans || task.weight) total = fold_team<many>(space.buffer + in_team * layout.stride + place, layout.blocks);
    if (leans) {
      const float* const maps = task.basis + (static_cast<int64_t>(part) * layout.taps + place) * layout.pixels;
      const float* const slopes = space.slopes + mine * layout.width;
      float sum = 0;
      for (int p = 0; p < layout.pixels; ++p) sum += slopes[p] * gpu::load(maps + p);
      total = task.weight ? sum + space.own_bend[mine] * total : sum;
    }
    to[(channel * task.ranks + part) * layout.taps + place] = total;
  }
}

// Products with all directions, as many at a time as the buffer holds. Afterwards all blocks may read them.
template <class Form, bool many, bool leans>
GPU_FUNCTION void multiply_directions(const Space<Form>& space, const FitProjectedTask& task, float* to) {
  const int most = space.layout.stride / space.layout.taps, ranks = static_cast<int>(task.ranks);
  for (int part = 0; part < ranks; part += most) {
    const int count = part + most < ranks ? most : ranks - part;
    if (!leans || task.weight) add_up_products<Form, leans>(space, task, part, count);
    if (many) gpu::sync_team<products_there>();  // one block alone: each thread adds up what it has written
    finish_products<Form, many, leans>(space, task, to, part, count);
    sync_team<many, products_read>();
  }
}

// The directions times the products, at one number of the change.
template <class Form>
GPU_FUNCTION float combine(const Space<Form>& space, const FitProjectedTask& task, const float* products, int in_team,
                           int row) {
  const int taps = space.layout.taps, at = space.first_row() + row, i = at / taps;
  const int64_t channel = space.first_channel() + in_team;
  if (channel >= task.channels || at >= weights_of(task)) return 0;
  const float* factor = products + channel * task.ranks * taps + at % taps;
  const float* direction = task.directions + i;
  float total = 0;
  GPU_ROLLED
  for (int64_t r = 0; r < task.ranks; ++r, factor += taps, direction += task.inputs) {
    total += *factor * gpu::load(direction);
  }
  return total;
}

}  // namespace projected
}  // namespace rewrite_core
