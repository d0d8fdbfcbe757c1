// Launches of fit_projected's kernel; the kernel itself is in fit_projected_cuda/, where a CPU can run it too.
#include "fit_projected_cuda/kernel.h"
#include "gpu_launch.h"

namespace rewrite_core {
namespace {

using gpu_launch::Device;
using Launch = gpu_launch::Launch<FitProjectedTask>;

// Few weights to a warp, and as many as its registers hold: 4608 weights on a cluster of 16, as of 512 inputs and 3x3.
using Few = projected::Form<3, 2, 8>;
using Many = projected::Form<9, 2, 8>;
static_assert(Few::channels == Many::channels, "teams have as many channels in every form");

// Of a block with as many weights and pixels as an edit of 10x10 has: what an H100 lends.
static_assert(projected::Parts<Many>(projected::Layout<Many>(100, 9, 16)).bytes() <= 227 << 10, "it fits into Hopper");

template <class Form, bool many>
Launch launch_with(int64_t pixels, int64_t taps, int blocks, bool leans) {
  const projected::Parts<Form> parts(projected::Layout<Form>(pixels, taps, blocks));
  const Launch::Kernel kernel =
      leans ? projected::fit_projected_kernel<Form, many, true> : projected::fit_projected_kernel<Form, many, false>;
  return Launch{kernel, blocks, Form::threads, parts.bytes()};
}

Launch launch_of(const FitProjectedPlan& plan, int64_t pixels, int64_t taps, bool leans) {
  if (plan.blocks == 1) return launch_with<Few, false>(pixels, taps, 1, leans);
  if (plan.tiles == Few::own_tiles) return launch_with<Few, true>(pixels, taps, plan.blocks, leans);
  return launch_with<Many, true>(pixels, taps, plan.blocks, leans);
}

// In which order plans are tried: the smaller the form, the less a block has to do.
constexpr FitProjectedPlan plans[] = {{Few::own_tiles, 1},  {Few::own_tiles, 2},  {Few::own_tiles, 4},
                                      {Few::own_tiles, 8},  {Few::own_tiles, 16}, {Many::own_tiles, 8},
                                      {Many::own_tiles, 16}};
constexpr int64_t rows_of_a_tile = Few::rows / Few::own_tiles;
constexpr int64_t most_pixels = 1 << 14;  // far beyond what fits

}  // namespace

Status fit_projected_plan(int64_t weights, int64_t pixels, int64_t taps, int index, FitProjectedPlan& plan) {
  plan = FitProjectedPlan{};
  if (weights < 1 || pixels < 1 || taps < 1) return Status::bad_argument;
  const Device device(index);
  if (!device.ok) return Status::not_supported;
  for (const FitProjectedPlan& tried : plans) {
    const bool enough = weights <= tried.tiles * rows_of_a_tile * tried.blocks && pixels <= most_pixels;
    if (!plan.tiles && enough && launch_of(tried, pixels, taps, false).fits(device)) plan = tried;
  }
  return Status::ok;
}

int64_t fit_projected_parts(int64_t channels, const FitProjectedPlan& plan) {
  return (channels + Many::channels - 1) / Many::channels * plan.blocks;
}

Status fit_projected_cuda(const FitProjectedTask& task, const FitProjectedPlan& plan, int index, void* stream) {
  const bool sizes = task.channels >= 0 && task.inputs >= 1 && task.taps >= 1 && task.pixels >= 1 && task.ranks >= 0 &&
                     task.steps >= 0 && task.project_every >= 1 && plan.tiles >= 1 && plan.blocks >= 1;
  if (!sizes || task.inputs * task.taps > plan.tiles * rows_of_a_tile * plan.blocks) return Status::bad_argument;
  if (task.channels == 0) return Status::ok;
  const int64_t teams = fit_projected_parts(task.channels, plan) / plan.blocks;
  return launch_of(plan, task.pixels, task.taps, task.basis != nullptr).run(Device(index), teams, task, stream);
}

}  // namespace rewrite_core
