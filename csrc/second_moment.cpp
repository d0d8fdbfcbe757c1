#include "second_moment.h"

#include <algorithm>

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

struct Tile {
  int64_t row;    // first channel
  int64_t panel;  // first column panel
  int panels;
};

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Positions are taken in chunks that fit the cache: pack a chunk, then add it to every tile of the lower
// triangle. Each tile belongs to one thread at a time and sees the positions in order, so the number of
// threads does not change a bit of the result.
template <class Real>
Status run(const SecondMomentKernels<Real>& kernels, const char* features, DType dtype, int64_t channels,
           int64_t channel_stride, const Positions& positions, double* out, int threads) {
  const int64_t width = kernels.width;
  const int64_t panels = (channels + width - 1) / width;
  const int64_t panel_size = width * max_run;
  const int64_t run_size = panels * panel_size;
  const int64_t runs = (positions.total + max_run - 1) / max_run;
  constexpr int64_t chunk_bytes = 2 << 20;  // packed features, shared by all threads: about one core's L2
  const int64_t chunk_runs =
      std::min(runs, std::max<int64_t>(1, chunk_bytes / (run_size * static_cast<int64_t>(sizeof(Real)))));

  std::vector<Tile> tiles;
  try {
    for (int64_t panel = 0; panel < panels; panel += kernels.panels) {  // neighbours share column panels
      for (int64_t row = panel * width; row < channels; row += kernels.rows) {
        const int64_t needed = std::min(row / width + 1, panel + kernels.panels) - panel;
        tiles.push_back({row, panel, static_cast<int>(needed)});
      }
    }
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory;
  }

  // A thread costs some microseconds to wake: give each at least a million multiply-adds.
  const double work = 0.5 * static_cast<double>(positions.total) * channels * channels;
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + work / 1e6));

  Aligned<Real> packed(chunk_runs * run_size);
  Aligned<Real> scratch(threads * panel_size);
  Aligned<double> sums(threads * kernels.rows * kernels.panels * width);
  if (!packed.data() || !scratch.data() || !sums.data()) return Status::out_of_memory;

  Team::run(threads, [&](Team& team) {
    const int64_t self = team.join();
    Real* const my_scratch = scratch.data() + self * panel_size;
    double* const my_sums = sums.data() + self * kernels.rows * kernels.panels * width;
    for (int64_t first = 0; first < runs; first += chunk_runs) {
      const int64_t count = std::min(chunk_runs, runs - first);
      const auto run_length = [&](int64_t r) {
        return std::min<int64_t>(max_run, positions.total - (first + r) * max_run);
      };

      for (int64_t task = team.next(); task < count * panels; task = team.next()) {
        const int64_t r = task / panels, channel = task % panels * width;
        Real* target = packed.data() + task * panel_size;
        positions.pieces(
            (first + r) * max_run, run_length(r), [&](int64_t offset, int64_t stride, int length) {
              kernels.pack(features + (offset + channel * channel_stride) * element_size(dtype),
                           static_cast<int>(dtype), channel_stride, stride,
                           static_cast<int>(std::min(width, channels - channel)), length, target, my_scratch);
              target += length * width;
            });
      }
      team.meet();

      for (int64_t task = team.next(); task < static_cast<int64_t>(tiles.size()); task = team.next()) {
        const Tile& tile = tiles[task];
        const int64_t columns = tile.panels * width;
        std::fill(my_sums, my_sums + kernels.rows * columns, 0.0);
        for (int64_t r = 0; r < count; ++r) {
          const Real* base = packed.data() + r * run_size;
          kernels.tile(base + tile.row / width * panel_size + tile.row % width,
                       base + tile.panel * panel_size, panel_size, tile.panels,
                       static_cast<int>(run_length(r)), my_sums);
        }
        for (int64_t i = 0; i < std::min<int64_t>(kernels.rows, channels - tile.row); ++i) {
          const int64_t row = tile.row + i, column = tile.panel * width;
          const int64_t end = std::min(columns, row + 1 - column);  // up to the diagonal
          for (int64_t j = 0; j < end; ++j) out[row * channels + column + j] += my_sums[i * columns + j];
        }
      }
      team.meet();
    }

    constexpr int64_t block = 32;  // mirror by blocks, so that neither side strides through memory
    const int64_t blocks = (channels + block - 1) / block;
    for (int64_t task = team.next(); task < blocks; task = team.next()) {
      const int64_t row_end = std::min(channels, (task + 1) * block);
      for (int64_t start = 0; start < row_end; start += block) {
        for (int64_t i = task * block; i < row_end; ++i) {
          for (int64_t j = start; j < std::min(i, start + block); ++j) {
            out[j * channels + i] = out[i * channels + j];
          }
        }
      }
    }
  });
  return Status::ok;
}

}  // namespace

Status second_moment(const void* features, DType dtype, const int64_t sizes[4], const int64_t strides[4],
                     double* out, int threads, Isa isa) {
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
  if (dtype == DType::float64) {
    return run(table.float64, bytes, dtype, sizes[1], strides[1], positions, out, threads);
  }
  return run(table.float32, bytes, dtype, sizes[1], strides[1], positions, out, threads);
}

}  // namespace rewrite_core
