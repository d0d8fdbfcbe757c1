// Where the keys of a call lie, and how they are packed, each chunk while the one before is multiplied.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "../common.h"
#include "../second_moment_isa.h"

namespace rewrite_core {
namespace {

// The positions (n, h, w) as at most three nested loops, merged where memory allows it.
struct Positions {
  int64_t size[3] = {1, 1, 1};  // outermost first
  int64_t stride[3] = {0, 0, 0};
  int64_t total = 1;

  Positions(const int64_t sizes[4], const int64_t strides[4]) {
    int last = 3;  // filled from the innermost outwards
    const int64_t axes[3] = {0, 2, 3};
    for (int i = 2; i >= 0; --i) {
      const int64_t n = sizes[axes[i]], step = strides[axes[i]];
      total *= n;
      if (n == 1) continue;
      if (last < 3 && step == size[last] * stride[last]) {
        size[last] *= n;
      } else {
        --last;
        size[last] = n;
        stride[last] = step;
      }
    }
  }

  int64_t offset(int64_t first) const {
    const int64_t inner = first % size[2], rest = first / size[2];
    return (rest / size[1]) * stride[0] + (rest % size[1]) * stride[1] + inner * stride[2];
  }

  // Calls visit(offset, stride, count) for each straight piece of positions [first, first + count).
  template <class Visit>
  void pieces(int64_t first, int64_t count, Visit visit) const {
    while (count > 0) {
      const int64_t inner = first % size[2], rest = first / size[2];
      const int64_t length = std::min(count, size[2] - inner);
      const int64_t offset = (rest / size[1]) * stride[0] + (rest % size[1]) * stride[1] + inner * stride[2];
      visit(offset, stride[2], static_cast<int>(length));
      first += length;
      count -= length;
    }
  }
};

constexpr int64_t chunk_bytes = 256 << 10;  // packed keys at a time, at least one run; the next are packed meanwhile

inline int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct SecondMomentProblem {
  const SecondMomentKernels& kernels;
  const char* features;
  DType dtype;
  int64_t channels, channel_stride;
  const Positions& positions;

  int64_t element = element_size(dtype);
  int64_t run_length = run_bytes / kernels.element;
  int64_t runs = (positions.total + run_length - 1) / run_length;
  int64_t padded = (channels + kernels.columns - 1) / kernels.columns * kernels.columns;
  int64_t chunk_runs = std::max<int64_t>(1, std::min(runs, chunk_bytes / (padded * key_stride)));

  int length(int64_t run) const { return static_cast<int>(std::min(run_length, positions.total - run * run_length)); }
};

// Packs `count` channels of a run, at most a panel, without the zeros that fill it up.
inline void pack_values(const SecondMomentProblem& p, int64_t run, int64_t channel, int64_t count, char* target) {
  p.positions.pieces(run * p.run_length, p.length(run), [&](int64_t offset, int64_t position_stride, int length) {
    p.kernels.pack(p.features + (offset + channel * p.channel_stride) * p.element, static_cast<int>(p.dtype),
                   p.channel_stride, position_stride, static_cast<int>(count), length, target);
    target += length * p.kernels.element;
  });
}

inline void pack(const SecondMomentProblem& p, int64_t run, int64_t channel, int64_t count, char* to) {
  pack_values(p, run, channel, count, to);
  const int64_t filled = p.length(run) * p.kernels.element;
  for (int64_t c = 0; c < count && filled < run_bytes; ++c) {
    std::memset(to + c * key_stride + filled, 0, run_bytes - filled);
  }
}

// Packs one worker's share of a chunk while it computes with the chunk before. Each tile asks the cache for a portion
// of the features, and copies the portion before it where whole vectors of features can be copied as they are;
// elsewhere a panel is packed as soon as the cache was asked for all of it. What tiles have not got to when it is
// needed, finish() packs.
//
// A panel is packed for one run at a time; the two make a task, and workers that share the packed keys take the next
// one each. A portion is what one tile asks for: of maps one channel's run, of other layouts some neighbouring
// positions. Tiles make fewer steps in the last run of all, and would copy less: but nothing is left to pack by then.
class Ahead {
 public:
  Ahead(const SecondMomentProblem& p, const std::vector<int64_t>& panels, int64_t first_run, int64_t runs,
        std::atomic<int64_t>* shared, char* packed)
      : p_(p),
        order_(panels.data()),
        panels_(panels.size()),
        first_run_(first_run),
        tasks_(std::max<int64_t>(runs, 0) * panels_),
        shared_(shared),
        packed_(packed) {
    steps_ = p.run_length / p.kernels.vector;
    step_bytes_ = run_bytes / steps_;
    const bool maps = p.positions.stride[2] == 1;
    const int64_t line_stride = p.element * (maps ? p.kernels.vector : p.positions.stride[2]);
    portion_stride_ = maps ? p.channel_stride * p.element : steps_ * line_stride;
    panel_portions_ = maps ? p.kernels.panel : p.kernels.vector;
    for (int64_t step = 0; step < steps_; ++step) {
      lines_[step] = step * line_stride;
      packed_lines_[step] = step * step_bytes_;
    }
    next_panel();
  }

  // What the next tile does besides, null for nothing; then call advance(). `urgent` are packed keys to ask for first.
  const Meanwhile* next(const char* urgent) {
    asks_ = !urgent && task_ < tasks_;
    if (!asks_ && !urgent && !copy_to_) return nullptr;
    also_.ahead = reinterpret_cast<uintptr_t>(urgent ? urgent : copy_to_);
    if (asks_) also_.ahead = address();
    also_.ahead_offsets = urgent || !asks_ ? packed_lines_ : copies_ ? offsets_[table_] : lines_;
    also_.from = copy_from_;
    also_.from_offsets = copy_offsets_;
    also_.to = copy_to_;
    return &also_;
  }

  void advance() {
    copy_to_ = nullptr;
    if (!asks_) return;
    if (copies_) {
      copy_from_ = p_.features + (channel() + portion_) * p_.channel_stride * p_.element;
      copy_offsets_ = offsets_[table_];
      copy_to_ = target() + portion_ * key_stride;
      if (++portion_ == channels_) next_panel();
    } else if (++portion_ == panel_portions_) {
      pack(p_, run(), channel(), channels_, target());
      next_panel();
    }
  }

  bool busy() const { return copy_to_ || task_ < tasks_; }

  void finish() { finish(tasks_); }

  // Only the first `tasks` of them.
  void finish(int64_t tasks) {
    if (copy_to_) {
      for (int64_t step = 0; step < steps_; ++step) {
        std::memcpy(copy_to_ + step * step_bytes_, copy_from_ + copy_offsets_[step], step_bytes_);
      }
      copy_to_ = nullptr;
    }
    for (; task_ < tasks; next_panel()) {
      const int64_t done = copies_ ? portion_ : 0;
      pack(p_, run(), channel() + done, channels_ - done, target() + done * key_stride);
    }
  }

 private:
  int64_t run() const { return first_run_ + task_ / panels_; }
  int64_t channel() const { return order_[task_ % panels_] * p_.kernels.panel; }
  char* target() const { return packed_ + (task_ / panels_ * p_.padded + channel()) * key_stride; }

  // Of the portion to ask for: a number, as at the edges of the features there may be nothing.
  uintptr_t address() const {
    const int64_t start = channel() * p_.channel_stride + (copies_ ? 0 : p_.positions.offset(run() * p_.run_length));
    return reinterpret_cast<uintptr_t>(p_.features) + start * p_.element + portion_ * portion_stride_;
  }

  void next_panel() {
    task_ = shared_ ? shared_->fetch_add(1, std::memory_order_relaxed) : task_ + 1;
    portion_ = 0;
    if (task_ < tasks_) start_panel();
  }

  void start_panel() {
    channels_ = std::min<int64_t>(p_.kernels.panel, p_.channels - channel());
    if (run() == table_run_) return;
    table_run_ = run();
    table_ = 1 - table_;  // the other one may still be copied by
    copies_ = p_.element == p_.kernels.element && p_.length(table_run_) == p_.run_length;
    int64_t step = 0;
    p_.positions.pieces(table_run_ * p_.run_length, p_.length(table_run_), [&](int64_t offset, int64_t by, int length) {
      copies_ = copies_ && by == 1 && length % p_.kernels.vector == 0;
      for (int64_t i = 0; copies_ && i < length; i += p_.kernels.vector) {
        offsets_[table_][step++] = (offset + i) * p_.element;
      }
    });
  }

  static constexpr int64_t most_steps = 128;  // of a run: vectors have 16 bytes at least
  const SecondMomentProblem& p_;
  const int64_t* order_;
  int64_t panels_, first_run_, tasks_, task_ = -1;
  std::atomic<int64_t>* shared_;  // the next task of all workers; null: this one has them all
  char* packed_;
  int64_t steps_, step_bytes_, portion_stride_, panel_portions_;
  int64_t portion_ = 0, channels_ = 0, table_run_ = -1;
  int table_ = 0;
  bool copies_ = false, asks_ = false;
  const char* copy_from_ = nullptr;
  const int64_t* copy_offsets_ = nullptr;
  char* copy_to_ = nullptr;  // null where nothing waits to be copied
  Meanwhile also_;
  int64_t offsets_[2][most_steps], lines_[most_steps], packed_lines_[most_steps];
};

}  // namespace
}  // namespace rewrite_core
