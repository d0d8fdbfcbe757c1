#include "spd_solve.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "spd_solve_isa.h"

namespace rewrite_core {
namespace {

constexpr int64_t block_size = 64;  // columns factored before the rest of the matrix is updated

// Work space of one matrix; `sums` has one part per thread.
struct Space {
  Aligned<double> packed, transposed, column;
  Space(int64_t n, int64_t width)
      : packed((n + width) * block_size), transposed(block_size * block_size), column(block_size) {}
  bool ok() const { return packed.data() && transposed.data() && column.data(); }
};

int64_t tile_size(const SPDSolveKernels& kernels) { return kernels.rows * kernels.panels * kernels.width; }

// Right-looking blocked factorisation: factor a diagonal block, solve for the rows below it, subtract their
// products (a second moment of the rows!) from the rest.
template <class Workers>
void factor(Workers& team, const SPDSolveKernels& kernels, double* a, int64_t n, const Space& space, double* sums,
            std::atomic<int64_t>& failed) {
  const int64_t width = kernels.width, panel_size = width * block_size;
  for (int64_t k = 0; k < n; k += block_size) {
    const int64_t size = std::min(block_size, n - k), below = k + size, rest = n - below;
    const int64_t panels = (rest + width - 1) / width;
    if (team.next() == 0) {
      const int bad = kernels.factor_block(a + k * n + k, n, static_cast<int>(size), space.column.data());
      if (bad) failed = k + bad;
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = 0; j < size; ++j) space.transposed.data()[j * size + i] = a[(k + i) * n + k + j];
      }
    }
    team.meet();
    if (failed) return;

    for (int64_t panel = team.next(); panel < panels; panel = team.next()) {
      double* packed = space.packed.data() + panel * panel_size;
      const int64_t row = below + panel * width, rows = std::min(width, n - row);
      kernels.pack(a + row * n + k, n, static_cast<int>(rows), static_cast<int>(size), packed);
      kernels.solve_panel(packed, space.transposed.data(), static_cast<int>(size));
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < size; ++j) a[(row + i) * n + k + j] = packed[j * width + i];
      }
    }
    team.meet();

    const int64_t row_groups = (rest + kernels.rows - 1) / kernels.rows;
    for (int64_t task = team.next(); task < row_groups; task = team.next()) {
      const int64_t row = (row_groups - 1 - task) * kernels.rows;  // the longest rows first
      for (int64_t panel = 0; panel * width <= row; panel += kernels.panels) {
        const int64_t count = std::min<int64_t>(row / width + 1 - panel, kernels.panels);
        std::fill(sums, sums + kernels.rows * count * width, 0.0);
        kernels.tile(space.packed.data() + row / width * panel_size + row % width,
                     space.packed.data() + panel * panel_size, panel_size, static_cast<int>(count),
                     static_cast<int>(size), sums);
        for (int64_t i = row; i < std::min(row + kernels.rows, rest); ++i) {
          const int64_t end = std::min(count * width, i + 1 - panel * width);  // up to the diagonal
          double* target = a + (below + i) * n + below + panel * width;
          for (int64_t j = 0; j < end; ++j) target[j] -= sums[(i - row) * count * width + j];
        }
      }
    }
    team.meet();
  }
  for (int64_t row = team.next(); row < n; row = team.next()) std::fill(a + row * n + row + 1, a + (row + 1) * n, 0.0);
  team.meet();
}

}  // namespace

Status examine(const double* matrices, int64_t batch, int64_t n, double* found, int threads) {
  if (batch < 0 || n < 1 || (batch > 0 && (!matrices || !found))) return Status::bad_argument;
  const int64_t blocks = (n + block_size - 1) / block_size;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), 1 + batch * n * n / (1 << 16)));
  Aligned<double> memory(threads);
  if (!memory.data()) return Status::out_of_memory;
  double* const worst = memory.data();
  Team::run(threads, [&](Team& team) {
    const int64_t me = team.join();
    for (int64_t b = 0; b < batch; ++b) {
      const double* a = matrices + b * n * n;
      double largest = 0, poison = 0;  // poison: 0, or NaN once anything was not finite
      for (int64_t block = team.next(); block < blocks; block = team.next()) {
        const int64_t first = block * block_size, last = std::min(first + block_size, n);
        for (int64_t other = 0; other <= first; other += block_size) {
          for (int64_t i = first; i < last; ++i) {
            for (int64_t j = other; j < std::min(other + block_size, i + 1); ++j) {
              const double difference = std::abs(a[i * n + j] - a[j * n + i]);
              largest = difference > largest ? difference : largest;
              poison += difference - difference;
            }
          }
        }
      }
      worst[me] = largest + poison;
      team.meet();
      if (me == 0) {
        double sum = 0, top = 0, difference = 0;
        for (int64_t i = 0; i < n; ++i) {
          const double entry = a[i * n + i];
          sum += entry;
          top = std::max(top, std::abs(entry));
        }
        for (int64_t t = 0; t < team.size(); ++t) {
          difference = std::max(difference, worst[t]) + (worst[t] - worst[t]);  // one NaN is enough, and stays
        }
        double* const out = found + 3 * b;
        out[0] = sum / static_cast<double>(n);
        out[1] = top;
        out[2] = difference + (sum - sum);
      }
      team.meet();
    }
  });
  return Status::ok;
}

namespace {

// `info`, from the factor's diagonal and the matrix's.
int64_t first_bad_pivot(const double* lower, const double* diagonal, int64_t n, double least) {
  for (int64_t i = 0; i < n; ++i) {
    const double root = lower[i * n + i];
    if (!(root * root > least * diagonal[i])) return i + 1;
  }
  return 0;
}

}  // namespace

Status cholesky(double* matrices, int64_t batch, int64_t n, double least, int64_t* info, int threads, Isa isa) {
  if (batch < 0 || n < 1 || !(least >= 0) || (batch > 0 && (!matrices || !info)) || isa > detect_isa())
    return Status::bad_argument;
  const SPDSolveKernels& kernels = spd_solve_kernels_for(isa);
  threads = std::max(threads, 1);
  const bool share = n >= 256 && batch < 2 * threads;  // one matrix by all threads, else one thread each
  if (n < 128 && batch == 1) threads = 1;              // done before a second thread has started
  std::atomic<bool> out_of_memory{false};
  Aligned<double> diagonals(batch * n);
  if (!diagonals.data()) return Status::out_of_memory;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < n; ++i) diagonals.data()[b * n + i] = matrices[b * n * n + i * (n + 1)];
  }

  if (share) {
    const Space space(n, kernels.width);
    Aligned<double> sums(threads * tile_size(kernels));
    if (!space.ok() || !sums.data()) return Status::out_of_memory;
    for (int64_t b = 0; b < batch; ++b) {
      std::atomic<int64_t> failed{0};
      Team::run(threads, [&](Team& team) {
        factor(team, kernels, matrices + b * n * n, n, space, sums.data() + team.join() * tile_size(kernels), failed);
      });
      info[b] = failed ? failed.load() : first_bad_pivot(matrices + b * n * n, diagonals.data() + b * n, n, least);
    }
    return Status::ok;
  }
  Team::run(static_cast<int>(std::min<int64_t>(threads, batch)), [&](Team& team) {
    const Space space(n, kernels.width);
    Aligned<double> sums(tile_size(kernels));
    if (!space.ok() || !sums.data()) {
      out_of_memory = true;
      return;
    }
    for (int64_t b = team.next(); b < batch; b = team.next()) {
      std::atomic<int64_t> failed{0};
      Solo solo;
      factor(solo, kernels, matrices + b * n * n, n, space, sums.data(), failed);
      info[b] = failed ? failed.load() : first_bad_pivot(matrices + b * n * n, diagonals.data() + b * n, n, least);
    }
  });
  return out_of_memory ? Status::out_of_memory : Status::ok;
}

Status cholesky_solve(const double* lower, int64_t batch, int64_t n, double* x, int64_t m, int threads, Isa isa) {
  if (batch < 0 || n < 1 || m < 0 || (batch * m > 0 && (!lower || !x)) || isa > detect_isa()) {
    return Status::bad_argument;
  }
  const SPDSolveKernels& kernels = spd_solve_kernels_for(isa);
  const int64_t groups = (m + solve_rows - 1) / solve_rows;
  const double work = static_cast<double>(batch) * m * n * n;
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + work / 1e6));
  Team::run(threads, [&](Team& team) {
    for (int64_t task = team.next(); task < batch * groups; task = team.next()) {
      const int64_t b = task / groups, first = task % groups * solve_rows;
      kernels.solve(lower + b * n * n, n, x + (b * m + first) * n,
                    static_cast<int>(std::min<int64_t>(solve_rows, m - first)));
    }
  });
  return Status::ok;
}

}  // namespace rewrite_core
