#include "fit_low_rank.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace rewrite_core {
namespace {

int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

using namespace fit_low_rank_constants;

constexpr int64_t most_kept = 1 << 23;  // bytes of work space that a thread keeps for its next call

// Styles begin at whole vectors of floats.
int64_t style_start(int64_t used) { return round_up(used, 2 * fit_padding); }

FitLowRankEdit edit_sizes(const FitLowRankProblem& problem, int64_t number, int64_t kept) {
  FitLowRankEdit edit{};
  edit.number = number;
  edit.pixels = kept;
  edit.rows = round_up(problem.unknowns, fit_rows);
  // the right-hand side of a linear system takes a column
  edit.leading = round_up(std::max(edit.rows, problem.unknowns + 1), fit_padding);
  edit.exact = !problem.absolute && problem.slope == 1.0 && !problem.constant;
  edit.dual_form = !edit.exact && !problem.penalty && kept < problem.unknowns;
  edit.stride = round_up(kept + (edit.dual_form || kept == 0), fit_padding);
  edit.single_stride = round_up(edit.stride, 2 * fit_padding);
  edit.order = edit.dual_form ? kept : problem.unknowns;
  edit.order_leading = edit.dual_form ? edit.stride : edit.leading;
  return edit;
}

void take_edit(Arena<double>& arena, const FitLowRankProblem& problem, FitLowRankEdit& edit) {
  const int64_t square = problem.unknowns * edit.leading;
  edit.kept = reinterpret_cast<int64_t*>(arena.take(edit.stride));
  edit.starts = reinterpret_cast<int64_t*>(arena.take(problem.styles + 1));
  edit.basis = arena.take(edit.rows * edit.stride);
  // Float input determines no more of the matrix than float products keep, and an error in the matrix bends the path
  // and not the goal, which the gradient sets, in double.
  const bool single = !problem.is_double && !edit.exact && !edit.dual_form;
  edit.single = single ? reinterpret_cast<float*>(arena.take(edit.rows * edit.single_stride / 2)) : nullptr;
  edit.sloped = edit.exact ? arena.take(edit.rows * edit.stride) : nullptr;
  edit.weights = arena.take(edit.stride);
  edit.size = arena.take(edit.leading);
  edit.inverse = edit.exact ? arena.take(edit.leading) : nullptr;
  edit.quadratic = problem.quadratic ? arena.take(problem.styles * square) : nullptr;
  edit.penalty = problem.penalty ? arena.take(square) : nullptr;
  // the Gram kernel writes whole register blocks
  edit.gram = edit.dual_form ? arena.take(edit.order * edit.order_leading)
              : edit.exact   ? arena.take(edit.rows * edit.leading)
                             : nullptr;
  edit.factor = edit.exact ? arena.take(square) : nullptr;
}

FitLowRankScratch take_scratch(Arena<double>& arena, const FitLowRankEdit& largest, int64_t styles) {
  FitLowRankScratch scratch{};
  double** const pixels[] = {&scratch.base,      &scratch.target,  &scratch.shift, &scratch.lin,  &scratch.new_lin,
                             &scratch.r,         &scratch.inverse, &scratch.steep, &scratch.dual, &scratch.slopes,
                             &scratch.curvature, &scratch.root,    &scratch.spare};
  double** const unknowns[] = {&scratch.x, &scratch.new_x, &scratch.best_x, &scratch.gradient, &scratch.step};
  static_assert(sizeof(pixels) / sizeof(*pixels) == fit_pixel_buffers);
  static_assert(sizeof(unknowns) / sizeof(*unknowns) == fit_unknown_buffers);
  for (double** buffer : pixels) *buffer = arena.take(largest.stride);
  for (double** buffer : unknowns) *buffer = arena.take(largest.leading);
  for (double** buffer : {&scratch.m, &scratch.new_m}) *buffer = arena.take(styles);
  for (double** buffer : {&scratch.dm, &scratch.new_dm, &scratch.half}) *buffer = arena.take(styles * largest.leading);
  scratch.turned = arena.take(styles * largest.stride);
  const int64_t square = largest.rows * largest.leading;  // whatever the form: edits differ in pixels
  scratch.matrix = arena.take(square);
  scratch.factor = arena.take(square);
  scratch.weighted = arena.take(largest.rows * fit_panel);
  if (largest.exact) {
    scratch.many_wanted = arena.take(largest.stride * fit_together);
    for (double** buffer : {&scratch.many_right, &scratch.many_x, &scratch.many_rest, &scratch.many_turned}) {
      *buffer = arena.take(largest.rows * fit_together);
    }
  }
  return scratch;
}

// An edit with its arrays, of which kept, starts and weights are filled in.
FitLowRankEdit choose_pixels(Arena<double>& arena, const FitLowRankProblem& problem, int64_t number) {
  const double* weights = problem.pixel_weights ? problem.pixel_weights + number * problem.pixels : nullptr;
  const int64_t* segments = problem.segments ? problem.segments + number * problem.pixels : nullptr;
  const auto kept = [&](int64_t style, int64_t p) {
    return (!weights || weights[p] > 0) && (!segments || segments[p] == style);
  };
  int64_t used = 0;
  for (int64_t style = 0; style < problem.styles; ++style) {
    used = style_start(used);
    for (int64_t p = 0; p < problem.pixels; ++p) used += kept(style, p);
  }
  FitLowRankEdit edit = edit_sizes(problem, number, used);
  take_edit(arena, problem, edit);
  std::fill(edit.kept, edit.kept + edit.stride, -1);
  double sum = 0;
  int64_t place = 0;
  for (int64_t style = 0; style < problem.styles; ++style) {
    edit.starts[style] = place = style_start(place);
    for (int64_t p = 0; p < problem.pixels; ++p) {
      if (!kept(style, p)) continue;
      edit.kept[place++] = p;
      sum += weights ? weights[p] : 1.0;
    }
  }
  edit.starts[problem.styles] = edit.stride;
  edit.all = problem.styles == 1 && used == problem.pixels;
  for (int64_t p = 0; p < edit.stride; ++p) {
    edit.weights[p] = edit.kept[p] < 0 ? 0.0 : (weights ? weights[edit.kept[p]] : 1.0) / sum;
  }
  return edit;
}

// Neighbours with the same penalty scale share a factor, and a call.
void fit_all_exactly(const FitLowRankKernels& kernels, const FitLowRankProblem& problem, const FitLowRankEdit& edit,
                     int64_t first, int64_t end, const FitLowRankScratch& scratch) {
  const double* scale = problem.penalty ? problem.penalty_scale + edit.number * problem.channels : nullptr;
  for (int64_t last = first; first < end; first = last) {
    do ++last;
    while (last < end && (!scale || scale[last] == scale[first]));
    kernels.fit_exact(problem, edit, first, last - first, scratch);
  }
}

}  // namespace

Status fit_low_rank(FitLowRankProblem problem, bool& finite, int threads, Isa isa) {
  finite = true;
  if (problem.edits < 0 || problem.channels < 0 || problem.unknowns < 1 || problem.pixels < 1 || problem.styles < 1 ||
      problem.max_iterations < 1 || isa > detect_isa()) {
    return Status::bad_argument;
  }
  if (problem.edits == 0 || problem.channels == 0) return Status::ok;
  const FitLowRankKernels& kernels = fit_low_rank_kernels_for(isa);
  const bool convex = problem.slope == 1.0 && !problem.constant;
  problem.slow_rate = convex ? SMOOTHING_RATE : std::pow(SMOOTHING_SLOW, 1.0 / (SLOW_SHARE * problem.max_iterations));
  problem.slow_rate_well = convex ? SMOOTHING_RATE : problem.slow_rate * problem.slow_rate;
  problem.fast_rate_well = convex ? SMOOTHING_RATE : SMOOTHING_FAST;

  // Edits in groups, so that their prepared arrays stay small; a thread takes channels of any of a group.
  const FitLowRankEdit largest = edit_sizes(problem, 0, problem.pixels + (problem.styles - 1) * style_start(1));
  Arena<double> edit_count(nullptr), scratch_count(nullptr);
  FitLowRankEdit counted = largest;
  take_edit(edit_count, problem, counted);
  // an edit in dual form has fewer pixels than unknowns, so its Gram matrix is no larger than this
  const int64_t edit_doubles = edit_count.used() + largest.rows * (largest.leading + largest.single_stride);
  take_scratch(scratch_count, largest, problem.styles);
  const int64_t scratch_doubles = scratch_count.used();

  // A thread costs some microseconds to wake: give each at least a million multiply-adds.
  const double work = 10.0 * problem.edits * problem.channels * problem.unknowns * problem.pixels;
  threads = static_cast<int>(std::min<double>(std::max(threads, 1), 1 + work / 1e6));
  const int64_t chunk = largest.exact ? fit_together : 4;  // channels per task
  const int64_t chunks = (problem.channels + chunk - 1) / chunk;
  // Where a task has all channels of an edit it prepares the edit, too, in memory that its thread's next one takes.
  const bool whole = chunks == 1;
  const int64_t most = std::max<int64_t>(1, (int64_t{1} << 24) / edit_doubles);
  const int64_t group = whole ? threads : std::min(problem.edits, most);

  thread_local Workspace kept;
  const int64_t doubles = group * edit_doubles + threads * scratch_doubles;
  double* const edit_memory = reinterpret_cast<double*>(kept.get(doubles * static_cast<int64_t>(sizeof(double))));
  double* const scratch_memory = edit_memory + group * edit_doubles;
  Aligned<FitLowRankEdit> edits(group);
  if (!edit_memory || !edits.data()) return Status::out_of_memory;

  std::atomic<bool> finite_bases{true};
  Team::run(threads, [&](Team& team) {
    const auto scratch_of = [&](int worker) {
      Arena<double> mine(scratch_memory + worker * scratch_doubles);
      return take_scratch(mine, largest, problem.styles);
    };
    const auto prepare = [&](int64_t number, int64_t place, const FitLowRankScratch& scratch) {
      Arena<double> arena(edit_memory + place * edit_doubles);
      FitLowRankEdit edit = choose_pixels(arena, problem, number);
      kernels.prepare(problem, edit, scratch);
      if (!edit.finite) finite_bases = false;
      return edit;
    };
    const auto fit = [&](const FitLowRankEdit& edit, int64_t channel, const FitLowRankScratch& scratch) {
      const int64_t end = std::min(problem.channels, channel + chunk);
      if (edit.exact) fit_all_exactly(kernels, problem, edit, channel, end, scratch);
      for (int64_t o = channel; !edit.exact && o < end; ++o) kernels.fit(problem, edit, o, scratch);
    };
    if (whole) {
      team.each([&](int worker) {
        const FitLowRankScratch scratch = scratch_of(worker);
        for (int64_t task = team.next(); task < problem.edits; task = team.next()) {
          fit(prepare(task, worker, scratch), 0, scratch);
        }
      });
    }
    for (int64_t first = 0; first < problem.edits && !whole; first += group) {
      const int64_t count = std::min(group, problem.edits - first);
      team.each([&](int worker) {
        const FitLowRankScratch scratch = scratch_of(worker);
        for (int64_t task = team.next(); task < count; task = team.next()) {
          edits.data()[task] = prepare(first + task, task, scratch);
        }
      });
      team.each([&](int worker) {
        const FitLowRankScratch scratch = scratch_of(worker);
        for (int64_t task = team.next(); task < count * chunks; task = team.next()) {
          fit(edits.data()[task / chunks], task % chunks * chunk, scratch);
        }
      });
    }
  });
  finite = finite_bases;
  kept.trim(most_kept);
  for (int64_t i = 0; i < problem.edits * problem.channels; ++i) {
    finite = finite && std::isfinite(problem.initial_loss[i]);
  }
  return Status::ok;
}

}  // namespace rewrite_core
