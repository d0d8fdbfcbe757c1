// What CUDA kernels are written against, and nothing else of CUDA's: the same source compiles by nvcc for a GPU and by
// g++ for the CPU, where gpu_fibers.h runs the threads as fibers (tests/csrc).
//
//   kernel     a function template `GPU_KERNEL(threads) void name(Arguments)`, arguments by value
//   team       the blocks that work together: a cluster, or one block; a launch has many teams
//   barriers   each has a number of its own, so that a test can take one out and see that this is found
//   lanes      32 threads of a warp; functions called *together* want all 32 at the same place
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "gpu_fibers.h"
#else

#define GPU_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define GPU_FUNCTION __device__ __forceinline__
#define GPU_UNROLL _Pragma("unroll")
#define GPU_ROLLED _Pragma("unroll 1")
#define GPU_UNROLL_BY_4 _Pragma("unroll 4")

namespace gpu {

constexpr int warp_size = 32;

GPU_FUNCTION int thread() { return static_cast<int>(threadIdx.x); }  // in its block
GPU_FUNCTION int threads() { return static_cast<int>(blockDim.x); }
GPU_FUNCTION int lane() { return static_cast<int>(threadIdx.x % warp_size); }
GPU_FUNCTION int warp() { return static_cast<int>(threadIdx.x / warp_size); }
GPU_FUNCTION int warps() { return static_cast<int>(blockDim.x / warp_size); }

// Whether blocks can be a cluster. A kernel for clusters need not have a body where not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool has_clusters = false;
#else
constexpr bool has_clusters = true;
#endif

namespace detail {

template <class T>
GPU_FUNCTION T cluster_or(T one_block, T cluster) {  // below sm_90 there are no clusters
#if __CUDA_ARCH__ >= 900
  return cluster;
#else
  return one_block;
#endif
}

GPU_FUNCTION int cluster_number(int which) {
  unsigned value = 0;
#if __CUDA_ARCH__ >= 900
  if (which == 0) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  if (which == 1) asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
  if (which == 2) asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(value));
#endif
  return static_cast<int>(value);
}

}  // namespace detail

// This block in its team, how many blocks a team has, and the team's number. A launch without clusters: 0, 1, the
// block.
GPU_FUNCTION int rank() { return detail::cluster_number(0); }
GPU_FUNCTION int blocks() { return detail::cluster_or(1, detail::cluster_number(1)); }
GPU_FUNCTION int team() { return detail::cluster_or(static_cast<int>(blockIdx.x), detail::cluster_number(2)); }

// The block's shared memory, aligned to 16 bytes; its content is anything.
GPU_FUNCTION char* shared() {
  extern __shared__ __align__(16) char gpu_shared_memory[];
  return gpu_shared_memory;
}

// The same place in the shared memory of another block of the team, which must not have ended.
template <class T>
GPU_FUNCTION T* peer(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(theirs);
#else
  return mine;
#endif
}

// Everybody waits for all threads of the block; of the team; of the warp.
template <int number>
GPU_FUNCTION void sync_block() {
  __syncthreads();
}

template <int number>
GPU_FUNCTION void sync_team() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

template <int number>
GPU_FUNCTION void sync_warp() {
  __syncwarp();
}

// The value of lane `from`; of the lane whose number differs in the bits of `mask`. Together.
template <class T>
GPU_FUNCTION T shuffle(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}

template <class T>
GPU_FUNCTION T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// c [8, 8] += a [8, 4] b [4, 8] on the float64 tensor cores. Together. Lane l holds
//   a[l / 4][l % 4],   b[l % 4][l / 4],   c[l / 4][2 (l % 4)] and the next one.
GPU_FUNCTION void mma(double (&c)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a), "d"(b));
}

// c [16, 8] += a [16, 8] b [8, 8] on the tensor cores, of numbers that to_tf32() has rounded. Together. Lane l holds,
// with g = l / 4 and t = l % 4,
//   a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4],   b[t][g], b[t + 4][g],
//   c[g][2 t], c[g][2 t + 1], c[g + 8][2 t], c[g + 8][2 t + 1].
GPU_FUNCTION void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// The first 11 bits of a number, which is TF32; and rounded to as many. Of NaN something that is not finite is left by
// the first alone.
GPU_FUNCTION float cut_tf32(float value) { return __uint_as_float(__float_as_uint(value) & 0xffffe000u); }
GPU_FUNCTION float round_tf32(float value) { return __uint_as_float((__float_as_uint(value) + 0x1000u) & 0xffffe000u); }

// Two or four numbers at an address that is a multiple of 8 or 16 bytes.
GPU_FUNCTION void load_two(const float* from, float (&to)[2]) {
  const float2 all = *reinterpret_cast<const float2*>(from);
  to[0] = all.x, to[1] = all.y;
}

GPU_FUNCTION void load_four(const float* from, float (&to)[4]) {
  const float4 all = *reinterpret_cast<const float4*>(from);
  to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
}

GPU_FUNCTION void store_four(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// What no thread of the launch writes.
template <class T>
GPU_FUNCTION T load(const T* from) {
  return __ldg(from);
}

GPU_FUNCTION double inverse_root(double value) { return rsqrt(value); }
GPU_FUNCTION float root(float value) { return __fsqrt_rn(value); }

// To two units of the last place, in a few instructions; the divisor below 2^126.
GPU_FUNCTION float quick_root(float value) {
  float found;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(found) : "f"(value));
  return found;
}
GPU_FUNCTION float quick_quotient(float value, float by) { return __fdividef(value, by); }

GPU_FUNCTION double not_a_number() { return __longlong_as_double(0x7ff8000000000000); }

}  // namespace gpu

#endif

namespace gpu {

// The same of a team that is known to be one block where it is not `many`: its own barrier and memory are faster.
template <bool many, int number>
GPU_FUNCTION void sync_team() {
  if (many) {
    sync_team<number>();
  } else {
    sync_block<number>();
  }
}

template <bool many, class T>
GPU_FUNCTION T* peer(T* mine, int rank) {
  return many ? peer(mine, rank) : mine;
}

}  // namespace gpu
