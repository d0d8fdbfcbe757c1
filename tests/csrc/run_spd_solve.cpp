// Runs the GPU kernel of spd_solve on the CPU (csrc/gpu_fibers.h). tests/test_spd_solve_cuda.py builds it, writes calls
// to a file and reads what comes out from another; all arrays are heap blocks of exactly their size, outputs NaN at the
// start.
//
//   run_spd_solve IN OUT       IN: calls, each a Call and its arrays
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "spd_solve/kernel.h"

using namespace rewrite_core;

namespace {

struct Call {
  int64_t n, batch, sides, blocks, threads, passes, seed, removed;
  int64_t has_given, has_factor, wants_lower;
  double asymmetry, smallest_mean, least, first_shift, largest_shift;
};

std::vector<double> read(std::FILE* file, int64_t count) {
  std::vector<double> values(static_cast<size_t>(count));
  if (count > 0 && std::fread(values.data(), 8, values.size(), file) != values.size()) std::exit(2);
  return values;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 2;
  std::FILE* const in = std::fopen(words[1], "rb");
  std::FILE* const out = std::fopen(words[2], "wb");
  if (!in || !out) return 2;
  Call call;
  while (std::fread(&call, sizeof(call), 1, in) == 1) {
    const int64_t size = call.batch * call.n * call.n, right = call.batch * call.n * call.sides;
    const std::vector<double> matrix = read(in, size);
    const std::vector<double> given = call.has_given ? read(in, size) : matrix;
    const std::vector<double> factor = read(in, call.has_factor ? size : 0);
    const std::vector<double> rhs = read(in, right);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::vector<double> lower(call.wants_lower ? size : 0, nan), x(right, nan), facts(spd_facts * call.batch, nan);
    SPDSolveTask task{};
    task.matrix = matrix.data(), task.given = given.data(), task.rhs = rhs.data(), task.x = x.data();
    task.factor = call.has_factor ? factor.data() : nullptr;
    task.lower = call.wants_lower ? lower.data() : nullptr;
    task.facts = facts.data();
    task.batch = call.batch, task.n = call.n, task.sides = call.sides, task.passes = call.passes;
    task.asymmetry = call.asymmetry, task.smallest_mean = call.smallest_mean, task.least = call.least;
    task.first_shift = call.first_shift, task.largest_shift = call.largest_shift;
    gpu::Launch launch;
    launch.teams = static_cast<int>(spd::Launching(task).teams);
    launch.blocks = static_cast<int>(call.blocks), launch.threads = static_cast<int>(call.threads);
    launch.shared_bytes = spd::Parts(spd::Layout(static_cast<int>(call.n), launch.blocks), launch.threads / 32).bytes();
    launch.seed = static_cast<unsigned>(call.seed), launch.removed = static_cast<int>(call.removed);
    const std::string wrong = gpu::run(launch, [task, many = call.blocks > 1] {
      if (many) {
        spd::spd_solve_kernel<true>(task);
      } else {
        spd::spd_solve_kernel<false>(task);
      }
    });
    if (!wrong.empty()) {
      std::fprintf(stderr, "%s\n", wrong.c_str());
      return 3;
    }
    for (const std::vector<double>* part : {&x, &facts, &lower}) {
      if (!part->empty()) std::fwrite(part->data(), 8, part->size(), out);
    }
  }
  std::fclose(in);
  return std::fclose(out) ? 2 : 0;
}
