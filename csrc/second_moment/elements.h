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

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
