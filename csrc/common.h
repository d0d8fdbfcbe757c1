// What every csrc/<op>.cpp shares: status codes, element types, instruction sets and a thread team.
// Rules of this folder: no torch headers; raw pointers, sizes, strides in elements and a thread count;
// functions return a Status and never throw; only bindings.cpp knows Python.
// Not for csrc/*_isa.cpp: standard headers compiled for AVX-512 there could be the copy the linker keeps.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

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
    case Status::ok: return "ok";
    case Status::bad_argument: return "a size, stride or pointer is out of range";
    case Status::out_of_memory: return "not enough memory for the work buffers";
    case Status::not_positive_definite: return "the matrix is not positive definite";
    case Status::not_supported: return "this build does not support the call";
  }
  return "unknown status";
}

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this CPU among those CMakeLists.txt compiles.
inline Isa detect_isa() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
  return Isa::portable;
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
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

// Threads that work on one call together: next() hands out tasks, meet() waits for all.
// A thread must not throw.
class Team {
 public:
  int64_t next() {
    std::lock_guard<std::mutex> lock(mutex_);
    return next_++;
  }

  // This thread's number, from 0; call it once per thread.
  int64_t join() {
    std::lock_guard<std::mutex> lock(mutex_);
    return joined_++;
  }

  // Waits until every thread is here, then restarts the task numbers at 0.
  void meet() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t round = round_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      next_ = 0;
      ++round_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return round_ != round; });
    }
  }

  // Runs work(team) on `threads` threads, the caller among them, or on as many as can be started.
  // Plain std::thread and no OpenMP: a second OpenMP runtime beside torch's would oversubscribe the cores.
  template <class Work>
  static void run(int threads, Work work) {
    Team team;
    std::vector<std::thread> others;
    {
      std::unique_lock<std::mutex> lock(team.mutex_);  // nobody passes meet() before the size is known
      try {
        others.reserve(threads > 1 ? threads - 1 : 0);
        while (static_cast<int>(others.size()) + 1 < threads) others.emplace_back([&] { work(team); });
      } catch (const std::system_error&) {  // no more threads to be had: fewer do the same work
      } catch (const std::bad_alloc&) {
      }
      team.size_ = static_cast<int>(others.size()) + 1;
    }
    work(team);
    for (std::thread& other : others) other.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t next_ = 0;
  int64_t round_ = 0;
  int64_t joined_ = 0;
  int waiting_ = 0;
  int size_ = 1;
};

}  // namespace rewrite_core
