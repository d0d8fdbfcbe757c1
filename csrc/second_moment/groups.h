// Channels in groups of a few, as depthwise convolutions have them, each group with a matrix of its own. Reading the
// features is what costs time there: a panel of channels is packed for one run and multiplied while it is in the cache.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "ahead.h"

namespace rewrite_core {
namespace {

constexpr int64_t most_panel = 16, most_columns = 8;  // of SecondMomentKernels, for any of them
constexpr int64_t group_tasks = 16;                   // at least so many, where there are runs enough
constexpr double thread_features = 1e5;               // a thread costs some microseconds to wake

// Groups of one channel where channels are neighbours in memory: out[c] += the squares of channel c.
inline Status run_neighbours(const SecondMomentProblem& p, double* out, int threads) {
  // As below; a segment has all channels, as one position's lie together.
  const int64_t channels = p.channels, segments = std::max<int64_t>(1, std::min(p.runs, group_tasks));
  std::vector<double> sums;
  try {
    sums.resize(segments * channels);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
  Team::run(threads, [&](Team& team) {
    team.each([&](int) {
      for (int64_t segment = team.next(); segment < segments; segment = team.next()) {
        const auto first_of = [&](int64_t number) {
          return std::min(p.positions.total, p.runs * number / segments * p.run_length);
        };
        const int64_t first = first_of(segment);
        p.positions.pieces(first, first_of(segment + 1) - first, [&](int64_t offset, int64_t stride, int count) {
          p.kernels.squares(p.features + offset * p.element, static_cast<int>(p.dtype), stride, channels, count,
                            sums.data() + segment * channels);
        });
      }
    });
  });
  for (int64_t segment = 0; segment < segments; ++segment) {
    for (int64_t c = 0; c < channels; ++c) out[c] += sums[segment * channels + c];
  }
  return Status::ok;
}

// out[g] += the moment of group g, [size, size], for groups of at most kernels.columns channels.
inline Status run_small_groups(const SecondMomentProblem& p, int64_t groups, double* out, int threads) {
  const double features = static_cast<double>(p.positions.total) * p.channels;
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + features / thread_features));
  const bool neighbours = p.channel_stride == 1 && p.positions.stride[2] != 1;
  if (neighbours && groups == p.channels) return run_neighbours(p, out, threads);
  const int64_t size = p.channels / groups, square = size * size;
  const int64_t together = p.kernels.panel / size;  // groups of one panel
  const int64_t panels = (groups + together - 1) / together;
  // Where channels are neighbours a task has them all, as it reads all of what it meets.
  const int64_t task_panels = neighbours ? panels : 1;
  // The runs in segments with sums of their own: their number depends on the shape alone, and so do the bits.
  const int64_t segments = std::max<int64_t>(1, std::min(p.runs, group_tasks * task_panels / panels));
  std::vector<double> sums;
  try {
    sums.resize(segments * groups * square);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
  Team::run(threads, [&](Team& team) {
    team.each([&](int) {
      alignas(64) char packed[(most_panel + most_columns) * key_stride];
      std::memset(packed + p.kernels.panel * key_stride, 0, most_columns * key_stride);  // what the last tile reads
      const auto add = [&](int64_t panel, int64_t run, double* part) {
        const int64_t first = panel * together, count = std::min(together, groups - first);
        if (count * size < p.kernels.panel) {  // another panel's may lie there
          std::memset(packed + count * size * key_stride, 0, (p.kernels.panel - count * size) * key_stride);
        }
        pack(p, run, first * size, count * size, packed);
        const int steps = (p.length(run) + p.kernels.vector - 1) / p.kernels.vector;
        p.kernels.blocks(packed, static_cast<int>(size), static_cast<int>(count), steps, part + first * square);
      };
      const int64_t tasks = panels / task_panels * segments;
      for (int64_t task = team.next(); task < tasks; task = team.next()) {
        const int64_t first = task % (panels / task_panels) * task_panels, segment = task / (panels / task_panels);
        const int64_t end = p.runs * (segment + 1) / segments;
        for (int64_t run = p.runs * segment / segments; run < end; ++run) {
          for (int64_t panel = first; panel < first + task_panels; ++panel) {
            add(panel, run, sums.data() + segment * groups * square);
          }
        }
      }
    });
  });
  for (int64_t group = 0; group < groups; ++group) {
    double* const matrix = out + group * square;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        for (int64_t segment = 0; segment < segments; ++segment) {
          matrix[i * size + j] += sums[(segment * groups + group) * square + i * size + j];
        }
        matrix[j * size + i] = matrix[i * size + j];
      }
    }
  }
  return Status::ok;
}

}  // namespace
}  // namespace rewrite_core
