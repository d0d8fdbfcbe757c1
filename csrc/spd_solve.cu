// Launches of spd_solve's kernel; the kernel itself is in spd_solve/, where a CPU can run it too.
#include <algorithm>

#include "gpu_launch.h"
#include "spd_solve/kernel.h"

namespace rewrite_core {
namespace {

using gpu_launch::Device;
using Launch = gpu_launch::Launch<SPDSolveTask>;

Launch launch_of(int64_t n, int blocks) {
  const Launch::Kernel kernel = blocks > 1 ? spd::spd_solve_kernel<true> : spd::spd_solve_kernel<false>;
  const spd::Parts parts(spd::Layout(static_cast<int>(n), blocks), spd::threads / gpu::warp_size);
  return Launch{kernel, blocks, spd::threads, parts.bytes()};
}

}  // namespace

Status spd_solve_blocks(int64_t n, int index, int& blocks) {
  blocks = 0;
  if (n < 1) return Status::bad_argument;
  const Device device(index);
  if (!device.ok) return Status::not_supported;
  if (n > spd::largest_n) return Status::ok;
  if (launch_of(n, 1).fits(device)) blocks = 1;
  for (int size : gpu_launch::cluster_sizes) {
    if (!blocks && launch_of(n, size).fits(device)) blocks = size;
  }
  return Status::ok;
}

Status spd_solve_cuda(SPDSolveTask task, int blocks, int index, void* stream) {
  const bool sizes = task.n >= 1 && task.n <= spd::largest_n && task.batch >= 0 && task.sides >= 0 && blocks >= 1;
  if (!sizes || (task.batch > 0 && !task.matrix)) return Status::bad_argument;
  if (task.batch == 0) return Status::ok;
  const Device device(index);
  // as many right-hand sides to each team as keep all multiprocessors busy once
  const int64_t groups = std::max<int64_t>((task.sides + spd::sides - 1) / spd::sides, 1);
  const int64_t all = task.batch * groups * blocks, processors = std::max(device.multiprocessors, 1);
  task.passes = std::min(groups, (all + processors - 1) / processors);
  return launch_of(task.n, blocks).run(device, spd::Launching(task).teams, task, stream);
}

}  // namespace rewrite_core
