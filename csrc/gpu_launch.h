// What the launches of csrc/*.cu share: what a GPU has, and clusters of blocks. For nvcc.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.h"

namespace rewrite_core {
namespace gpu_launch {

constexpr int cluster_sizes[] = {16, 8};  // 16 only where the GPU can hold such a cluster
constexpr int oldest = 8;                 // compute capability 8.0; clusters from 9.0 on
constexpr int clusters_from = 9;

struct Device {
  int shared_bytes = 0, multiprocessors = 0, major = 0;
  bool ok = false;

  explicit Device(int index) {
    ok = cudaSetDevice(index) == cudaSuccess &&
         cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess &&
         cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess && major >= oldest;
  }
};

// One kernel with what each of its launches needs.
template <class Task>
struct Launch {
  using Kernel = void (*)(Task);
  Kernel kernel;
  int blocks, threads;  // of a team: 1, or a cluster's; of a block
  int64_t bytes;        // of a block's shared memory

  // Lets the kernel have what shared memory there is, and clusters of 16.
  bool prepare(const Device& device) const {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes) != cudaSuccess) {
      return false;
    }
    return blocks <= 8 ||
           cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  }

  // Whether the GPU can hold a team of such blocks. What does not fit is an answer, no error of the next launch's.
  bool fits(const Device& device) const {
    if (blocks > 1 && device.major < clusters_from) return false;
    if (bytes > device.shared_bytes) return false;
    bool found = prepare(device);
    if (found && blocks > 1) {
      cudaLaunchAttribute cluster{};
      const cudaLaunchConfig_t config = config_of(1, cluster, nullptr);
      int clusters = 0;
      found = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0;
    }
    (void)cudaGetLastError();
    return found;
  }

  // Queues so many teams on a stream.
  Status run(const Device& device, int64_t teams, Task task, void* stream) const {
    if (teams * blocks > 0x7fffffff) return Status::bad_argument;
    if (!device.ok || !prepare(device)) return Status::not_supported;
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = config_of(teams, cluster, stream);
    return cudaLaunchKernelEx(&config, kernel, task) == cudaSuccess ? Status::ok : Status::not_supported;
  }

 private:
  // `cluster` must outlive it.
  cudaLaunchConfig_t config_of(int64_t teams, cudaLaunchAttribute& cluster, void* stream) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(teams * blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
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
};

}  // namespace gpu_launch
}  // namespace rewrite_core
