#include "second_moment.h"

#include <algorithm>
#include <cstring>

#include "second_moment_isa.h"

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
constexpr int64_t group_bytes = 2 << 20;    // all groups' sums
constexpr int64_t most_groups = 16;
constexpr int64_t alone_bytes = 16 << 20;  // of packed keys, where each thread packs its own, or one matrix
constexpr int64_t block_rows = most_block_rows, block_columns = 32;  // channels of one task, by channels

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct Problem {
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

// Rows [row, row_end) by columns [column, column_end) of the lower triangle; the diagonal may cut through. It is made
// of the first `panels` panels of its share.
struct Block {
  int64_t row, row_end, column, column_end, panels;
};

// Blocks that one worker, or several together, add up, and the panels of channels they are made of, those that are
// needed first at the start.
struct Share {
  Block* blocks;
  int64_t size;
  std::vector<int64_t> panels;
};

// Packs `count` channels of a run, at most a panel.
void pack(const Problem& p, int64_t run, int64_t channel, int64_t count, char* to) {
  char* target = to;
  p.positions.pieces(run * p.run_length, p.length(run), [&](int64_t offset, int64_t position_stride, int length) {
    p.kernels.pack(p.features + (offset + channel * p.channel_stride) * p.element, static_cast<int>(p.dtype),
                   p.channel_stride, position_stride, static_cast<int>(count), length, target);
    target += length * p.kernels.element;
  });
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
// A panel is packed for one run at a time; the two make a task, and worker w of n has the tasks w, w + n, ... A portion
// is what one tile asks for: of maps one channel's run, of other layouts some neighbouring positions. Tiles make fewer
// steps in the last run of all, and would copy less: but nothing is left to pack by then.
class Ahead {
 public:
  Ahead(const Problem& p, const Share& share, int64_t first_run, int64_t runs, int64_t self, int64_t workers,
        char* packed)
      : p_(p),
        order_(share.panels.data()),
        panels_(share.panels.size()),
        first_run_(first_run),
        tasks_(std::max<int64_t>(runs, 0) * panels_),
        task_(self),
        workers_(workers),
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
    if (task_ < tasks_) start_panel();
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
    task_ += workers_;
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
  const Problem& p_;
  const int64_t* order_;
  int64_t panels_, first_run_, tasks_, task_, workers_;
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

// The keys of a chunk are multiplied while those of the next are packed, by `Ahead`s that deal the panels out to the
// team. With three chunks A, B, C in [first, end) and D the first from `then` on, which is of a later call:
//
//   multiplied, from `packed`           A             B             C
//   packed meanwhile, into `spare`      B by ahead    C by ahead    D by ahead
//
// The buffers are swapped after each column, so that D ends in `packed`, and that call finds it `ready`. Where A is not
// ready, `begin` packs it into `packed` first of all; or, for a worker alone with chunks of one run, the panels of its
// first block only, and the others between the tiles, before B.
//
// Adds the products of runs [first, end) to the lower triangle of `sums`, and to the upper one when `mirror`. The first
// chunk of them is in `packed` already when `ready`, and the first of those from `then` on is left in it. Channels up
// to `padded` are zeros in both buffers.
template <class Workers>
void add_runs(Workers& team, int64_t self, const Problem& p, const Share& share, int64_t first, int64_t end,
              int64_t then, bool ready, bool mirror, char*& packed, char*& spare, double* sums) {
  alignas(64) double part[block_rows * block_columns];
  const int64_t n = p.channels, tile_columns = p.kernels.columns, tile_rows = p.kernels.rows;
  // The first chunk of all has no chunk before it: alone, a worker starts as soon as its first block can be computed.
  Ahead begin(p, share, first, ready ? 0 : std::min(p.chunk_runs, end - first), self, team.size(), packed);
  if (!ready && (team.size() > 1 || p.chunk_runs > 1)) {
    begin.finish();
    team.meet();
  }
  for (; first < end; first += p.chunk_runs) {
    const auto key = [&](int64_t run, int64_t channel) { return packed + (run * p.padded + channel) * key_stride; };
    const int64_t count = std::min(p.chunk_runs, end - first);
    const bool last = first + count == end, to_part = mirror && last;
    const int64_t next = last ? then : first + count, next_end = last ? p.runs : end;
    Ahead ahead(p, share, next, std::min(p.chunk_runs, next_end - next), self, team.size(), spare);
    for (int64_t task = team.next(), after; task < share.size; task = after) {
      after = team.next();
      const Block& block = share.blocks[task];
      if (begin.busy()) begin.finish(block.panels);
      // the next block's columns, which other threads may have packed
      const Block soon = team.size() > 1 && after < share.size ? share.blocks[after] : Block{};
      int64_t asked = 0;
      const int64_t target_stride = to_part ? block_columns : n;
      const auto target = [&](int64_t row, int64_t column) {  // where a product of these two channels is added up
        return to_part ? part + (row - block.row) * block_columns + column - block.column : sums + row * n + column;
      };
      if (to_part) std::fill(part, part + (block.row_end - block.row) * block_columns, 0.0);
      for (int64_t run = 0; run < count; ++run) {
        const int steps = (p.length(first + run) + p.kernels.vector - 1) / p.kernels.vector;
        for (int64_t column = block.column; column < block.column_end; column += tile_columns) {
          const char* keys = key(run, column);
          if (column >= block.row) {
            const int used = static_cast<int>(std::min<int64_t>(tile_columns, n - column));
            p.kernels.diagonal(keys, used, steps, target(column, column), target_stride);
          }
          for (int64_t row = std::max(block.row, column + tile_columns); row < block.row_end; row += tile_rows) {
            const int64_t rows = std::min<int64_t>(tile_rows, block.row_end - row);
            if (to_part && run == 0) {  // for add_mirrored
              for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(sums + (row + i) * n + column);
              for (int64_t j = 0; j < tile_columns; ++j) __builtin_prefetch(sums + (column + j) * n + row);
            }
            const int64_t width = soon.column_end - soon.column;
            const char* urgent = asked < count * width ? key(asked / width, soon.column + asked % width) : nullptr;
            ++asked;
            Ahead& packing = begin.busy() ? begin : ahead;
            p.kernels.tile(key(run, row), static_cast<int>(rows), keys, steps, target(row, column), target_stride,
                           packing.next(urgent));
            packing.advance();
          }
        }
      }
      if (to_part) {
        const int64_t rows[2] = {block.row, block.row_end}, columns[2] = {block.column, std::min(block.column_end, n)};
        p.kernels.add_mirrored(part, block_columns, rows, columns, n, sums);
      }
    }
    ahead.finish();
    std::swap(packed, spare);
    team.meet();
  }
}

// Adds the groups' sums to the lower triangle and mirrors it, by blocks through a small buffer: the rows of a matrix
// of a power of two of channels share the cache's sets.
void finish(Team& team, int64_t n, const double* sums, int64_t groups, double* out) {
  constexpr int64_t size = 32;
  double turned[size][size];
  const int64_t blocks = (n + size - 1) / size;
  for (int64_t task = team.next(); task < blocks; task = team.next()) {
    const int64_t row = (blocks - 1 - task) * size, row_end = std::min(n, row + size);  // the longest first
    for (int64_t column = 0; column <= row; column += size) {
      const int64_t column_end = std::min(row_end, column + size);
      for (int64_t i = row; i < row_end; ++i) {
        const int64_t last = std::min(column_end, i + 1);
        for (int64_t group = 0; group < groups; ++group) {
          const double* part = sums + group * n * n;
          for (int64_t j = column; j < last; ++j) out[i * n + j] += part[i * n + j];
        }
        for (int64_t j = column; j < last; ++j) turned[j - column][i - row] = out[i * n + j];
      }
      for (int64_t j = column; j < column_end; ++j) {
        for (int64_t i = std::max(row, j + 1); i < row_end; ++i) out[j * n + i] = turned[j - column][i - row];
      }
    }
  }
}

// The blocks in order of rows, cut into `parts` of the same work.
std::vector<Share> split(const Problem& p, std::vector<Block>& blocks, int64_t parts) {
  const auto work = [](const Block& block) {
    int64_t products = 0;
    for (int64_t row = block.row; row < block.row_end; ++row) {
      products += std::max<int64_t>(std::min(block.column_end, row + 1) - block.column, 0);
    }
    return products;
  };
  const int64_t total = p.channels * (p.channels + 1) / 2, panel = p.kernels.panel;
  int64_t done = 0;
  std::vector<Share> shares;
  size_t start = 0;
  for (int64_t part = 1; part <= parts; ++part) {
    Share share = {blocks.data() + start, 0, {}};
    std::vector<bool> seen((p.padded + panel - 1) / panel);
    const auto need = [&](int64_t channel, int64_t end) {
      for (int64_t i = channel / panel; i * panel < end; ++i) {
        if (!seen[i]) share.panels.push_back(i);
        seen[i] = true;
      }
    };
    for (; start < blocks.size() && done * parts < total * part; ++start) {
      Block& block = blocks[start];
      done += work(block);
      ++share.size;
      need(block.row, block.row_end);
      need(block.column, std::min(block.column_end, block.row_end));
      block.panels = static_cast<int64_t>(share.panels.size());
    }
    shares.push_back(std::move(share));
  }
  return shares;
}

// How threads share the work. Caches of different cores talk slowly, so that threads that share packed keys mostly
// wait; they are better off alone, each packing what it needs.
enum class Sharing {
  groups,  // few channels: runs form groups, each summed by one thread and by itself
  blocks,  // many channels: each thread has blocks of its own, of all runs
  none,    // too many threads for that: they pack and add up every chunk together
};

Status run(const Problem& p, double* out, int threads) {
  const int64_t n = p.channels;
  const int64_t matrix_bytes = n * n * static_cast<int64_t>(sizeof(double));
  // The number of groups depends on the shape alone, so that the number of threads does not change a bit.
  const int64_t most = std::min(group_bytes / matrix_bytes, most_groups);
  const int64_t chunks = (p.runs + p.chunk_runs - 1) / p.chunk_runs;
  const int64_t group_chunks = most < 2 ? chunks : std::max<int64_t>((chunks + most - 1) / most, 4);
  const int64_t group_runs = p.chunk_runs * group_chunks;
  const int64_t groups = group_chunks < chunks ? (p.runs + group_runs - 1) / group_runs : 0;

  // A thread costs some microseconds to wake: give each at least a million multiply-adds.
  const double work = 0.5 * static_cast<double>(p.positions.total) * n * n;
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + work / 1e6));
  const int64_t packed_size = p.chunk_runs * p.padded * key_stride;
  const int64_t buffers = p.runs > p.chunk_runs ? 2 : 1;
  const bool room = buffers * packed_size * threads <= std::max(alone_bytes, matrix_bytes);
  // each thread has tiles enough to pack all channels meanwhile
  const bool tiles = n >= 2 * p.kernels.rows * p.kernels.columns * threads;
  const Sharing sharing = groups && (groups >= threads || most == most_groups) ? Sharing::groups
                          : tiles && room                                      ? Sharing::blocks
                                                                               : Sharing::none;
  if (sharing == Sharing::groups) threads = static_cast<int>(std::min<int64_t>(threads, groups));

  std::vector<Block> blocks;
  std::vector<Share> shares;
  try {
    for (int64_t row = 0; row < n; row += block_rows) {  // neighbours share rows
      const int64_t row_end = std::min(n, row + block_rows);
      for (int64_t column = 0; column < row_end; column += block_columns) {
        blocks.push_back({row, row_end, column, std::min(p.padded, column + block_columns), 0});
      }
    }
    shares = split(p, blocks, sharing == Sharing::blocks ? threads : 1);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
  thread_local Workspace workspace;
  const int64_t packed_bytes = buffers * packed_size * (sharing == Sharing::none ? 1 : threads);
  char* const packed = workspace.get(packed_bytes + 64 + groups * matrix_bytes);
  if (!packed) return Status::out_of_memory;
  double* const sums = reinterpret_cast<double*>(packed + (packed_bytes + 63) / 64 * 64);

  Team::run(threads, [&](Team& team) {
    const int64_t self = team.join();
    const bool alone = sharing != Sharing::none;
    char* now = packed + (alone ? buffers * packed_size * self : 0);
    char* spare = now + (buffers - 1) * packed_size;
    if (alone || self == 0) {
      for (int64_t row = 0; row < buffers * p.chunk_runs * p.padded; ++row) {
        if (row % p.padded >= n) std::memset(now + row * key_stride, 0, run_bytes);
      }
    }
    Solo solo;
    if (sharing == Sharing::groups) {
      bool ready = false;
      for (int64_t group = self; group < groups; group += team.size()) {
        double* mine = sums + group * n * n;
        std::fill(mine, mine + n * n, 0.0);
        add_runs(solo, 0, p, shares[0], group * group_runs, std::min(p.runs, (group + 1) * group_runs),
                 std::min(p.runs, (group + team.size()) * group_runs), ready, false, now, spare, mine);
        ready = true;
      }
    } else {
      for (int64_t row = team.next(); row < groups * n; row = team.next()) {
        std::fill(sums + row * n, sums + row * n + n, 0.0);
      }
      team.meet();
      for (int64_t group = 0; group < std::max<int64_t>(groups, 1); ++group) {
        const int64_t first = group * group_runs, end = groups ? std::min(p.runs, first + group_runs) : p.runs;
        double* target = groups ? sums + group * n * n : out;
        if (alone) {
          for (int64_t part = self; part < threads; part += team.size()) {  // one each, if all threads could be had
            const bool ready = group > 0 && team.size() == threads;
            add_runs(solo, 0, p, shares[part], first, end, end, ready, groups == 0, now, spare, target);
          }
        } else {
          add_runs(team, self, p, shares[0], first, end, end, group > 0, groups == 0, now, spare, target);
        }
      }
    }
    if (groups > 0 || p.runs == 0) {
      team.meet();
      finish(team, n, sums, groups, out);
    }
  });
  workspace.trim(alone_bytes + group_bytes);
  return Status::ok;
}

}  // namespace

Status second_moment(const void* features, DType dtype, const int64_t sizes[4], const int64_t strides[4], double* out,
                     int threads, Isa isa) {
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] < 0 || strides[i] < 0) return Status::bad_argument;
  }
  if (sizes[1] < 1 || !out || isa > detect_isa()) return Status::bad_argument;
  const Positions positions(sizes, strides);
  if (positions.total > 0 && !features) return Status::bad_argument;
  const SecondMomentTable& table = isa == Isa::avx512 ? avx512::second_moment_table
                                   : isa == Isa::avx2 ? avx2::second_moment_table
                                                      : portable::second_moment_table;
  const char* bytes = static_cast<const char*>(features);
  const bool pairs = dtype == DType::bfloat16 && table.bfloat16.element && __builtin_cpu_supports("avx512bf16");
  const SecondMomentKernels& kernels = dtype == DType::float64 ? table.float64 : pairs ? table.bfloat16 : table.float32;
  const int64_t channel_stride = sizes[1] > 1 ? strides[1] : 0;  // of one channel it may be anything
  return run({kernels, bytes, dtype, sizes[1], channel_stride, positions}, out, threads);
}

}  // namespace rewrite_core
