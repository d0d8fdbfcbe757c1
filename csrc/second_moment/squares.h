// Sums of squares of channels that are neighbours in memory, as channels_last has them: channels lie along the lanes.
#pragma once

#include "elements.h"
#include "packing.h"
#include "products.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

template <class Element>
struct Squared {
  typedef float Real;
};
template <>
struct Squared<double> {
  typedef double Real;
};

constexpr int square_vectors = 4;  // of sums in registers
constexpr int squares_ahead = 16;  // positions that are asked for before they are read

// Of `vectors` vectors of channels at no more than most_terms positions.
template <int vectors, class Element>
inline void squares_of(const Element* from, int64_t position_stride, int count, double* sums) {
  typedef typename Squared<Element>::Real Real;
  constexpr int line = 64 / sizeof(Element);
  Vec<Real> sum[vectors] = {};
  for (int k = 0; k < count; ++k) {
    const Element* key = from + k * position_stride;
    for (int c = 0; c < vectors * lanes<Real>; c += line) {  // a number, as beyond the features there may be nothing
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(key) +
                                                       sizeof(Element) * (c + squares_ahead * position_stride)));
    }
    const Real* numbers;
    Real wide[vectors * lanes<Real>];
    if constexpr (sizeof(Element) == sizeof(Real)) {
      numbers = key;
    } else {
      for (int c = 0; c < vectors * lanes<Real>; ++c) widen(key[c], wide[c]);
      numbers = wide;
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Vec<Real> value = *reinterpret_cast<const typename Vector<Real>::unaligned*>(numbers + v * lanes<Real>);
      sum[v] += value * value;
    }
  }
  Real part[vectors * lanes<Real>];
  __builtin_memcpy(part, sum, sizeof(part));
  for (int c = 0; c < vectors * lanes<Real>; ++c) sums[c] += static_cast<double>(part[c]);
}

template <class Element>
void squares_as(const Element* from, int64_t position_stride, int64_t channels, int count, double* sums) {
  typedef typename Squared<Element>::Real Real;
  constexpr int one = lanes<Real>, several = square_vectors * one;
  for (int first = 0; first < count; first += most_terms, from += most_terms * position_stride) {
    const int some = count - first < most_terms ? count - first : most_terms;
    int64_t c = 0;
    for (; c + several <= channels; c += several) {
      squares_of<square_vectors>(from + c, position_stride, some, sums + c);
    }
    for (; c + one <= channels; c += one) squares_of<1>(from + c, position_stride, some, sums + c);
    for (; c < channels; ++c) {
      Real sum = 0;
      for (int k = 0; k < some; ++k) {
        Real value;
        widen(from[k * position_stride + c], value);
        sum += value * value;
      }
      sums[c] += static_cast<double>(sum);
    }
  }
}

// SecondMomentKernels::squares, of any type.
void squares(const void* from, int dtype, int64_t position_stride, int64_t channels, int count, double* sums) {
  with_element(from, dtype, [&](auto* keys) { squares_as(keys, position_stride, channels, count, sums); });
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
