// Launches of spd_solve's kernel; the kernel itself is in spd_solve/, where a CPU can run it too.
#include <cuda_runtime.h>

#include <algorithm>

#include "spd_solve/kernel.h"

namespace rewrite_core {
namespace {

constexpr int cluster_sizes[] = {16, 8};  // 16 only where the GPU can hold such a cluster

struct Device {
  int shared_bytes = 0, multiprocessors = 0, major = 0;
  bool ok = false;

  explicit Device(int index) {
    ok = cudaSetDevice(index) == cudaSuccess &&
         cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess &&
         cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess;
  }
};

int64_t bytes_of(int64_t n, int blocks) {
  return spd::Parts(spd::Layout(static_cast<int>(n), blocks), spd::threads / gpu::warp_size).bytes();
}

using Kernel = void (*)(SPDSolveTask);

Kernel kernel_for(int blocks) { return blocks > 1 ? spd::spd_solve_kernel<true> : spd::spd_solve_kernel<false>; }

// What a launch of so many teams needs; `cluster` must outlive it.
cudaLaunchConfig_t config_of(int64_t n, int blocks, int64_t teams, cudaLaunchAttribute& cluster, void* stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(teams * blocks));
  config.blockDim = dim3(spd::threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes_of(n, blocks));
  config.stream = static_cast<cudaStream_t>(stream);
  if (blocks > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return config;
}

// Lets the kernel have what shared memory there is, and clusters of 16.
bool prepare(Kernel kernel, const Device& device, int blocks) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes) != cudaSuccess) {
    return false;
  }
  return blocks <= 8 || cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
}

bool fits(const Device& device, int64_t n, int blocks) {
  if (bytes_of(n, blocks) > device.shared_bytes || !prepare(kernel_for(blocks), device, blocks)) return false;
  if (blocks == 1) return true;
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = config_of(n, blocks, 1, cluster, nullptr);
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, kernel_for(blocks), &config) == cudaSuccess && clusters > 0;
}

}  // namespace

Status spd_solve_blocks(int64_t n, int index, int& blocks) {
  blocks = 0;
  if (n < 1) return Status::bad_argument;
  const Device device(index);
  if (!device.ok || device.major < 8) return Status::not_supported;
  if (n <= spd::largest_n) {
    if (fits(device, n, 1)) {
      blocks = 1;
    } else if (device.major >= 9) {
      for (int size : cluster_sizes) {
        if (!blocks && fits(device, n, size)) blocks = size;
      }
    }
  }
  (void)cudaGetLastError();  // what does not fit is an answer, no error of the next launch's
  return Status::ok;
}

Status spd_solve_cuda(SPDSolveTask task, int blocks, int index, void* stream) {
  const bool sizes = task.n >= 1 && task.n <= spd::largest_n && task.batch >= 0 && task.sides >= 0 && blocks >= 1;
  if (!sizes || (task.batch > 0 && !task.matrix)) return Status::bad_argument;
  if (task.batch == 0) return Status::ok;
  const Device device(index);
  const Kernel kernel = kernel_for(blocks);
  if (!device.ok || !prepare(kernel, device, blocks)) return Status::not_supported;
  // as many right-hand sides to each team as keep all multiprocessors busy once
  const int64_t groups = std::max<int64_t>((task.sides + spd::sides - 1) / spd::sides, 1);
  const int64_t all = task.batch * groups * blocks;
  task.passes = std::min(groups, (all + device.multiprocessors - 1) / device.multiprocessors);
  const int64_t teams = spd::Launching(task).teams;
  if (teams * blocks > 0x7fffffff) return Status::bad_argument;
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = config_of(task.n, blocks, teams, cluster, stream);
  return cudaLaunchKernelEx(&config, kernel, task) == cudaSuccess ? Status::ok : Status::not_supported;
}

}  // namespace rewrite_core
