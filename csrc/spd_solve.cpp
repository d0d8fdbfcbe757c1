#include "spd_solve.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "spd_solve_isa.h"

namespace rewrite_core {
namespace {

constexpr int64_t most_kept = 1 << 23;  // bytes of work space that a thread keeps for its next call

// Work space of one matrix.
struct Space {
  Aligned<double> packed, transposed;
  Space(int64_t n, int width) : packed((n + width) * block_size), transposed(block_size * block_size) {}
  bool ok() const { return packed.data() && transposed.data(); }
};

constexpr int64_t update_rows = 32;  // updated by one thread at a time; columns are read once for all of them

// Right-looking blocked factorisation: factor a diagonal block, solve for the rows below it, subtract their
// products (a second moment of the rows!) from the rest. One thread factors the next block while others still subtract.
// Returns 0, or the 1-based number of a pivot that is not positive.
template <class Workers>
int64_t factor(Workers& team, const SPDSolveKernels& kernels, double* a, int64_t n, const Space& space) {
  const int64_t width = kernels.width, panel_size = width * block_size;
  double *const packed = space.packed.data(), *const transposed = space.transposed.data();
  const auto factor_at = [&](int64_t k) -> int64_t {
    const int bad = kernels.factor_block(a + k * (n + 1), n, static_cast<int>(std::min(block_size, n - k)), transposed);
    return bad ? k + bad : 0;
  };
  int64_t bad = factor_at(0);
  for (int64_t below = block_size; below < n && !bad; below += block_size) {
    const int64_t rest = n - below, panels = (rest + width - 1) / width;
    team.each([&](int) {
      for (int64_t panel = team.next(); panel < panels; panel = team.next()) {
        const int64_t row = below + panel * width;
        kernels.solve_rows(a + row * n + below - block_size, n, static_cast<int>(std::min(width, n - row)), transposed,
                           packed + panel * panel_size);
      }
    });

    const auto subtract = [&](int64_t first, int64_t end) {  // from rows of the rest, up to the diagonal
      for (int64_t column = 0; column < end; column += kernels.panels * width) {
        for (int64_t row = std::max(first, column - column % width); row < end; row += width) {
          const int64_t count = std::min<int64_t>((row - column) / width + 1, kernels.panels);
          kernels.subtract(packed + row / width * panel_size, packed + column / width * panel_size,
                           static_cast<int>(count),
                           {a + (below + row) * n + below + column, n, rest - row, rest - column});
        }
      }
    };
    const int64_t left = std::max<int64_t>(rest - block_size, 0), groups = (left + update_rows - 1) / update_rows;
    team.each([&](int) {
      for (int64_t task = team.next(); task <= groups; task = team.next()) {
        if (task == 0) {
          subtract(0, std::min(block_size, rest));
          bad = factor_at(below);
        } else {  // the longest rows first
          const int64_t row = block_size + (groups - task) * update_rows;
          subtract(row, std::min(row + update_rows, rest));
        }
      }
    });
  }
  if (bad) return bad;
  team.each([&](int) {
    for (int64_t row = team.next(); row < n; row = team.next()) {
      std::fill(a + row * n + row + 1, a + (row + 1) * n, 0.0);
    }
  });
  return 0;
}

// How far a matrix is from symmetric, in lanes that a compiler can make vectors of.
struct Seen {
  static constexpr int64_t few = 8;     // numbers in a cache line
  double difference[few], poison[few];  // poison: 0, or NaN once anything was not finite

  // One square of the lower triangle, `few` rows by as many columns, up to the diagonal and the last row. A line of a
  // column's entries is read once so, however far apart they are. ahead: the square block_size columns on comes next.
  void compare(const double* a, int64_t n, int64_t row, int64_t column, bool ahead) {
    const int64_t rows = std::min(few, n - row);
    const double *own = a + row * n + column, *mirrored = a + column * n + row;
    const auto look = [&](int64_t i, int64_t j) {
      const double one = std::abs(own[i * n + j] - mirrored[j * n + i]);
      difference[j] = one > difference[j] ? one : difference[j];
      poison[j] += one - one;
    };
    if (column == row || rows < few) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < few && column + j <= row + i; ++j) look(i, j);
      }
      return;
    }
    for (int64_t i = 0; i < few; ++i) {
      if (ahead) {
        __builtin_prefetch(own + i * n + block_size);
        __builtin_prefetch(mirrored + std::min(block_size + i, n - 1 - column) * n);
      }
      for (int64_t j = 0; j < few; ++j) look(i, j);
    }
  }
};

}  // namespace

Status examine(const double* matrices, int64_t batch, int64_t n, double* found, int threads) {
  if (batch < 0 || n < 1 || (batch > 0 && (!matrices || !found))) return Status::bad_argument;
  const int64_t blocks = (n + block_size - 1) / block_size;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), 1 + batch * n * n / (1 << 16)));
  Aligned<Seen> memory(threads);
  if (!memory.data()) return Status::out_of_memory;
  Seen* const seen = memory.data();
  Team::run(threads, [&](Team& team) {
    for (int64_t b = 0; b < batch; ++b) {
      const double* a = matrices + b * n * n;
      std::fill(seen, seen + threads, Seen{});
      team.each([&](int worker) {
        Seen own = seen[worker];
        for (int64_t block = team.next(); block < blocks; block = team.next()) {
          const int64_t first = block * block_size, last = std::min(first + block_size, n);
          for (int64_t other = 0; other <= first; other += block_size) {
            for (int64_t row = first; row < last; row += Seen::few) {
              for (int64_t column = other; column < std::min(other + block_size, row + 1); column += Seen::few) {
                own.compare(a, n, row, column, other < first);
              }
            }
          }
        }
        seen[worker] = own;
      });
      double sum = 0, top = 0, difference = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double entry = a[i * n + i];
        sum += entry;
        top = std::max(top, std::abs(entry));
      }
      for (int worker = 0; worker < threads; ++worker) {
        for (int64_t j = 0; j < Seen::few; ++j) {  // one NaN is enough, and stays
          difference = std::max(difference, seen[worker].difference[j]) + seen[worker].poison[j];
        }
      }
      double* const out = found + 3 * b;
      out[0] = sum / static_cast<double>(n);
      out[1] = top;
      out[2] = difference + (sum - sum);
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

// By all threads: fresh pages cost more than the copy.
void copy_triangles(const double* matrices, int64_t batch, int64_t n, double* lower, int threads) {
  use_huge_pages(lower, batch * n * n * static_cast<int64_t>(sizeof(double)));
  const int64_t blocks = (batch * n + block_size - 1) / block_size;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), 1 + batch * n * n / (1 << 18)));
  Team::run(threads, [&](Team& team) {
    team.each([&](int) {
      for (int64_t block = team.next(); block < blocks; block = team.next()) {
        for (int64_t row = block * block_size; row < std::min((block + 1) * block_size, batch * n); ++row) {
          std::copy_n(matrices + row * n, row % n + 1, lower + row * n);
        }
      }
    });
  });
}

}  // namespace

Status cholesky(const double* matrices, double* lower, int64_t batch, int64_t n, double least, int64_t* info,
                int threads, Isa isa) {
  if (batch < 0 || n < 1 || !(least >= 0) || (batch > 0 && (!matrices || !lower || !info)) || isa > detect_isa())
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
  copy_triangles(matrices, batch, n, lower, threads);

  if (share) {
    const Space space(n, kernels.width);
    if (!space.ok()) return Status::out_of_memory;
    for (int64_t b = 0; b < batch; ++b) {
      int64_t failed = 0;
      Team::run(threads, [&](Team& team) { failed = factor(team, kernels, lower + b * n * n, n, space); });
      info[b] = failed ? failed : first_bad_pivot(lower + b * n * n, diagonals.data() + b * n, n, least);
    }
    return Status::ok;
  }
  Team::run(static_cast<int>(std::min<int64_t>(threads, batch)), [&](Team& team) {
    team.each([&](int) {
      const Space space(n, kernels.width);
      for (int64_t b = team.next(); b < batch; b = team.next()) {
        if (!space.ok()) {
          out_of_memory = true;
          continue;
        }
        Solo solo;
        const int64_t failed = factor(solo, kernels, lower + b * n * n, n, space);
        info[b] = failed ? failed : first_bad_pivot(lower + b * n * n, diagonals.data() + b * n, n, least);
      }
    });
  });
  return out_of_memory ? Status::out_of_memory : Status::ok;
}

namespace {

// A solution's residual is at rounding error where no entry of b - A x is above this times |A| |x| + |b|. Cholesky's
// are at 2 to 5 eps; what a shift or bad scaling spoils is far above.
constexpr double epsilon = std::numeric_limits<double>::epsilon(), solved = 32 * epsilon;

// The same for sums of the equations: there errors make up for each other, and Cholesky's are at 0.3 to 2.5 eps.
constexpr double sums_solved = 8 * epsilon;

// A number that looks like chance, between 1 and 2 in size.
double chance(uint64_t index) {
  uint64_t bits = (index + 1) * 0x9E3779B97F4A7C15u;  // as in splitmix64
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
  bits ^= bits >> 31;
  const double size = 1.0 + static_cast<double>(bits >> 12) / static_cast<double>(int64_t{1} << 52);
  return bits & 1 ? -size : size;
}

// The right-hand sides of one matrix, `lanes` of them from `first` on.
struct Sides {
  int64_t first, count;
  int vectors;
};

Sides sides_of(int64_t m, int64_t panels, int64_t panel, int width) {
  const int64_t vectors = (m + width - 1) / width, each = vectors / panels, more = vectors % panels;
  const int64_t begin = panel * each + std::min(panel, more), own = each + (panel < more);
  return {begin * width, std::min(own * width, m - begin * width), static_cast<int>(own)};
}

// From so many rows on threads share a matrix: the look at the residual, and then the substitutions of a few
// right-hand sides.
// Into what parts, and in which order these are added up, depends on n alone: so the bits do not depend on the threads.
constexpr int64_t shared_from = 384, substitution_shared_from = 1024;
// From here on, where no cache holds a factor, a helper that is late in the midst of a substitution costs more than its
// help is worth: with cores taken, one thread goes alone.
constexpr int64_t alone_from = 2560;
constexpr int64_t left_rows = 8, above_rows = 128, below_columns = 256;  // of one task
constexpr int64_t alone_below = 192;          // columns: less is done before a helper has come
constexpr int64_t panels_shared_from = 2048;  // rows: where a factor is not at hand in a core's cache
constexpr int64_t most_sides = 72;            // whose panels are solved at once
constexpr int cache_line = 64;
constexpr int64_t yield_after = 64;  // looks of a thread that waits for another one's solution

// The matrix in blocks, so many a side; with few of them less is added up in the end.
int64_t blocks_of(int64_t n) { return n < shared_from ? 1 : n < 4 * shared_from ? 4 : 8; }

// Rows of one, a multiple of what a vector holds.
int64_t block_rows(int64_t n) { return blocks_of(n) == 1 ? n : (n / blocks_of(n) + 8) / 8 * 8; }

Range block_at(int64_t n, int64_t index) { return {index * block_rows(n), std::min(n, (index + 1) * block_rows(n))}; }

// From one vector of n numbers to the next: aligned, and not a power of two, where caches would mix them up.
int64_t pitch_of(int64_t n) { return (n + 7) / 8 * 8 + 24; }

// x[r * n], m < wide_from of them: L y = x in place.
template <class Workers>
void forward_few(Workers& team, const SPDSolveKernels& kernels, const double* lower, int64_t n, int64_t m, double* x) {
  const int rows = static_cast<int>(m);
  if (n < substitution_shared_from) return kernels.forward(lower, n, n, x, n, rows);
  const auto left_of = [&](auto& workers, int64_t k, int64_t end) {  // rows [k, end), without their triangle
    workers.each([&](int) {
      for (int64_t i = k + left_rows * workers.next(); i < end; i = k + left_rows * workers.next()) {
        kernels.take_left(lower, n, x, rows, i, std::min(i + left_rows, end), k);
      }
    });
  };
  Solo solo;
  for (int64_t k = 0; k < n; k += block_size) {
    const int64_t end = std::min(k + block_size, n);
    k < alone_below ? left_of(solo, k, end) : left_of(team, k, end);
    kernels.forward(lower + k * n + k, n, end - k, x + k, n, rows);
  }
}

// L^T x = y of the same, a block after the other from the last one on; done(rows) when one is. Whoever subtracts from
// which columns, and how many at once, changes no bit.
template <class Workers, class Done>
void backward_few(Workers& team, const SPDSolveKernels& kernels, const double* lower, int64_t n, int64_t m, double* x,
                  const Done& done) {
  const int rows = static_cast<int>(m);
  for (int64_t block = blocks_of(n) - 1; block >= 0; --block) {
    const auto [k, end] = block_at(n, block);
    kernels.backward(lower + k * n + k, n, end - k, x + k, n, rows);
    const int64_t first = k, last = end, each = team.workers() == 1 ? first : below_columns;
    team.each([&](int) {
      for (int64_t column = each * team.next(); column < first; column = each * team.next()) {
        kernels.take_below(lower, n, x, rows, first, last, column, std::min(column + each, first));
      }
    });
    done(Range{first, last});
  }
}

// A few sides one a row, and back.
void rows_of(const double* from, int64_t n, int64_t m, double* x) {
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < n; ++i) x[r * n + i] = from[i * m + r];
  }
}

void columns_of(const double* from, int64_t n, int64_t m, double* x) {
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t i = 0; i < n; ++i) x[i * m + r] = from[r * n + i];
  }
}

// What the sides of one matrix are solved with.
struct System {
  const SPDSolveKernels& kernels;
  const double *matrix, *lower, *sketch;  // sketch: or null
  int64_t n, m;
  int64_t panels, at_once;  // many sides in so many panels, of which so many share the look at the factor
  const double* rhs;
  double* x;
};

// Some panels of many right-hand sides, [n][vectors * width] each, one after the other from x on.
struct Panels {
  const SPDSolveKernels& kernels;
  int64_t n, m, all;
  Range range;  // of all
  double* x;

  Sides sides(int64_t panel) const { return sides_of(m, all, panel, kernels.width); }
  double* at(int64_t panel) const { return x + (sides(panel).first - sides(range.begin).first) * n; }

  void read(const double* from) const {
    for (int64_t panel = range.begin; panel < range.end; ++panel) {
      const Sides own = sides(panel);
      const int64_t wide = own.vectors * static_cast<int64_t>(kernels.width);
      double* const to = at(panel);
      for (int64_t i = 0; i < n; ++i) {
        const double* row = from + i * m + own.first;
        std::copy(row, row + own.count, to + i * wide);
        std::fill(to + i * wide + own.count, to + (i + 1) * wide, 0.0);
      }
    }
  }

  void write(double* to) const {
    for (int64_t panel = range.begin; panel < range.end; ++panel) {
      const Sides own = sides(panel);
      const int64_t wide = own.vectors * static_cast<int64_t>(kernels.width);
      const double* const from = at(panel);
      for (int64_t i = 0; i < n; ++i) std::copy_n(from + i * wide, own.count, to + i * m + own.first);
    }
  }
};

// Takes what the solution in these columns makes of it from rows of all panels, `each` rows a task. `substitute` is
// forward_wide or backward_wide.
template <class Workers, class Substitute>
void take_block(Workers& team, const Panels& panels, const double* lower, Range rows, Range columns, int64_t each,
                Substitute substitute) {
  const auto row = [&] { return rows.begin + each * team.next(); };
  team.each([&](int) {
    for (int64_t i = row(); i < rows.end; i = row()) {
      for (int64_t panel = panels.range.begin; panel < panels.range.end; ++panel) {
        const Range own{i, std::min(i + each, rows.end)};
        substitute(lower, panels.n, panels.at(panel), panels.sides(panel).vectors, own, columns);
      }
    }
  });
}

// Solves a block of rows with nothing left of it, or below it, a panel a task.
template <class Workers, class Substitute>
void solve_block(Workers& team, const Panels& panels, const double* lower, Range rows, Substitute substitute) {
  const auto next = [&] { return panels.range.begin + team.next(); };
  team.each([&](int) {
    for (int64_t panel = next(); panel < panels.range.end; panel = next()) {
      substitute(lower, panels.n, panels.at(panel), panels.sides(panel).vectors, rows, rows);
    }
  });
}

// L L^T x = y of panels in place; from `substitution_shared_from` rows on block by block, so that L is read along its
// rows.
template <class Workers>
void solve_wide(Workers& team, const Panels& panels, const double* lower) {
  const auto forward = panels.kernels.forward_wide, backward = panels.kernels.backward_wide;
  const int64_t n = panels.n, size = n < substitution_shared_from ? n : block_size;
  Solo solo;
  const auto solve = [&](Range rows, auto substitute) {
    panels.range.end - panels.range.begin == 1 ? solve_block(solo, panels, lower, rows, substitute)
                                               : solve_block(team, panels, lower, rows, substitute);
  };
  const auto take = [&](Range rows, Range columns, int64_t each, auto substitute) {
    std::max(rows.end, columns.end) - std::min(rows.begin, columns.begin) < alone_below
        ? take_block(solo, panels, lower, rows, columns, each, substitute)
        : take_block(team, panels, lower, rows, columns, each, substitute);
  };
  for (int64_t k = 0; k < n; k += size) {
    const Range block{k, std::min(k + size, n)};
    if (k > 0) take(block, {0, k}, left_rows, forward);
    solve(block, forward);
  }
  for (int64_t k = (n - 1) / size * size; k >= 0; k -= size) {
    const Range block{k, std::min(k + size, n)};
    solve(block, backward);
    if (k > 0) take({0, k}, block, above_rows, backward);
  }
}

// x = A^-1 from by the factor, for the sides in these of the system's panels, or all if they are few; `space` has
// side_space numbers.
template <class Workers>
void solve_sides(Workers& team, const System& s, Range range, const double* from, double* x, double* space) {
  if (s.m < wide_from) {
    rows_of(from, s.n, s.m, space);
    forward_few(team, s.kernels, s.lower, s.n, s.m, space);
    backward_few(team, s.kernels, s.lower, s.n, s.m, space, [](Range) {});
    return columns_of(space, s.n, s.m, x);
  }
  const Panels panels{s.kernels, s.n, s.m, s.panels, range, space};
  panels.read(from);
  solve_wide(team, panels, s.lower);
  panels.write(x);
}

int64_t side_space(int64_t n, int width, int64_t at_once) {
  return pitch_of(std::max<int64_t>(at_once * wide_vectors * width, wide_from - 1) * n);
}

// y = A w and z = |A| v, block by block of the lower triangle: those of the last columns first, in which x is known
// first, and of these the one on the diagonal, which is half as much, last.
class Product {
 public:
  static int64_t space(int64_t n) {
    const int64_t blocks = blocks_of(n);
    return (4 + 2 * blocks) * pitch_of(n) + blocks * (blocks - 1) * pitch_of(block_rows(n));
  }

  Product(const SPDSolveKernels& kernels, const double* a, int64_t n, double* space)
      : w(space), v(w + pitch_of(n)), y(v + pitch_of(n)), z(y + pitch_of(n)), kernels_(kernels), a_(a), n_(n) {}

  double *const w, *const v, *const y, *const z;

  int64_t tasks() const { return blocks_of(n_) * (blocks_of(n_) + 1) / 2; }

  // Of how many blocks of rows from the last on a task wants w and v.
  static int64_t wanted(int64_t task) {
    int64_t count = 1;
    while (count * (count + 1) / 2 <= task) ++count;
    return count;
  }

  void run(int64_t task, Sizes sizes) const {
    const int64_t last = blocks_of(n_) - 1, row = last - (task - first_of(task)), column = last + 1 - wanted(task);
    const Range rows = block_at(n_, row), columns = block_at(n_, column);
    const ProductSums own = own_of(column, rows.begin);
    kernels_.multiply({a_, n_, w, v}, rows, columns, sizes, own, row == column ? own : mirrored_of(task));
  }

  // When all tasks are done.
  void add_up(Sizes sizes) const {
    std::fill(y, y + n_, 0.0);
    std::fill(z, z + n_, 0.0);
    const auto add = [&](Range rows, ProductSums sums) {
      for (int64_t i = rows.begin; i < rows.end; ++i) y[i] += sums.y[i - rows.begin];
      for (int64_t i = rows.begin; sizes != Sizes::none && i < rows.end; ++i) z[i] += sums.z[i - rows.begin];
    };
    for (int64_t task = 0; task < tasks(); ++task) {
      const Range columns = block_at(n_, blocks_of(n_) - wanted(task));
      if (first_of(task) == task) add({columns.begin, n_}, own_of(blocks_of(n_) - wanted(task), columns.begin));
      if (task + 1 < first_of(task) + wanted(task)) add(columns, mirrored_of(task));
    }
  }

  template <class Workers>
  void run_all(Workers& team, Sizes sizes) const {
    team.each([&](int) {
      for (int64_t task = team.next(); task < tasks(); task = team.next()) run(task, sizes);
    });
    add_up(sizes);
  }

 private:
  // The first task with the same columns.
  static int64_t first_of(int64_t task) { return wanted(task) * (wanted(task) - 1) / 2; }

  // What blocks in these columns add to their own rows.
  ProductSums own_of(int64_t column, int64_t row) const {
    double* const sums = z + (1 + 2 * column) * pitch_of(n_) + row;
    return {sums, sums + pitch_of(n_)};
  }

  ProductSums mirrored_of(int64_t task) const {
    const int64_t pitch = pitch_of(block_rows(n_));
    double* const sums = z + (1 + 2 * blocks_of(n_)) * pitch_of(n_) + 2 * (task - wanted(task) + 1) * pitch;
    return {sums, sums + pitch};
  }

  const SPDSolveKernels& kernels_;
  const double* const a_;
  const int64_t n_;
};

// Whether A x = b to rounding error, and whether all of b is finite, judged by the sum of the sides with signs that
// look like chance, so that the matrix is read once; or not at all, where there is a sketch: then by `sketch_rows` sums
// of the equations, with weights that look like chance (Freivalds 1979).
class Residual {
 public:
  static int64_t space(int64_t n) { return 2 * pitch_of(n) + Product::space(n); }

  Residual(const System& system, double* space)
      : product(system.kernels, system.matrix, system.n, space + 2 * pitch_of(system.n)),
        sketch_(system.sketch),
        n_(system.n),
        b_(space),
        b_size_(space + pitch_of(n_)) {
    finite = sum_up(system.rhs, system.m, 1, system.m, {0, n_}, b_, b_size_);
  }

  const Product product;
  bool finite;

  // Rows of the solution, x[i * row + r * side].
  void take(const double* x, int64_t row, int64_t side, int64_t sides, Range rows) {
    sum_up(x, row, side, sides, rows, product.w, product.v);
  }

  // By the sketch.
  bool seems_small() const {
    double rest[sketch_rows] = {}, size[sketch_rows] = {};
    for (int64_t i = 0; i < n_; ++i) {
      const double *weights = sketch_ + 2 * sketch_rows * i, *sums = weights + sketch_rows;
      for (int64_t row = 0; row < sketch_rows; ++row) {
        rest[row] += weights[row] * b_[i] - sums[row] * product.w[i];
        size[row] += std::abs(weights[row]) * b_size_[i] + std::abs(sums[row]) * product.v[i];
      }
    }
    bool small = true;
    for (int64_t row = 0; row < sketch_rows; ++row) small = small && std::abs(rest[row]) <= sums_solved * size[row];
    return small;
  }

  // Of a product that is added up.
  bool is_small() const {
    for (int64_t i = 0; i < n_; ++i) {
      if (!(std::abs(b_[i] - product.y[i]) <= solved * (product.z[i] + b_size_[i]))) return false;
    }
    return true;
  }

 private:
  static bool sum_up(const double* x, int64_t row, int64_t side, int64_t sides, Range rows, double* sums,
                     double* sizes) {
    double poison = 0;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      double sum = 0, size = 0;
      for (int64_t r = 0; r < sides; ++r) {
        const double sign = (static_cast<uint64_t>(r) * 0x9E3779B97F4A7C15u >> 40 & 1) ? -1.0 : 1.0;
        const double value = x[i * row + r * side];
        sum += sign * value;
        size += std::abs(value);
        poison += value - value;
      }
      sums[i] = sum, sizes[i] = size;
    }
    return poison == 0;
  }

  const double* const sketch_;
  const int64_t n_;
  double *const b_, *const b_size_;
};

int64_t solve_space(int64_t n, int width, int64_t at_once) {
  return side_space(n, width, at_once) + Residual::space(n);
}

// How far the threads of one solve are. Who waits looks at nothing else of the one that solves: its stack's cache lines
// would travel to and fro.
struct alignas(2 * cache_line) Progress {
  std::atomic<int64_t> solved{0}, taken{0};  // blocks, and tasks

  // Takes the next task when what it wants is solved, none before: it would keep it from the others. -1: no more.
  int64_t take(int64_t tasks) {
    int64_t waits = 0, task = taken;
    while (task < tasks) {
      if (Product::wanted(task) > solved.load(std::memory_order_acquire)) {
        ++waits % yield_after ? pause_thread() : std::this_thread::yield();
        task = taken;
      } else if (taken.compare_exchange_strong(task, task + 1)) {
        return task;
      }
    }
    return -1;
  }
};

// A few sides. Without a sketch others take what is solved from the residual, while this thread still solves.
template <class Workers>
void solve_few(Workers& team, const System& s, Residual& residual, double* x) {
  rows_of(s.rhs, s.n, s.m, x);
  forward_few(team, s.kernels, s.lower, s.n, s.m, x);
  if (s.sketch) {
    backward_few(team, s.kernels, s.lower, s.n, s.m, x, [](Range) {});
    residual.take(x, 1, s.n, s.m, {0, s.n});
    return columns_of(x, s.n, s.m, s.x);
  }
  Progress progress;
  team.each([&](int worker) {
    const Product product = residual.product;
    Progress& own = progress;
    if (worker == 0) {
      Solo solo;
      backward_few(solo, s.kernels, s.lower, s.n, s.m, x, [&](Range rows) {
        residual.take(x, 1, s.n, s.m, rows);
        progress.solved.fetch_add(1, std::memory_order_release);
      });
    }
    for (int64_t task = own.take(product.tasks()); task >= 0; task = own.take(product.tasks())) {
      product.run(task, Sizes::some);
    }
  });
  residual.product.add_up(Sizes::some);
  columns_of(x, s.n, s.m, s.x);
}

// residual = b - A x, all sides.
template <class Workers>
void residual_of(Workers& team, const System& s, const Product& product, double* residual) {
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t i = 0; i < s.n; ++i) product.w[i] = s.x[i * s.m + r];
    product.run_all(team, Sizes::none);
    for (int64_t i = 0; i < s.n; ++i) residual[i * s.m + r] = s.rhs[i * s.m + r] - product.y[i];
  }
}

// Solves one matrix's sides, unless they are many and solved, looks at the residual, and refines where it is not at
// rounding error. `space` has solve_space numbers.
template <class Workers>
Status solve_system(Workers& team, const System& s, double* space, bool& finite) {
  Residual residual(s, space + side_space(s.n, s.kernels.width, s.at_once));
  finite = finite && residual.finite;
  if (s.m < wide_from) {
    solve_few(team, s, residual, space);
  } else {
    residual.take(s.x, s.m, 1, s.m, {0, s.n});
    if (!s.sketch) residual.product.run_all(team, Sizes::some);
  }
  if (!residual.finite || (s.sketch ? residual.seems_small() : residual.is_small())) {
    return Status::ok;  // mostly; `some` is stricter than `all`
  }
  residual.product.run_all(team, Sizes::all);
  if (residual.is_small()) return Status::ok;
  Aligned<double> change(s.n * s.m);
  if (!change.data()) return Status::out_of_memory;
  residual_of(team, s, residual.product, change.data());
  for (int64_t panel = 0; panel < s.panels; panel += s.at_once) {
    const Range range{panel, std::min(panel + s.at_once, s.panels)};
    solve_sides(team, s, range, change.data(), change.data(), space);
  }
  for (int64_t i = 0; i < s.n * s.m; ++i) s.x[i] += change.data()[i];
  return Status::ok;
}

}  // namespace

Status sketch(const double* matrices, int64_t batch, int64_t n, double* sketches, int threads, Isa isa) {
  if (batch < 0 || n < 1 || (batch > 0 && (!matrices || !sketches)) || isa > detect_isa()) return Status::bad_argument;
  const SPDSolveKernels& kernels = spd_solve_kernels_for(isa);
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + static_cast<double>(batch) * n * n / 1e5));
  const bool share = n >= shared_from && batch < threads;  // one matrix by all threads, else one thread each
  const int64_t product_space = Product::space(n), spare = sketch_rows * product_space;
  thread_local Workspace kept;
  double* const spaces = reinterpret_cast<double*>(kept.get((share ? 1 : threads) * spare * 8));
  if (!spaces) return Status::out_of_memory;
  const auto sketch_one = [&](auto& workers, int64_t b, double* space) {
    const double* const matrix = matrices + b * n * n;
    double* const found = sketches + 2 * b * sketch_rows * n;
    const auto product = [&](int64_t row) { return Product(kernels, matrix, n, space + row * product_space); };
    for (int64_t i = 0; i < n; ++i) {
      const double scale = 1.0 / std::sqrt(matrix[i * (n + 1)]);
      for (int64_t row = 0; row < sketch_rows; ++row) {
        const double weight = scale * chance(i * sketch_rows + row);
        product(row).w[i] = found[2 * i * sketch_rows + row] = weight;
      }
    }
    workers.each([&](int) {  // a block stays near for all products
      for (int64_t task = workers.next(); task < product(0).tasks(); task = workers.next()) {
        for (int64_t row = 0; row < sketch_rows; ++row) product(row).run(task, Sizes::none);
      }
    });
    for (int64_t row = 0; row < sketch_rows; ++row) {
      const Product done = product(row);
      done.add_up(Sizes::none);
      for (int64_t i = 0; i < n; ++i) found[(2 * i + 1) * sketch_rows + row] = done.y[i];
    }
  };
  Team::run(share ? threads : static_cast<int>(std::min<int64_t>(threads, batch)), [&](Team& team) {
    for (int64_t b = 0; share && b < batch; ++b) sketch_one(team, b, spaces);
    if (share) return;
    team.each([&](int worker) {
      Solo solo;
      for (int64_t b = team.next(); b < batch; b = team.next()) sketch_one(solo, b, spaces + worker * spare);
    });
  });
  kept.trim(most_kept);
  return Status::ok;
}

namespace {

// Many sides in so many panels, of which so many are solved together; blocked: by all threads.
struct Parts {
  int64_t panels, at_once;
  bool blocked;
};

// Changes no bit. A matrix's threads read the factor together where panels would not be as many for each of them, and
// where it is too large for a core's cache; else each solves its own panels.
Parts parts_of(int64_t n, int64_t m, int width, int threads, bool share) {
  if (m < wide_from) return {1, 1, false};
  const int64_t vectors = (m + width - 1) / width, panels = (vectors + wide_vectors - 1) / wide_vectors;
  if (threads == 1) return {panels, 1, false};
  const bool uneven = panels == 1 && vectors % threads;
  if (share && n >= substitution_shared_from && (uneven || n >= panels_shared_from)) {
    return {panels, std::min(panels, std::max<int64_t>(1, most_sides / (wide_vectors * width))), true};
  }
  return {std::min(vectors, (panels + threads - 1) / threads * threads), 1, false};
}

}  // namespace

Status cholesky_solve(const double* matrices, const double* lower, const double* sketches, int64_t batch, int64_t n,
                      const double* rhs, int64_t m, double* x, bool& finite, int threads, Isa isa) {
  if (batch < 0 || n < 1 || m < 0 || (batch * m > 0 && (!matrices || !lower || !rhs || !x)) || isa > detect_isa()) {
    return Status::bad_argument;
  }
  finite = true;
  if (batch * m == 0) return Status::ok;
  const SPDSolveKernels& kernels = spd_solve_kernels_for(isa);
  const double work = static_cast<double>(batch) * m * n * n;
  const int64_t from = sketches && m < wide_from ? substitution_shared_from : shared_from;
  if (from == substitution_shared_from && n >= alone_from && batch < threads && Team::crowded()) threads = 1;
  const bool share = n >= from && batch < threads;  // one matrix by all threads, else one thread each
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + work / (share ? 1e5 : 1e6)));
  const auto [panels, at_once, blocked] = parts_of(n, m, kernels.width, threads, share);
  const int64_t spare = solve_space(n, kernels.width, at_once);
  thread_local Workspace kept;
  double* const spaces = reinterpret_cast<double*>(kept.get(threads * spare * static_cast<int64_t>(sizeof(double))));
  if (!spaces) return Status::out_of_memory;
  const auto system = [&](int64_t b) {
    const double* const own = sketches ? sketches + 2 * b * sketch_rows * n : nullptr;
    return System{kernels, matrices + b * n * n, lower + b * n * n, own, n, m, panels,
                  at_once, rhs + b * n * m,      x + b * n * m};
  };
  const auto solve_panel = [&](const System& s, int64_t panel, int worker) {
    Solo solo;
    solve_sides(solo, s, {panel, panel + 1}, s.rhs, s.x, spaces + worker * spare);
  };
  Status status = Status::ok;
  if (share) {
    Team::run(threads, [&](Team& team) {
      for (int64_t b = 0; b < batch && status == Status::ok; ++b) {
        const System s = system(b);
        for (int64_t panel = 0; blocked && panel < panels; panel += at_once) {
          solve_sides(team, s, {panel, std::min(panel + at_once, panels)}, s.rhs, s.x, spaces);
        }
        if (m >= wide_from && !blocked) {
          team.each([&](int worker) {
            for (int64_t panel = team.next(); panel < panels; panel = team.next()) solve_panel(s, panel, worker);
          });
        }
        status = solve_system(team, s, spaces, finite);
      }
    });
  } else {
    std::atomic<bool> poisoned{false}, out_of_memory{false};
    Team::run(static_cast<int>(std::min<int64_t>(threads, batch * panels)), [&](Team& team) {
      if (m >= wide_from) {
        team.each([&](int worker) {
          for (int64_t task = team.next(); task < batch * panels; task = team.next()) {
            solve_panel(system(task / panels), task % panels, worker);
          }
        });
      }
      team.each([&](int worker) {
        Solo solo;
        for (int64_t b = team.next(); b < batch; b = team.next()) {
          bool whole = true;
          if (solve_system(solo, system(b), spaces + worker * spare, whole) != Status::ok) out_of_memory = true;
          if (!whole) poisoned = true;
        }
      });
    });
    finite = !poisoned;
    if (out_of_memory) status = Status::out_of_memory;
  }
  kept.trim(most_kept);
  return status;
}

Status spd_solve(const double* matrices, int64_t batch, int64_t n, const SPDLimits& limits, const double* rhs,
                 int64_t m, double* x, bool& good, int threads, Isa isa) {
  good = false;
  if (batch < 0 || n < 1 || m < 0) return Status::bad_argument;
  thread_local std::vector<double> found;
  thread_local std::vector<int64_t> info;
  found.resize(3 * batch);
  info.resize(batch);
  Status status = examine(matrices, batch, n, found.data(), threads);
  if (status != Status::ok) return status;
  for (int64_t b = 0; b < batch; ++b) {
    const double mean = found[3 * b], largest = found[3 * b + 1], difference = found[3 * b + 2];
    if (!(difference <= limits.asymmetry * largest && mean >= limits.smallest_mean)) return Status::ok;
  }
  thread_local Workspace kept;
  double* const lower = reinterpret_cast<double*>(kept.get(batch * n * n * static_cast<int64_t>(sizeof(double))));
  if (!lower) return Status::out_of_memory;
  status = cholesky(matrices, lower, batch, n, limits.least, info.data(), threads, isa);
  if (status == Status::ok && std::all_of(info.begin(), info.end(), [](int64_t bad) { return bad == 0; })) {
    status = cholesky_solve(matrices, lower, nullptr, batch, n, rhs, m, x, good, threads, isa);
  }
  kept.trim(most_kept);
  return status;
}

}  // namespace rewrite_core
