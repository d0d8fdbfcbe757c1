#include "fit_projected.h"

#include <algorithm>

namespace rewrite_core {
namespace {

using namespace fit_projected_constants;

FitProjectedScratch take_scratch(Arena<float>& arena, const FitProjectedProblem& problem, int64_t lanes) {
  FitProjectedScratch scratch{};
  const auto take = [&](int64_t vectors) { return arena.take(vectors * lanes); };
  for (float** buffer : {&scratch.base, &scratch.target, &scratch.shift, &scratch.lin, &scratch.slopes}) {
    *buffer = take(problem.pixels);
  }
  const int64_t weights = problem.inputs * problem.taps;
  for (float** buffer : {&scratch.change, &scratch.mean, &scratch.power}) *buffer = take(weights);
  if (problem.weight) scratch.weight = take(weights);
  const int64_t sums = problem.tile ? problem.products * problem.slots : problem.slots;
  for (float** buffer : {&scratch.sums, &scratch.turned}) *buffer = take(sums);
  scratch.group = take(GROUP * problem.products);
  for (float** buffer : {&scratch.coefficients, &scratch.leaning, &scratch.gradient}) {
    *buffer = take(problem.rank * problem.taps);
  }
  return scratch;
}

}  // namespace

int64_t projected_lanes(Isa isa) { return fit_projected_kernels_for(isa).lanes; }

Status fit_projected(const FitProjectedProblem& problem, int64_t first, int64_t count, int threads, Isa isa) {
  const int64_t tile = problem.tile;
  if (isa > detect_isa() || problem.inputs < 1 || problem.inputs % GROUP || problem.taps < 1 ||
      problem.taps > MOST_TAPS || problem.pixels < 1 || problem.channels < 0 || problem.rank < 0 || problem.steps < 1 ||
      problem.project_every < 1 || (tile && (problem.taps != 9 || (tile != 2 && tile != 4 && tile != 5))) ||
      problem.height * problem.width != problem.pixels || first < 0 || count < 0) {
    return Status::bad_argument;
  }
  const FitProjectedKernels& kernels = fit_projected_kernels_for(isa);
  if ((first + count) * kernels.lanes >= problem.channels + kernels.lanes) return Status::bad_argument;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), count));
  if (threads == 0) return Status::ok;
  Arena<float> counter(nullptr);
  take_scratch(counter, problem, kernels.lanes);
  Aligned<float> memory(threads * counter.used());
  if (!memory.data()) return Status::out_of_memory;
  Team::run(threads, [&](Team& team) {
    team.each([&](int worker) {
      Arena<float> arena(memory.data() + worker * counter.used());
      const FitProjectedScratch scratch = take_scratch(arena, problem, kernels.lanes);
      for (int64_t task = team.next(); task < count; task = team.next()) {
        kernels.descend(problem, first + task, scratch);
      }
    });
  });
  return Status::ok;
}

}  // namespace rewrite_core
