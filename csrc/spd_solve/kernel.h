// The kernel of spd_solve: a team of blocks takes one matrix and some of its right-hand sides, from memory to memory.
#pragma once

#include "solve.h"

namespace rewrite_core {
namespace spd {

constexpr int threads = 256;    // of a block
constexpr int largest_n = 512;  // beyond, torch.linalg does it until this was measured

// How the right-hand sides of one matrix are shared out: `splits` teams, each of which factors and then solves for
// task.passes groups of 8.
struct Launching {
  int64_t splits, teams;

  SPD_BOTH explicit Launching(const SPDSolveTask& task) {
    const int64_t groups = (task.sides + sides - 1) / sides;
    splits = groups > task.passes ? (groups + task.passes - 1) / task.passes : 1;
    teams = task.batch * splits;
  }
};

// Factors with ever larger shifts until every pivot is good. Returns the verdict; `shift` is the one that was added.
template <bool many>
GPU_FUNCTION SPDVerdict factor_shifted(const Space& space, const SPDSolveTask& task, const double* matrix, double mean,
                                       double& shift, int& pivot) {
  shift = 0;
  for (;;) {
    load_rows(space, matrix, shift, mean);
    load_limits(space, matrix, task.least, shift, mean);
    const int bad = factor_rows<many>(space);
    if (shift == 0) pivot = bad;
    if (!bad || task.first_shift == 0) return bad ? SPDVerdict::indefinite : SPDVerdict::sound;
    shift = shift == 0 ? task.first_shift : 10 * shift;
    if (shift > task.largest_shift) return SPDVerdict::indefinite;
    if (many) gpu::sync_team<before_reload>();  // others may still copy this block's rows
  }
}

// many   whether a team is a cluster, or one block
template <bool many>
GPU_KERNEL(threads)
spd_solve_kernel(SPDSolveTask task) {
  const int n = static_cast<int>(task.n);
  const Space space(Layout(n, many ? gpu::blocks() : 1));
  const int64_t splits = Launching(task).splits;
  const int64_t which = gpu::team() / splits, split = gpu::team() % splits, size = task.n * task.n;
  const double* const matrix = task.matrix + which * size;

  SPDVerdict verdict = SPDVerdict::sound;
  Facts facts{};
  double shift = 0;
  int pivot = 0;
  if (task.factor) {
    load_rows(space, task.factor + which * size, 0, 0);
    load_inverse(space, task.factor + which * size);
  } else {
    const double* const given = task.given + which * size;
    facts = examine_diagonal(space, given);
    facts.difference = largest_in_team<many>(space, examine_symmetry(space, given), 1);
    const bool fit = facts.difference <= task.asymmetry * facts.largest && facts.mean >= task.smallest_mean;
    verdict = fit ? factor_shifted<many>(space, task, matrix, facts.mean, shift, pivot) : SPDVerdict::unfit;
    if (split == 0 && gpu::rank() == 0 && gpu::thread() == 0) {
      double* const out = task.facts + which * spd_facts;
      out[0] = facts.mean, out[1] = facts.largest, out[2] = facts.difference, out[3] = pivot;
      out[4] = shift, out[5] = static_cast<double>(verdict);
    }
  }
  gpu::sync_block<factor_there>();
  if (task.lower && split == 0) store_rows(space, task.lower + which * size);

  const int64_t start = which * task.n * task.sides;
  const System system{matrix, shift, facts.mean, task.rhs + start, task.x + start};
  for (int64_t pass = 0; pass < task.passes; ++pass) {
    const Sides sides_now{task.sides, (split * task.passes + pass) * sides};
    if (!sides_now.has(0)) break;
    if (verdict == SPDVerdict::sound) {
      solve_sides<many>(space, system, sides_now);
    } else {
      store_nan(space, system, sides_now);
    }
  }
  if (many) gpu::sync_team<before_end>();  // the others may still read this block's memory
}

}  // namespace spd
}  // namespace rewrite_core
