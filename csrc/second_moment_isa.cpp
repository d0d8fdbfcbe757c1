// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see second_moment_isa.h.
#include "second_moment_isa.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

// The tile fills the register file: rows x panels vectors of sums, `panels` of columns, one broadcast.
#if defined(REWRITE_CORE_ISA_avx512)
constexpr int vector_bytes = 64, rows_f32 = 8, rows_f64 = 8, tile_panels = 3;
#elif defined(REWRITE_CORE_ISA_avx2)
constexpr int vector_bytes = 32, rows_f32 = 4, rows_f64 = 4, tile_panels = 3;
#else
constexpr int vector_bytes = 16, rows_f32 = 4, rows_f64 = 2, tile_panels = 2;
#endif

template <class Real>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(Real));

template <class Real>
struct Vector {
  typedef Real type __attribute__((vector_size(vector_bytes)));
};

template <class Real, int rows, int panels>
void tile_of(const Real* row, const Real* columns, int64_t panel_stride, int run, double* sums) {
  constexpr int width = lanes<Real>;
  constexpr int step = sizeof(Real) == 4 ? short_run : max_run;  // double needs no short runs
  typedef typename Vector<Real>::type Vec;
  Vec total[rows][panels] = {};
  for (int start = 0; start < run; start += step) {
    const int end = start + step < run ? start + step : run;
    Vec sum[rows][panels] = {};
    for (int k = start; k < end; ++k) {
      Vec column[panels];
#pragma GCC unroll 4
      for (int j = 0; j < panels; ++j) {
        column[j] = *reinterpret_cast<const Vec*>(columns + j * panel_stride + k * width);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Real scale = row[k * width + i];
#pragma GCC unroll 4
        for (int j = 0; j < panels; ++j) sum[i][j] += scale * column[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < panels; ++j) total[i][j] += sum[i][j];
    }
  }
  const Real* flat = reinterpret_cast<const Real*>(total);
  for (int i = 0; i < rows * panels * width; ++i) sums[i] += static_cast<double>(flat[i]);
}

template <class Real, int rows>
void tile(const Real* row, const Real* columns, int64_t panel_stride, int panel_count, int run,
          double* sums) {
  if (panel_count == 1) return tile_of<Real, rows, 1>(row, columns, panel_stride, run, sums);
  if (panel_count == 2) return tile_of<Real, rows, 2>(row, columns, panel_stride, run, sums);
  return tile_of<Real, rows, tile_panels>(row, columns, panel_stride, run, sums);
}

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

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Float16 value) {
  // Exponent and mantissa moved into place and the exponent's bias mended. A subnormal half is the difference of
  // two normal floats, so that it survives flushing to zero. Compilers vectorise all this without F16C.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, exponent = value.bits & 0x7c00u;
  const uint32_t normal = magnitude + (exponent == 0x7c00u ? 224u << 23 : 112u << 23);  // infinity and NaN
  const uint32_t subnormal = to_bits(from_bits(magnitude + (113u << 23)) - from_bits(113u << 23));
  return from_bits((exponent ? normal : subnormal) | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
}

// packed[k][c] = features[c * stride + k] for a full panel of floats: 4x4 blocks, transposed in registers.
inline int transpose_blocks(const float* features, int64_t stride, int count, float* packed) {
  typedef float Four __attribute__((vector_size(16)));
  typedef Four Unaligned __attribute__((aligned(4)));
  typedef int Pick __attribute__((vector_size(16)));
  constexpr int width = lanes<float>;
  const int whole = count & ~3;
  for (int c = 0; c < width; c += 4) {
    const float* source = features + c * stride;
    for (int k = 0; k < whole; k += 4) {
      const Four a = *reinterpret_cast<const Unaligned*>(source + k);
      const Four b = *reinterpret_cast<const Unaligned*>(source + stride + k);
      const Four d = *reinterpret_cast<const Unaligned*>(source + 2 * stride + k);
      const Four e = *reinterpret_cast<const Unaligned*>(source + 3 * stride + k);
      const Four ab_low = __builtin_shuffle(a, b, Pick{0, 4, 1, 5});
      const Four ab_high = __builtin_shuffle(a, b, Pick{2, 6, 3, 7});
      const Four de_low = __builtin_shuffle(d, e, Pick{0, 4, 1, 5});
      const Four de_high = __builtin_shuffle(d, e, Pick{2, 6, 3, 7});
      float* target = packed + k * width + c;
      *reinterpret_cast<Four*>(target) = __builtin_shuffle(ab_low, de_low, Pick{0, 1, 4, 5});
      *reinterpret_cast<Four*>(target + width) = __builtin_shuffle(ab_low, de_low, Pick{2, 3, 6, 7});
      *reinterpret_cast<Four*>(target + 2 * width) = __builtin_shuffle(ab_high, de_high, Pick{0, 1, 4, 5});
      *reinterpret_cast<Four*>(target + 3 * width) = __builtin_shuffle(ab_high, de_high, Pick{2, 3, 6, 7});
    }
  }
  return whole;
}
inline int transpose_blocks(const double*, int64_t, int, double*) { return 0; }

// The same type, positions next to each other: maps in NCHW.
template <class Real>
void pack_maps(const Real* features, int64_t channel_stride, int channels, int count, Real* packed) {
  constexpr int width = lanes<Real>;
  int done = channels == width ? transpose_blocks(features, channel_stride, count, packed) : 0;
  for (int k = done; k < count; ++k) {
    for (int c = 0; c < channels; ++c) packed[k * width + c] = features[c * channel_stride + k];
    for (int c = channels; c < width; ++c) packed[k * width + c] = Real(0);
  }
}

template <class Real, class Element>
void pack_of(const Element* features, int64_t channel_stride, int64_t position_stride, int channels,
             int count, Real* packed, Real* scratch) {
  constexpr int width = lanes<Real>;
  if (position_stride == 1) {
    if constexpr (sizeof(Element) == sizeof(Real)) {
      pack_maps<Real>(features, channel_stride, channels, count, packed);
    } else {  // widen each channel's run first, which vectorises, then transpose
      for (int c = 0; c < channels; ++c) {
        for (int k = 0; k < count; ++k) scratch[c * max_run + k] = widen(features[c * channel_stride + k]);
      }
      pack_maps<Real>(scratch, max_run, channels, count, packed);
    }
  } else if (channel_stride == 1 && channels == width) {  // rows and channels_last
    for (int k = 0; k < count; ++k) {
      for (int c = 0; c < width; ++c) packed[k * width + c] = widen(features[k * position_stride + c]);
    }
  } else {
    for (int k = 0; k < count; ++k) {
      for (int c = 0; c < channels; ++c) {
        packed[k * width + c] = widen(features[k * position_stride + c * channel_stride]);
      }
      for (int c = channels; c < width; ++c) packed[k * width + c] = Real(0);
    }
  }
}

void pack_f32(const void* features, int dtype, int64_t channel_stride, int64_t position_stride, int channels,
              int count, float* packed, float* scratch) {
  if (dtype == 0) {
    pack_of(static_cast<const float*>(features), channel_stride, position_stride, channels, count, packed,
            scratch);
  } else if (dtype == 2) {
    pack_of(static_cast<const BFloat16*>(features), channel_stride, position_stride, channels, count, packed,
            scratch);
  } else {
    pack_of(static_cast<const Float16*>(features), channel_stride, position_stride, channels, count, packed,
            scratch);
  }
}

void pack_f64(const void* features, int, int64_t channel_stride, int64_t position_stride, int channels,
              int count, double* packed, double* scratch) {
  pack_of(static_cast<const double*>(features), channel_stride, position_stride, channels, count, packed,
          scratch);
}

}  // namespace

const SecondMomentTable second_moment_table = {
    {lanes<float>, rows_f32, tile_panels, pack_f32, tile<float, rows_f32>},
    {lanes<double>, rows_f64, tile_panels, pack_f64, tile<double, rows_f64>},
};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
