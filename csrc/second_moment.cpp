#include "second_moment.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "second_moment/ahead.h"
#include "second_moment/groups.h"

namespace rewrite_core {
namespace {

constexpr int64_t group_bytes = 2 << 20;  // all groups' sums
constexpr int64_t most_groups = 16;
constexpr int64_t alone_bytes = 16 << 20;  // of packed keys, where each thread packs its own, or one matrix
constexpr int64_t block_rows = most_block_rows, block_columns = 32;  // channels of one task, by channels
// Positions at most where outer products are faster than tiles; middle and wide: of so many channels.
constexpr int64_t few_narrow = 16, few_middle = 64, few_wide = 48;
constexpr int64_t middle_from = 64, wide_from = 256;
constexpr int64_t sums_work = 16;  // positions that take as long as to read and write the sums
constexpr double few_work = 2e5;   // multiply-adds that a thread is worth waking for
constexpr int64_t few_rows = 16;   // of one of their tasks

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

// The keys of a chunk are multiplied while those of the next are packed, by `Ahead`s. With three chunks A, B, C in
// [first, end) and D the first from `then` on, which is of a later call:
//
//   multiplied, from `packed`           A             B             C
//   packed meanwhile, into `spare`      B by ahead    C by ahead    D by ahead
//
// The buffers are swapped after each column, so that D ends in `packed`, and that call finds it `ready`. Where A is not
// ready, `begin` packs it into `packed` first of all; or, for a worker alone with chunks of one run, the panels of its
// first block only, and the others between the tiles, before B.
//
// Channels up to `padded` are zeros in both buffers.

// One column of that table, of `count` runs from `first` on: adds their products to the lower triangle of `sums`, and
// to the upper one when `mirror`. `together`: other workers share the packed keys, and the blocks.
template <class Tasks>
void add_chunk(Tasks& tasks, bool together, const SecondMomentProblem& p, const Share& share, int64_t first,
               int64_t count, bool mirror, Ahead& begin, Ahead& ahead, const char* packed, double* sums) {
  alignas(64) double part[block_rows * block_columns];
  const int64_t n = p.channels, tile_columns = p.kernels.columns, tile_rows = p.kernels.rows;
  const auto key = [&](int64_t run, int64_t channel) { return packed + (run * p.padded + channel) * key_stride; };
  for (int64_t task = tasks.next(), after; task < share.size; task = after) {
    after = tasks.next();
    const Block& block = share.blocks[task];
    if (begin.busy()) begin.finish(block.panels);
    // the next block's columns, which other threads may have packed
    const Block soon = together && after < share.size ? share.blocks[after] : Block{};
    int64_t asked = 0;
    const int64_t target_stride = mirror ? block_columns : n;
    const auto target = [&](int64_t row, int64_t column) {  // where a product of these two channels is added up
      return mirror ? part + (row - block.row) * block_columns + column - block.column : sums + row * n + column;
    };
    if (mirror) std::fill(part, part + (block.row_end - block.row) * block_columns, 0.0);
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
          if (mirror && run == 0) {  // for add_mirrored
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
    if (mirror) {
      const int64_t rows[2] = {block.row, block.row_end}, columns[2] = {block.column, std::min(block.column_end, n)};
      p.kernels.add_mirrored(part, block_columns, rows, columns, n, sums);
    }
  }
  ahead.finish();
}

// A share, and the run it begins with (where that is p.runs, with nothing).
struct Next {
  const Share* share;
  int64_t run;
};

// The products of runs [first, end), by one worker alone. The first chunk of them is in `packed` already when `ready`.
// `then` is asked when it matters what the next call will be.
template <class Then>
void add_runs(const SecondMomentProblem& p, const Share& share, int64_t first, int64_t end, Then then, bool ready,
              bool mirror, char*& packed, char*& spare, double* sums) {
  Solo solo;
  Ahead begin(p, share.panels, first, ready ? 0 : std::min(p.chunk_runs, end - first), nullptr, packed);
  // The first chunk of all has no chunk before it: a worker starts as soon as its first block can be computed.
  if (!ready && p.chunk_runs > 1) begin.finish();
  for (; first < end; first += p.chunk_runs) {
    const int64_t count = std::min(p.chunk_runs, end - first);
    const bool last = first + count == end;
    const Next next = last ? then() : Next{&share, first + count};
    Ahead ahead(p, next.share->panels, next.run, std::min(p.chunk_runs, (last ? p.runs : end) - next.run), nullptr,
                spare);
    solo.each([&](int) { add_chunk(solo, false, p, share, first, count, mirror && last, begin, ahead, packed, sums); });
    std::swap(packed, spare);
  }
}

// The same by all of a team, for calls that follow each other.
void add_runs_together(Team& team, const SecondMomentProblem& p, const Share& share, int64_t first, int64_t end,
                       bool ready, bool mirror, char*& packed, char*& spare, double* sums) {
  std::atomic<int64_t> dealt{0};
  if (!ready) {
    team.each(
        [&](int) { Ahead(p, share.panels, first, std::min(p.chunk_runs, end - first), &dealt, packed).finish(); });
  }
  for (; first < end; first += p.chunk_runs) {
    const int64_t count = std::min(p.chunk_runs, end - first), next = first + count;
    const int64_t next_end = next == end ? p.runs : end;
    dealt = 0;
    team.each([&](int) {
      Ahead begin(p, share.panels, first, 0, nullptr, packed);
      Ahead ahead(p, share.panels, next, std::min(p.chunk_runs, next_end - next), &dealt, spare);
      add_chunk(team, true, p, share, first, count, mirror && next == end, begin, ahead, packed, sums);
    });
    std::swap(packed, spare);
  }
}

// Adds the groups' sums to the lower triangle and mirrors it, by blocks through a small buffer: the rows of a matrix
// of a power of two of channels share the cache's sets.
void finish(Team& team, int64_t n, const double* sums, int64_t groups, double* out) {
  constexpr int64_t size = 32;
  const int64_t blocks = (n + size - 1) / size;
  team.each([&](int) {
    double turned[size][size];
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
  });
}

// The blocks in order of rows, cut into `parts` of the same work.
std::vector<Share> split(const SecondMomentProblem& p, std::vector<Block>& blocks, int64_t parts) {
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

// Few positions: the keys as doubles, then some rows at a time.
Status run_few(const SecondMomentProblem& p, double* out, int threads) {
  const int64_t n = p.channels, positions = p.positions.total;
  const int64_t lanes = (n + most_lanes - 1) / most_lanes;
  const int64_t stride = (lanes | 1) * most_lanes;  // an odd number of cache lines: else caches mix positions up
  const double work = 0.5 * static_cast<double>(positions + sums_work) * n * n;
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + work / few_work));
  thread_local Workspace workspace;
  double* const all_keys =
      reinterpret_cast<double*>(workspace.get(threads * positions * stride * static_cast<int64_t>(sizeof(double))));
  if (!all_keys) return Status::out_of_memory;
  // Each worker begins with its own rows, the same in every call: there is little to compute, and from another core's
  // cache the sums would come slowly. Then it takes what the others have left.
  const int64_t tasks = (n + few_rows - 1) / few_rows;
  const auto first_of = [&](int share) {  // as a row has as many products as its number, shares end by square roots
    return static_cast<int64_t>(static_cast<double>(tasks) * std::sqrt(static_cast<double>(share) / threads));
  };
  struct alignas(64) Taken {
    std::atomic<int64_t> tasks{0};
  };
  std::vector<Taken> taken;
  try {
    taken = std::vector<Taken>(threads);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }
  const auto next = [&](int worker) -> int64_t {
    for (int turn = 0; turn < threads; ++turn) {
      const int share = (worker + turn) % threads;
      const int64_t task = first_of(share) + taken[share].tasks.fetch_add(1, std::memory_order_relaxed);
      if (task < first_of(share + 1)) return task * few_rows;
    }
    return -1;
  };
  Team::run(threads, [&](Team& team) {
    team.each([&](int worker) {
      double* const keys = all_keys + worker * positions * stride;
      double* to = keys;
      p.positions.pieces(0, positions, [&](int64_t offset, int64_t position_stride, int count) {
        p.kernels.doubles(p.features + offset * p.element, static_cast<int>(p.dtype), p.channel_stride, position_stride,
                          n, count, to, stride);
        to += count * stride;
      });
      for (int64_t row = next(worker), after; row >= 0; row = after) {
        after = next(worker);
        p.kernels.outer(keys, stride, static_cast<int>(positions), row, std::min(n, row + few_rows), n, out, after);
      }
    });
  });
  workspace.trim(alone_bytes);
  return Status::ok;
}

// How threads share the work. Caches of different cores talk slowly, so that threads that share packed keys mostly
// wait; they are better off alone, each packing what it needs.
enum class Sharing {
  groups,  // few channels: runs form groups, each summed by one thread and by itself
  blocks,  // many channels: shares of the blocks, each of all runs and by one thread
  none,    // too many threads for that: they pack and add up every chunk together
};

Status run(const SecondMomentProblem& p, double* out, int threads) {
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

  const auto buffer = [&](int worker) {
    char* const mine = packed + buffers * packed_size * worker;
    for (int64_t row = 0; row < buffers * p.chunk_runs * p.padded; ++row) {
      if (row % p.padded >= n) std::memset(mine + row * key_stride, 0, run_bytes);
    }
    return mine;
  };
  const int64_t turns = std::max<int64_t>(groups, 1);
  const auto first_of = [&](int64_t group) { return std::min(p.runs, group * group_runs); };
  const auto end_of = [&](int64_t group) { return groups ? first_of(group + 1) : p.runs; };
  Team::run(threads, [&](Team& team) {
    if (sharing == Sharing::groups) {
      team.each([&](int worker) {
        char *now = buffer(worker), *spare = now + (buffers - 1) * packed_size;
        bool ready = false;
        int64_t after = 0;
        const auto then = [&] { return Next{&shares[0], first_of(after = team.next())}; };
        for (int64_t group = team.next(); group < groups; group = after) {
          double* mine = sums + group * n * n;
          std::fill(mine, mine + n * n, 0.0);
          add_runs(p, shares[0], first_of(group), end_of(group), then, ready, false, now, spare, mine);
          ready = true;
        }
      });
    } else if (sharing == Sharing::blocks) {
      if (groups) std::fill(sums, sums + groups * n * n, 0.0);
      const int64_t parts = static_cast<int64_t>(shares.size());
      team.each([&](int worker) {
        char *now = buffer(worker), *spare = now + (buffers - 1) * packed_size;
        bool ready = false, ahead = false;
        int64_t task = team.next(), after = -1;
        const auto then = [&] {  // the last shares are left to who is free first
          after = task + team.workers() < turns * parts ? team.next() : -1;
          return ahead && 0 <= after && after < turns * parts ? Next{&shares[after % parts], first_of(after / parts)}
                                                              : Next{&shares[0], p.runs};
        };
        for (; task < turns * parts && p.runs > 0; task = after < 0 ? team.next() : after) {
          const int64_t group = task / parts;
          // beside a shorter run, tiles make fewer steps and would copy less
          ahead = end_of(group) < p.runs || p.length(p.runs - 1) == p.run_length;
          add_runs(p, shares[task % parts], first_of(group), end_of(group), then, ready, groups == 0, now, spare,
                   groups ? sums + group * n * n : out);
          ready = ahead && after >= 0;
        }
      });
    } else {
      char *now = buffer(0), *spare = now + (buffers - 1) * packed_size;
      if (groups) std::fill(sums, sums + groups * n * n, 0.0);
      for (int64_t group = 0; group < turns; ++group) {
        add_runs_together(team, p, shares[0], first_of(group), end_of(group), group > 0, groups == 0, now, spare,
                          groups ? sums + group * n * n : out);
      }
    }
    if (groups > 0 || p.runs == 0) finish(team, n, sums, groups, out);
  });
  workspace.trim(alone_bytes + group_bytes);
  return Status::ok;
}

Status run_one(const SecondMomentProblem& p, double* out, int threads) {
  const int64_t few = p.channels < middle_from ? few_narrow : p.channels < wide_from ? few_middle : few_wide;
  return p.positions.total > 0 && p.positions.total <= few ? run_few(p, out, threads) : run(p, out, threads);
}

// Groups of more channels than a tile has: each is a problem of its own. Threads take whole groups where there are
// enough of them.
Status run_large_groups(const SecondMomentProblem& p, int64_t groups, double* out, int threads) {
  const int64_t size = p.channels / groups;
  const auto one = [&](int64_t group, int helpers) {
    const SecondMomentProblem own{p.kernels,        p.features + group * size * p.channel_stride * p.element,
                                  p.dtype,          size,
                                  p.channel_stride, p.positions};
    return run_one(own, out + group * size * size, helpers);
  };
  const double work = 0.5 * static_cast<double>(p.positions.total + sums_work) * size * p.channels;
  const int useful = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + work / 1e6));
  if (groups < 4 * useful) {  // the last ones would be waited for
    for (int64_t group = 0; group < groups; ++group) {
      if (const Status status = one(group, threads); status != Status::ok) return status;
    }
    return Status::ok;
  }
  std::atomic<Status> found{Status::ok};
  Team::run(useful, [&](Team& team) {
    team.each([&](int) {
      for (int64_t group = team.next(); group < groups; group = team.next()) {
        if (const Status status = one(group, 1); status != Status::ok) found = status;
      }
    });
  });
  return found;
}

}  // namespace

Status second_moment(const void* features, DType dtype, const int64_t sizes[4], const int64_t strides[4], double* out,
                     int threads, Isa isa, int64_t groups) {
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] < 0 || strides[i] < 0) return Status::bad_argument;
  }
  if (sizes[1] < 1 || !out || isa > detect_isa()) return Status::bad_argument;
  if (groups < 1 || sizes[1] % groups) return Status::bad_argument;
  const Positions positions(sizes, strides);
  if (positions.total > 0 && !features) return Status::bad_argument;
  const SecondMomentTable& table = second_moment_table_for(isa);
  const char* bytes = static_cast<const char*>(features);
  const bool pairs = dtype == DType::bfloat16 && table.bfloat16.element && detect_bfloat16();
  const SecondMomentKernels& kernels = dtype == DType::float64 ? table.float64 : pairs ? table.bfloat16 : table.float32;
  const int64_t channel_stride = sizes[1] > 1 ? strides[1] : 0;  // of one channel it may be anything
  const SecondMomentProblem problem{kernels, bytes, dtype, sizes[1], channel_stride, positions};
  if (groups == 1) return run_one(problem, out, threads);
  return sizes[1] / groups <= kernels.columns ? run_small_groups(problem, groups, out, threads)
                                              : run_large_groups(problem, groups, out, threads);
}

}  // namespace rewrite_core
