// The kernel of fit_projected: a team of blocks takes some channels through all steps.
#pragma once

#include "../fit_projected/constants.h"
#include "compare.h"
#include "directions.h"
#include "products.h"

namespace rewrite_core {
namespace projected {

// Adam's running means of the gradient and its square, of this lane's weights.
template <class Form>
struct Moments {
  float mean[Form::own_tiles][Form::half][4], power[Form::own_tiles][Form::half][4];
};

// Demodulation's norm of this lane's channels, as far as its weights go.
template <class Form>
struct Norm {
  float parts[Form::half][2] = {};

  // To space.norms. Together.
  GPU_FUNCTION void store(const Space<Form>& space) {
    GPU_UNROLL
    for (int at = 0; at < 2 * Form::half; ++at) {
      float sum = parts[at / 2][at % 2];
      sum += gpu::shuffle_xor(sum, 1);
      sum += gpu::shuffle_xor(sum, 2);
      const int channel = strip * (own_strip<Form>() + at / 2) + gpu::lane() / 4 + edge * (at % 2);
      if (gpu::lane() % 4 == 0) space.norms[gpu::warp() / 2 * Form::channels + channel] = sum;
    }
  }
};

// Where the four numbers of this lane in a tile are.
template <class Form>
struct Place {
  int channel, row;  // of the team, of the block

  GPU_FUNCTION Place(int s, int tile, int which)
      : channel(strip * (own_strip<Form>() + s) + gpu::lane() / 4 + edge * (which / 2)),
        row(edge * tile + row_of(gpu::lane() % 4 * 2 + which % 2)) {}
};

// Calls visit(strip, tile, change) for each tile of this warp's, and keeps what becomes of the change.
template <class Form, class Visit>
GPU_FUNCTION void change_tiles(const Space<Form>& space, Visit visit) {
  GPU_ROLLED
  for (int tile = 0; tile < Form::own_tiles; ++tile) {
    GPU_UNROLL
    for (int s = 0; s < Form::half; ++s) {
      float* const at = space.tile(own_strip<Form>() + s, own_tile<Form>() + tile);
      float change[4];
      gpu::load_four(at, change);
      visit(s, own_tile<Form>() + tile, change);
      gpu::store_four(at, change);
    }
  }
}

// The norm of the weights with the change as it is.
template <class Form>
GPU_FUNCTION void measure_norm(const Space<Form>& space, const FitProjectedTask& task) {
  if (!task.weight) return;
  Norm<Form> norm;
  change_tiles(space, [&](int s, int tile, const float (&change)[4]) {
    GPU_UNROLL
    for (int which = 0; which < 4; ++which) {
      const Place<Form> place(s, tile, which);
      const float whole = original_at(space, task, place.channel, place.row) + change[which];
      norm.parts[s][which / 2] += space.square[place.row] * (whole * whole);
    }
  });
  norm.store(space);
}

// This block's rows of the operator, with zeros to whole tiles; no change yet.
template <class Form>
GPU_FUNCTION void begin(const Space<Form>& space, const FitProjectedTask& task) {
  const Layout<Form>& layout = space.layout;
  const int weights = weights_of(task);
  for (int row = gpu::warp(); row < Form::rows; row += Form::warps) {
    const int at = space.first_row() + row;
    for (int p = gpu::lane(); p < layout.width; p += gpu::warp_size) {
      const bool inside = at < weights && p < layout.pixels;
      space.maps[row * layout.stride + p] =
          inside ? gpu::load(task.maps + static_cast<int64_t>(at) * layout.pixels + p) : 0;
    }
    if (gpu::lane() == 0)
      space.square[row] = task.square && at < weights ? gpu::load(task.square + at / layout.taps) : 0;
  }
  for (int at = gpu::thread(); at < Form::channels * Form::rows; at += Form::threads) space.change[at] = 0;
}

// Adam's step of this warp's weights; their norm.
template <class Form, bool leans>
GPU_FUNCTION void update(const Space<Form>& space, const FitProjectedTask& task, Moments<Form>& moments, float rate,
                         float correction) {
  constexpr float rest1 = 1 - fit_projected_constants::BETA1, rest2 = 1 - fit_projected_constants::BETA2;
  constexpr float beta2 = fit_projected_constants::BETA2, epsilon = fit_projected_constants::EPSILON;
  Norm<Form> norm;
  GPU_UNROLL
  for (int first = 0; first < Form::own_tiles; first += Form::together) {
    float gradients[Form::together][Form::half][4] = {};
    if (!leans) make_gradient(space, own_tile<Form>() + first, gradients);
    GPU_UNROLL
    for (int j = 0; j < Form::together; ++j) {
      GPU_UNROLL
      for (int s = 0; s < Form::half; ++s) {
        const int tile = own_tile<Form>() + first + j;
        float* const at = space.tile(own_strip<Form>() + s, tile);
        float (&gradient)[4] = gradients[j][s];
        float change[4], original[4] = {};
        gpu::load_four(at, change);
        if (task.weight) {
          GPU_UNROLL
          for (int which = 0; which < 4; ++which) {
            const Place<Form> place(s, tile, which);
            original[which] = original_at(space, task, place.channel, place.row);
            const float factor = space.bend[place.channel] * space.square[place.row];
            if (!leans) gradient[which] += factor * (original[which] + change[which]);
          }
        }
        GPU_UNROLL
        for (int which = 0; which < 4; ++which) {
          const Place<Form> place(s, tile, which);
          if (leans) gradient[which] = combine(space, task, task.leaning, place.channel, place.row);
          float& mean = moments.mean[first + j][s][which];
          float& power = moments.power[first + j][s][which];
          mean += rest1 * (gradient[which] - mean);
          power = beta2 * power + rest2 * gradient[which] * gradient[which];
          change[which] -= gpu::quick_quotient(rate * mean, gpu::quick_root(power) * correction + epsilon);
        }
        if (task.weight) {
          GPU_UNROLL
          for (int which = 0; which < 4; ++which) {
            const float whole = original[which] + change[which];
            norm.parts[s][which / 2] += space.square[Place<Form>(s, tile, which).row] * (whole * whole);
          }
        }
        gpu::store_four(at, change);
      }
    }
  }
  if (task.weight) norm.store(space);
}

// The change becomes its projection on the directions; on the way its coefficients are stored.
template <class Form, bool many>
GPU_FUNCTION void project(const Space<Form>& space, const FitProjectedTask& task) {
  multiply_directions<Form, many, false>(space, task, task.coefficients);
  change_tiles(space, [&](int s, int tile, float (&change)[4]) {
    GPU_UNROLL
    for (int which = 0; which < 4; ++which) {
      const Place<Form> place(s, tile, which);
      change[which] = combine(space, task, task.coefficients, place.channel, place.row);
    }
  });
  measure_norm(space, task);
}

// The change itself, where there are no directions.
template <class Form>
GPU_FUNCTION void store_change(const Space<Form>& space, const FitProjectedTask& task) {
  const int weights = weights_of(task);
  for (int at = gpu::thread(); at < Form::channels * Form::rows; at += Form::threads) {
    const int64_t channel = space.first_channel() + at / Form::rows;
    const int row = space.first_row() + at % Form::rows;
    if (channel < task.channels && row < weights) {
      task.coefficients[channel * weights + row] = change_at(space, at / Form::rows, at % Form::rows);
    }
  }
}

// many    whether a team is a cluster, or one block
// leans   whether the gradient is projected, too
template <class Form, bool many, bool leans>
GPU_KERNEL(Form::threads)
fit_projected_kernel(FitProjectedTask task) {
  if constexpr (many && !gpu::has_clusters) return;
  const Space<Form> space(Layout<Form>(task.pixels, task.taps, many ? gpu::blocks() : 1));
  Moments<Form> moments = {};
  begin(space, task);
  gpu::sync_block<ready>();
  measure_norm(space, task);
  for (int step = 0; step < task.steps; ++step) {
    add_up_outputs(space);
    sync_team<many, partials_there>();
    compare<Form, many>(space, task, step == 0);
    sync_team<many, partials_read>();
    if (gpu::thread() == 0) {
      double loss = 0;
      for (int w = 0; w < Form::warps; ++w) loss += space.fold[w];
      const int64_t part = static_cast<int64_t>(gpu::team()) * space.layout.blocks + space.rank();
      task.losses[part * task.steps + step] = loss;
    }
    if (leans) {
      multiply_directions<Form, many, true>(space, task, task.leaning);
    } else {
      send_slopes<Form, many>(space);
      sync_team<many, slopes_there>();
    }
    update<Form, leans>(space, task, moments, gpu::load(task.rates + 2 * step), gpu::load(task.rates + 2 * step + 1));
    gpu::sync_block<updated>();
    if (task.ranks && (step % task.project_every == 0 || step == task.steps - 1)) {
      project<Form, many>(space, task);
      gpu::sync_block<projected_there>();
    }
  }
  if (!task.ranks) store_change(space, task);
}

}  // namespace projected
}  // namespace rewrite_core
