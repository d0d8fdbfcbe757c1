#include "fit_projected.h"

#include <algorithm>

namespace rewrite_core {
namespace {

const ProjectedKernel& kernel_for(Isa isa) {
  return isa == Isa::avx512 ? avx512::projected_kernel
         : isa == Isa::avx2 ? avx2::projected_kernel
                            : portable::projected_kernel;
}

// Hands out pieces of one block of memory; with no block it only counts.
struct Arena {
  float* data;
  int64_t lanes, used = 0;
  float* take(int64_t vectors) {
    float* piece = data ? data + used : nullptr;
    used += vectors * lanes;
    return piece;
  }
};

ProjectedScratch take_scratch(Arena& arena, const ProjectedProblem& problem) {
  ProjectedScratch scratch{};
  for (float** buffer : {&scratch.base, &scratch.target, &scratch.shift, &scratch.lin, &scratch.slopes}) {
    *buffer = arena.take(problem.pixels);
  }
  const int64_t weights = problem.inputs * problem.taps;
  for (float** buffer : {&scratch.change, &scratch.mean, &scratch.power}) *buffer = arena.take(weights);
  if (problem.weight) scratch.weight = arena.take(weights);
  const int64_t sums = problem.tile ? problem.products * problem.slots : problem.slots;
  for (float** buffer : {&scratch.sums, &scratch.turned}) *buffer = arena.take(sums);
  scratch.group = arena.take(projected_group * problem.products);
  for (float** buffer : {&scratch.coefficients, &scratch.leaning, &scratch.gradient}) {
    *buffer = arena.take(problem.rank * problem.taps);
  }
  return scratch;
}

}  // namespace

int64_t projected_lanes(Isa isa) { return kernel_for(isa).lanes; }

Status fit_projected(const ProjectedProblem& problem, int64_t first, int64_t count, int threads, Isa isa) {
  const int64_t tile = problem.tile;
  if (isa > detect_isa() || problem.inputs < 1 || problem.inputs % projected_group || problem.taps < 1 ||
      problem.taps > projected_taps || problem.pixels < 1 || problem.channels < 0 || problem.rank < 0 ||
      problem.steps < 1 || problem.project_every < 1 ||
      (tile && (problem.taps != 9 || (tile != 2 && tile != 4 && tile != 5))) ||
      problem.height * problem.width != problem.pixels || first < 0 || count < 0) {
    return Status::bad_argument;
  }
  const ProjectedKernel& kernel = kernel_for(isa);
  if ((first + count) * kernel.lanes >= problem.channels + kernel.lanes) return Status::bad_argument;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), count));
  if (threads == 0) return Status::ok;
  Arena counter{nullptr, kernel.lanes};
  take_scratch(counter, problem);
  Aligned<float> memory(threads * counter.used);
  if (!memory.data()) return Status::out_of_memory;
  Team::run(threads, [&](Team& team) {
    Arena arena{memory.data() + team.join() * counter.used, kernel.lanes};
    const ProjectedScratch scratch = take_scratch(arena, problem);
    for (int64_t task = team.next(); task < count; task = team.next()) {
      kernel.descend(problem, first + task, scratch);
    }
  });
  return Status::ok;
}

}  // namespace rewrite_core
