// Features of any type and strides, packed for products.h.
#pragma once

#include "elements.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

constexpr int panel_channels = 16;

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

template <class Element>
inline void widen(Element value, Element& to) {
  to = value;
}
inline void widen(BFloat16 value, float& to) { to = from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline void widen(Float16 value, float& to) {
  // Exponent and mantissa moved into place and the exponent's bias mended. A subnormal half is the difference of
  // two normal floats, so that it survives flushing to zero. Compilers vectorise all this without F16C.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, exponent = value.bits & 0x7c00u;
  const uint32_t normal = magnitude + (exponent == 0x7c00u ? 224u << 23 : 112u << 23);  // infinity and NaN
  const uint32_t subnormal = to_bits(from_bits(magnitude + (113u << 23)) - from_bits(113u << 23));
  to = from_bits((exponent ? normal : subnormal) | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
}

// to[c][k] = from[k][c] for a square block that fills 16-byte vectors, in registers.
template <class Element>
inline void transpose_block(const Element* from, int64_t from_stride, Element* to, int64_t to_stride) {
  typedef typename Integer<sizeof(Element)>::type Bits;
  typedef Vector<Bits, 16> Part;
  constexpr int n = 16 / sizeof(Element);
  typename Part::type row[n];
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) row[k] = *reinterpret_cast<const typename Part::unaligned*>(from + k * from_stride);
  turn<16, Bits>(row);
#pragma GCC unroll 8
  for (int c = 0; c < n; ++c) *reinterpret_cast<typename Part::unaligned*>(to + c * to_stride) = row[c];
}

// to[c][k] = from[k][c] for any numbers of channels and positions: whole blocks, then what is left over.
template <class Element>
void transpose(const Element* from, int64_t from_stride, int channels, int count, Element* to, int64_t to_stride) {
  constexpr int n = 16 / sizeof(Element);
  const int whole_channels = channels / n * n, whole = count / n * n;
  for (int k = 0; k < whole; k += n) {
    for (int c = 0; c < whole_channels; c += n) {
      transpose_block(from + k * from_stride + c, from_stride, to + c * to_stride + k, to_stride);
    }
  }
  for (int c = 0; c < channels; ++c) {
    for (int k = c < whole_channels ? whole : 0; k < count; ++k) to[c * to_stride + k] = from[k * from_stride + c];
  }
}

// SecondMomentKernels::pack for one pair of types. Strides say which copy is fast: along positions (NCHW), or, where
// channels are neighbours (rows, channels_last), a transposition in registers; anything else goes element by element.
template <class Element, class Packed>
void pack_of(const Element* from, int64_t channel_stride, int64_t position_stride, int channels, int count, char* to) {
  if (position_stride == 1 || channel_stride != 1) {
    for (int c = 0; c < channels; ++c) {
      const Element* source = from + c * channel_stride;
      Packed* target = reinterpret_cast<Packed*>(to + c * key_stride);
      if (position_stride == 1) {
        for (int k = 0; k < count; ++k) widen(source[k], target[k]);
      } else {
        for (int k = 0; k < count; ++k) widen(source[k * position_stride], target[k]);
      }
    }
  } else if constexpr (sizeof(Element) == sizeof(Packed)) {  // rows and channels_last
    transpose(from, position_stride, channels, count, reinterpret_cast<Element*>(to),
              key_stride / static_cast<int64_t>(sizeof(Element)));
  } else {
    constexpr int some = 32;
    Element turned[panel_channels * some];
    for (int first = 0; first < count; first += some) {
      const int length = count - first < some ? count - first : some;
      transpose(from + first * position_stride, position_stride, channels, length, turned, some);
      for (int c = 0; c < channels; ++c) {
        Packed* target = reinterpret_cast<Packed*>(to + c * key_stride) + first;
        for (int k = 0; k < length; ++k) widen(turned[c * some + k], target[k]);
      }
    }
  }
}

void pack_float32(const void* from, int dtype, int64_t channel_stride, int64_t position_stride, int channels, int count,
                  void* to) {
  char* target = static_cast<char*>(to);
  if (dtype == 0) {
    pack_of<float, float>(static_cast<const float*>(from), channel_stride, position_stride, channels, count, target);
  } else if (dtype == 2) {
    pack_of<BFloat16, float>(static_cast<const BFloat16*>(from), channel_stride, position_stride, channels, count,
                             target);
  } else {
    pack_of<Float16, float>(static_cast<const Float16*>(from), channel_stride, position_stride, channels, count,
                            target);
  }
}

template <class Element>
void pack_same(const void* from, int, int64_t channel_stride, int64_t position_stride, int channels, int count,
               void* to) {
  pack_of<Element, Element>(static_cast<const Element*>(from), channel_stride, position_stride, channels, count,
                            static_cast<char*>(to));
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
