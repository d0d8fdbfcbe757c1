// The products of weights with the operator's maps, and of slopes: where nearly all of the time goes.
#pragma once

#include "winograd.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

// group[i][q] = sum_s maps[q][s][i] turned[q][s] for the inputs i of one group
void pull(const FitProjectedProblem& problem, const float* maps, const float* turned, Floats* group) {
  const int64_t slots = problem.slots, products = problem.products;
  const int64_t step = problem.tile ? slots * width : 0;
  for (int64_t q = 0; q < products; ++q, maps += slots * GROUP, turned += step) {
    Floats sum[GROUP] = {};
    for (int64_t s = 0; s < slots; ++s) {
      const Floats slope = load(turned + s * width);
#pragma GCC unroll 8
      for (int i = 0; i < GROUP; ++i) sum[i] += maps[s * GROUP + i] * slope;
    }
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; ++i) group[i * products + q] = sum[i];
  }
}

// sums[q][s] += sum_i maps[q][s][i] group[i][q]
template <int block>
inline void push_slots(const float* maps, const Floats* weights, float* sums) {
  Floats sum[block];
#pragma GCC unroll 8
  for (int s = 0; s < block; ++s) sum[s] = load(sums + s * width);
#pragma GCC unroll 8
  for (int i = 0; i < GROUP; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < block; ++s) sum[s] += maps[s * GROUP + i] * weights[i];
  }
#pragma GCC unroll 8
  for (int s = 0; s < block; ++s) store(sums + s * width, sum[s]);
}

void push(const FitProjectedProblem& problem, const float* maps, const Floats* group, float* sums) {
  const int64_t slots = problem.slots, products = problem.products;
  const int64_t step = problem.tile ? slots * width : 0;
  for (int64_t q = 0; q < products; ++q, maps += slots * GROUP, sums += step) {
    Floats weights[GROUP];
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; ++i) weights[i] = group[i * products + q];
    int64_t s = 0;
    for (; s + 8 <= slots; s += 8) push_slots<8>(maps + s * GROUP, weights, sums + s * width);
    if (slots - s >= 4) {
      push_slots<4>(maps + s * GROUP, weights, sums + s * width);
      s += 4;
    }
    for (; s < slots; ++s) push_slots<1>(maps + s * GROUP, weights, sums + s * width);
  }
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
