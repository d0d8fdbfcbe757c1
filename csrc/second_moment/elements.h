// The types of features that C++ has no name for.
#pragma once

#include <stdint.h>

#include "../second_moment_isa.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// use(keys) with `keys` as an address of what DType's number says.
template <class Use>
inline void with_element(const void* keys, int dtype, Use use) {
  if (dtype == 0) return use(static_cast<const float*>(keys));
  if (dtype == 1) return use(static_cast<const double*>(keys));
  if (dtype == 2) return use(static_cast<const BFloat16*>(keys));
  use(static_cast<const Float16*>(keys));
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
