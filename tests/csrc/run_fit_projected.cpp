// Runs the GPU kernel of fit_projected on the CPU (csrc/gpu_fibers.h). tests/helpers/fit_projected_kernel.py builds it,
// writes calls to a file and reads what comes out from another; all arrays are heap blocks of exactly their size,
// outputs NaN at the start.
//
//   run_fit_projected IN OUT       IN: calls, each a Call and its arrays
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "fit_projected_cuda/kernel.h"

using namespace rewrite_core;

namespace {

struct Call {
  int64_t channels, inputs, taps, pixels, ranks, steps, project_every, absolute;
  int64_t has_shift, has_weight, has_basis;
  int64_t form, blocks, seed, removed;
  double eps, slope, gain;
};

std::vector<float> read(std::FILE* file, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  if (count > 0 && std::fread(values.data(), 4, values.size(), file) != values.size()) std::exit(2);
  return values;
}

const float* or_null(const std::vector<float>& values, int64_t there) { return there ? values.data() : nullptr; }

template <class Form>
std::string launch(const Call& call, const FitProjectedTask& task) {
  const int blocks = static_cast<int>(call.blocks);
  gpu::Launch launch;
  launch.teams = static_cast<int>((call.channels + Form::channels - 1) / Form::channels);
  launch.blocks = blocks, launch.threads = Form::threads;
  launch.shared_bytes = projected::Parts<Form>(projected::Layout<Form>(call.pixels, call.taps, blocks)).bytes();
  launch.seed = static_cast<unsigned>(call.seed), launch.removed = static_cast<int>(call.removed);
  return gpu::run(launch, [task, blocks] {
    const bool leans = task.basis != nullptr;
    if (blocks > 1) {
      leans ? projected::fit_projected_kernel<Form, true, true>(task)
            : projected::fit_projected_kernel<Form, true, false>(task);
    } else {
      leans ? projected::fit_projected_kernel<Form, false, true>(task)
            : projected::fit_projected_kernel<Form, false, false>(task);
    }
  });
}

// Shrunken forms, and one that a GPU runs.
template <class Visit>
void with_form(int64_t form, Visit visit) {
  if (form == 0) return visit(projected::Form<1, 1, 2>{});
  if (form == 1) return visit(projected::Form<3, 1, 4>{});
  return visit(projected::Form<3, 2, 8>{});
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 2;
  std::FILE* const in = std::fopen(words[1], "rb");
  std::FILE* const out = std::fopen(words[2], "wb");
  if (!in || !out) return 2;
  Call call;
  while (std::fread(&call, sizeof(call), 1, in) == 1) {
    const int64_t weights = call.inputs * call.taps, maps = call.channels * call.pixels;
    const std::vector<float> operator_ = read(in, weights * call.pixels);
    const std::vector<float> base = read(in, maps), target = read(in, maps), value = read(in, maps);
    const std::vector<float> shift = read(in, call.has_shift * maps);
    const std::vector<float> weight = read(in, call.has_weight * call.channels * weights);
    const std::vector<float> square = read(in, call.has_weight * call.inputs);
    const std::vector<float> directions = read(in, call.ranks * call.inputs);
    const std::vector<float> basis = read(in, call.has_basis * call.ranks * call.taps * call.pixels);
    const std::vector<float> rates = read(in, 2 * call.steps);
    int channels_of_team = 0;
    with_form(call.form, [&](auto form) { channels_of_team = form.channels; });
    const int64_t parts = (call.channels + channels_of_team - 1) / channels_of_team * call.blocks;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> goal(maps, nan), leaning(call.has_basis * call.channels * call.ranks * call.taps, nan);
    std::vector<float> coefficients(call.channels * (call.ranks ? call.ranks : call.inputs) * call.taps, nan);
    std::vector<double> losses(parts * call.steps, nan);
    FitProjectedTask task{};
    task.maps = operator_.data(), task.base = base.data(), task.target = target.data(), task.value = value.data();
    task.shift = or_null(shift, call.has_shift), task.weight = or_null(weight, call.has_weight);
    task.square = or_null(square, call.has_weight), task.basis = or_null(basis, call.has_basis);
    task.directions = directions.data(), task.rates = rates.data();
    task.goal = goal.data(), task.leaning = leaning.data(), task.coefficients = coefficients.data();
    task.losses = losses.data();
    task.channels = call.channels, task.inputs = call.inputs, task.taps = call.taps, task.pixels = call.pixels;
    task.ranks = call.ranks, task.steps = call.steps, task.project_every = call.project_every;
    task.absolute = call.absolute;
    task.eps = static_cast<float>(call.eps), task.slope = static_cast<float>(call.slope);
    task.gain = static_cast<float>(call.gain);
    std::string wrong;
    with_form(call.form, [&](auto form) { wrong = launch<decltype(form)>(call, task); });
    if (!wrong.empty()) {
      std::fprintf(stderr, "%s\n", wrong.c_str());
      return 3;
    }
    std::fwrite(coefficients.data(), 4, coefficients.size(), out);
    std::fwrite(losses.data(), 8, losses.size(), out);
  }
  std::fclose(in);
  return std::fclose(out) ? 2 : 0;
}
