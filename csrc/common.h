// What every csrc/<op>.cpp shares: status codes, element types, memory; team.h has the threads.
// Rules of this folder: no torch headers; raw pointers, sizes, strides in elements and a thread count;
// functions return a Status and never throw; only bindings.cpp, with tensors.h, knows Python.
// Not for csrc/*_isa.cpp: standard headers compiled for AVX-512 there could be the copy the linker keeps.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "simd.h"
#include "team.h"

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

constexpr int64_t huge_page = 2 << 20;

// Asks for pages of 2 MB in place of 4 KB, before the memory is first written: fewer page faults and misses of the
// cores' address tables, which rows of a large matrix cost at every step. Where the system has none, nothing happens.
inline void use_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < 2 * huge_page) return;
  const int64_t skipped = -reinterpret_cast<intptr_t>(data) & (huge_page - 1);
  const int64_t whole = (bytes - skipped) / huge_page * huge_page;
  if (whole > 0) madvise(static_cast<char*>(data) + skipped, whole, MADV_HUGEPAGE);
#endif
}

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
      const int64_t unit = bytes < 2 * huge_page ? 64 : huge_page;
      data_ = static_cast<char*>(std::aligned_alloc(unit, (bytes + unit) / unit * unit));
      if (data_) use_huge_pages(data_, bytes);
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

}  // namespace rewrite_core
