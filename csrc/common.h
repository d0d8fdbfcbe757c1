// What every csrc/<op>.cpp shares: status codes, element types, memory and a thread team.
// Rules of this folder: no torch headers; raw pointers, sizes, strides in elements and a thread count;
// functions return a Status and never throw; only bindings.cpp knows Python.
// Not for csrc/*_isa.cpp: standard headers compiled for AVX-512 there could be the copy the linker keeps.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "simd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rewrite_core {

enum class Status : int {
  ok = 0,
  bad_argument = 1,
  out_of_memory = 2,
  not_positive_definite = 3,
  not_supported = 4,
};

inline const char* status_message(Status status) {
  switch (status) {
    case Status::ok:
      return "ok";
    case Status::bad_argument:
      return "a size, stride or pointer is out of range";
    case Status::out_of_memory:
      return "not enough memory for the work buffers";
    case Status::not_positive_definite:
      return "the matrix is not positive definite";
    case Status::not_supported:
      return "this build does not support the call";
  }
  return "unknown status";
}

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

inline const char* dtype_name(DType dtype) {  // as in torch
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
  }
  return "unknown";
}

// A 64-byte aligned block, freed with its owner; data() is null where there was no memory.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64))) {}
  ~Aligned() { std::free(data_); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// Hands out pieces of one block, each at a multiple of 64 bytes from its start; with no block it only counts.
template <class T>
class Arena {
 public:
  explicit Arena(T* data) : data_(data) {}
  T* take(int64_t count) {
    constexpr int64_t step = 64 / sizeof(T);
    T* const piece = data_ ? data_ + used_ : nullptr;
    used_ += (count + step - 1) / step * step;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* data_;
  int64_t used_ = 0;
};

// A 64-byte aligned block that is kept for the next call (make it thread_local): fresh memory costs a page fault for
// every 4 KB, which is a fifth of the time of a small call.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // At least `bytes`, with any content; null where there was no memory.
  char* get(int64_t bytes) {
    if (bytes > size_) {
      release();
      data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
      size_ = data_ ? bytes : 0;
    }
    return data_;
  }

  // Gives back what is larger than anybody should keep.
  void trim(int64_t most) {
    if (size_ > most) release();
  }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Threads that work on one call together: next() hands out tasks, meet() waits for all.
// A thread must not throw.
class Team {
 public:
  int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // This thread's number, from 0; call it once per thread.
  int64_t join() { return joined_.fetch_add(1, std::memory_order_relaxed); }

  // How many threads there are.
  int64_t size() const { return size_.load(std::memory_order_relaxed); }

  // Waits until every thread is here, then restarts the task numbers at 0.
  void meet() {
    const int64_t round = round_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_.load(std::memory_order_relaxed)) {
      waiting_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      wait([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

  // Runs work(team) on up to `threads` threads, the caller among them: team.size() says on how many. OpenMP gives fewer
  // where its settings say so (OMP_THREAD_LIMIT, OMP_DYNAMIC, a call from a parallel region), but libgomp ends the
  // process where the system starts no more; without OpenMP as many as can be started do the work.
  // OpenMP's threads, because torch's own are the same ones where it uses the same runtime (libgomp, as its Linux
  // builds do): they are awake already, and after torch's last operation they spin for milliseconds on the very
  // cores that other threads would want. Plain threads where the compiler has no OpenMP.
  template <class Work>
  static void run(int threads, Work work) {
    Team team;
    if (threads <= 1) {
      team.size_ = 1;
      work(team);
      return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
      team.size_.store(omp_get_num_threads(), std::memory_order_relaxed);  // all store the same
      work(team);
    }
#else
    std::vector<std::thread> others;
    const auto start = [&] {
      team.wait([&] { return team.size_.load(std::memory_order_acquire) > 0; });
      work(team);
    };
    try {
      others.reserve(threads - 1);
      while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back(start);
    } catch (const std::system_error&) {  // no more threads to be had: fewer do the same work
    } catch (const std::bad_alloc&) {
    }
    team.size_.store(static_cast<int>(others.size()) + 1, std::memory_order_release);
    work(team);
    for (std::thread& other : others) other.join();
#endif
  }

 private:
  template <class Condition>
  static void wait(Condition reached) {
    for (int spins = 0; !reached(); ++spins) {
      if (spins < 1000) {
        pause_thread();
      } else {
        std::this_thread::yield();  // more threads than cores
      }
    }
  }

  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> round_{0};
  std::atomic<int64_t> joined_{0};
  std::atomic<int> waiting_{0};
  std::atomic<int> size_{0};
};

// One thread alone, with Team's interface.
class Solo {
 public:
  int64_t next() { return task_++; }
  int64_t size() const { return 1; }
  void meet() { task_ = 0; }

 private:
  int64_t task_ = 0;
};

}  // namespace rewrite_core
