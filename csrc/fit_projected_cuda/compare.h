// Outputs, loss and slopes before a step.
#pragma once

#include "../fit_projected_cuda.h"
#include "layout.h"

namespace rewrite_core {
namespace projected {

// By what the linear output of a channel is multiplied. Together.
template <class Form, bool many>
GPU_FUNCTION float norm_factor(const Space<Form>& space, int channel, float eps) {
  float norm = 0;
  for (int at = gpu::lane(); at < space.layout.blocks * Form::shares; at += gpu::warp_size) {
    norm += *peer<many>(space.norms + at % Form::shares * Form::channels + channel, at / Form::shares);
  }
  return 1 / gpu::root(fold_warp(norm) + eps);
}

// Of this block's own channels, a warp a channel. The loss goes to space.fold by warps.
template <class Form, bool many>
GPU_FUNCTION void compare(const Space<Form>& space, const FitProjectedTask& task, bool first) {
  const Layout<Form>& layout = space.layout;
  const float share = 1 / (static_cast<float>(task.channels) * layout.pixels);
  double loss = 0;
  for (int mine = gpu::warp(); mine < layout.own; mine += Form::warps) {
    const int in_team = space.first_own() + mine;
    const int64_t channel = space.first_channel() + in_team;
    const bool there = channel < task.channels;
    const float m = task.weight ? norm_factor<Form, many>(space, in_team, task.eps) : 1;
    float along = 0;  // slopes . linear output
    for (int p = gpu::lane(); p < layout.width; p += gpu::warp_size) {
      float steep = 0;
      if (there && p < layout.pixels) {
        const int64_t at = channel * layout.pixels + p;
        const float added = fold_team<many>(space.buffer + in_team * layout.stride + p, layout.blocks);
        const float lin = gpu::load(task.base + at) + added;
        const float pre = m * lin + (task.shift ? gpu::load(task.shift + at) : 0);
        const float rise = pre > 0 ? task.gain : task.gain * task.slope;
        const float ours = rise * pre;
        // Where the goal is the layer's own value, to the bit, it must not differ from ours by rounding: the l1
        // gradient there would be the sign of that.
        if (first) {
          const float wanted = gpu::load(task.target + at);
          task.goal[at] = wanted == gpu::load(task.value + at) ? ours : wanted;
        }
        const float kept = task.goal[at], r = ours == kept ? 0 : ours - kept;
        float turn = 2 * share * r;
        if (task.absolute) turn = r > 0 ? share : r < 0 ? -share : r * 0;  // NaN stays NaN
        loss += task.absolute ? static_cast<double>(r < 0 ? -r : r) : static_cast<double>(r) * r;
        along += turn * rise * lin;
        steep = turn * rise * m;
      }
      space.slopes[mine * layout.width + p] = steep;
    }
    along = fold_warp(along);
    if (gpu::lane() == 0) space.own_bend[mine] = task.weight && there ? -along * m * m * m : 0;
  }
  loss = fold_warp(loss);
  if (gpu::lane() == 0) space.fold[gpu::warp()] = loss;
}

// The slopes of this block's own channels, to the buffers of all blocks.
template <class Form, bool many>
GPU_FUNCTION void send_slopes(const Space<Form>& space) {
  const Layout<Form>& layout = space.layout;
  for (int mine = gpu::warp(); mine < layout.own; mine += Form::warps) {
    const int in_team = space.first_own() + mine;
    for (int rank = 0; rank < layout.blocks; ++rank) {
      float* const to = peer<many>(space.buffer + in_team * layout.stride, rank);
      for (int p = gpu::lane(); p < layout.width; p += gpu::warp_size) to[p] = space.slopes[mine * layout.width + p];
      if (gpu::lane() == 0) *peer<many>(space.bend + in_team, rank) = space.own_bend[mine];
    }
  }
}

}  // namespace projected
}  // namespace rewrite_core
