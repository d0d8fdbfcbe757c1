// The only place that knows instruction sets. The first half says which there are and is for every file; the second is
// for csrc/*_isa.cpp, which are compiled once per set with REWRITE_CORE_ISA as the namespace: that set's vectors.
//
// Vectors are GCC's and Clang's vector extensions, so that the portable build is SSE2 on x86-64 and NEON on aarch64.
// Intrinsics are for what no operator says.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "rewrite_core's kernels are for x86-64 and aarch64; elsewhere the package works without them (setup.py)."
#endif

namespace rewrite_core {

// What CMakeLists.txt compiles. On aarch64 only the portable one, whose vectors are NEON's.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

inline const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

// The best one that this CPU has.
inline Isa detect_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

// The instruction of `add_pairs` below, which not every CPU with AVX-512 has.
inline bool detect_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Declares `name`, one object per instruction set, and name_for(isa).
#if defined(__x86_64__)
#define REWRITE_CORE_PER_ISA(type, name)                                                       \
  namespace portable {                                                                         \
  extern const type name;                                                                      \
  }                                                                                            \
  namespace avx2 {                                                                             \
  extern const type name;                                                                      \
  }                                                                                            \
  namespace avx512 {                                                                           \
  extern const type name;                                                                      \
  }                                                                                            \
  inline const type& name##_for(Isa isa) {                                                     \
    return isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : portable::name; \
  }
#else
#define REWRITE_CORE_PER_ISA(type, name) \
  namespace portable {                   \
  extern const type name;                \
  }                                      \
  inline const type& name##_for(Isa) { return portable::name; }
#endif

// For a thread that waits for another one.
inline void pause_thread() {
#if defined(__x86_64__)
  _mm_pause();
#else
  asm volatile("yield");
#endif
}

// Asks the cache for a line that will be written, so that another core's copy of it is given up at once. GCC and Clang
// make that of __builtin_prefetch only where they may assume it; processors of x86-64 that lack it take it for nothing.
inline void ask_to_write(const void* address) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 1);
#endif
}

// While it lives, tiny numbers count as zero: processors are slow with them.
struct FlushToZero {
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr();
  FlushToZero() { _mm_setcsr(mode | 0x8040); }
  ~FlushToZero() { _mm_setcsr(mode); }
#else
  uint64_t mode;
  FlushToZero() {
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    asm volatile("msr fpcr, %0" : : "r"(mode | uint64_t{1} << 24));
  }
  ~FlushToZero() { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;
};

#if defined(REWRITE_CORE_ISA)
namespace REWRITE_CORE_ISA {
namespace {

#if defined(REWRITE_CORE_ISA_avx512)
constexpr int vector_bytes = 64, registers = 32;
#elif defined(REWRITE_CORE_ISA_avx2)
constexpr int vector_bytes = 32, registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, registers = 32;
#else
constexpr int vector_bytes = 16, registers = 16;
#endif

template <class Element, int bytes = vector_bytes>
struct Vector {
  typedef Element type __attribute__((vector_size(bytes)));
  typedef Element packed __attribute__((vector_size(bytes), may_alias));  // stored as another type, aligned
  typedef Element unaligned __attribute__((vector_size(bytes), aligned(sizeof(Element)), may_alias));
};
template <class Real>
using Vec = typename Vector<Real>::type;
template <class Real>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(Real));

template <int bytes>
struct Integer;
template <>
struct Integer<2> {
  typedef int16_t type;
};
template <>
struct Integer<4> {
  typedef int32_t type;
};
template <>
struct Integer<8> {
  typedef int64_t type;
};

template <class Real>
inline Vec<Real> load(const Real* a) {
  return *reinterpret_cast<const Vec<Real>*>(a);
}
template <class Real>
inline void store(Real* a, Vec<Real> v) {
  *reinterpret_cast<Vec<Real>*>(a) = v;
}
template <class Real>
inline Vec<Real> fill(Real a) {
  return Vec<Real>{} + a;
}

// As many numbers as a vector of doubles has, at any address.
inline Vec<double> load_wide(const double* a) { return *reinterpret_cast<const Vector<double>::unaligned*>(a); }
inline Vec<double> load_wide(const float* a) {
#if defined(REWRITE_CORE_ISA_avx512)
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(a));  // GCC converts two halves; the plain one warns in GCC 12
#else
  return __builtin_convertvector(*reinterpret_cast<const Vector<float, vector_bytes / 2>::unaligned*>(a), Vec<double>);
#endif
}
inline void store_wide(double* a, Vec<double> v) { *reinterpret_cast<Vector<double>::unaligned*>(a) = v; }

// --- instructions
// ------------------------------------------------------------------------------------------------------

inline Vec<double> square_root(Vec<double> a) {
#if defined(REWRITE_CORE_ISA_avx512)
  return _mm512_maskz_sqrt_pd(0xff, a);  // the plain one warns in GCC 12
#elif defined(REWRITE_CORE_ISA_avx2)
  return _mm256_sqrt_pd(a);
#elif defined(__aarch64__)
  return vsqrtq_f64(a);
#else
  return _mm_sqrt_pd(a);
#endif
}

inline Vec<float> square_root(Vec<float> a) {
#if defined(REWRITE_CORE_ISA_avx512)
  return _mm512_maskz_sqrt_ps(0xffff, a);
#elif defined(REWRITE_CORE_ISA_avx2)
  return _mm256_sqrt_ps(a);
#elif defined(__aarch64__)
  return vsqrtq_f32(a);
#else
  return _mm_sqrt_ps(a);
#endif
}

inline double square_root(double a) {
#if defined(__aarch64__)
  return vget_lane_f64(vsqrt_f64(vdup_n_f64(a)), 0);
#else
  // of both halves: the move that clears one can be encoded in a way that valgrind does not know
  return _mm_cvtsd_f64(_mm_sqrt_pd(_mm_set1_pd(a)));
#endif
}

// 1 / sqrt(a) for a > 0, to the last bit or two.
inline Vec<double> inverse_root(Vec<double> a) {
#if defined(REWRITE_CORE_ISA_avx512)
  // 14 bits, doubled twice: a third of the time of a root and a division
  Vec<double> y = _mm512_maskz_rsqrt14_pd(0xff, a);
  const Vec<double> half = 0.5 * a;
  y *= 1.5 - half * y * y;
  return y * (1.5 - half * y * y);
#else
  return 1.0 / square_root(a);
#endif
}

// 1 / (sqrt(a) scale + more) for a >= 0 and more > 1e-18, to the last bit or two.
inline Vec<float> inverse_of_root(Vec<float> a, float scale, float more) {
#if defined(REWRITE_CORE_ISA_avx512)
  // 14 bits doubled once each: a fourth of the time of a root and a division
  a = a > 1e-36f ? a : fill(1e-36f);  // its root is nothing beside `more`
  const Vec<float> y = _mm512_maskz_rsqrt14_ps(0xffff, a), rough = a * y;
  const Vec<float> root = rough + (0.5f * y) * (a - rough * rough);
  const Vec<float> size = root * scale + more;
  const Vec<float> inverse = _mm512_maskz_rcp14_ps(0xffff, size);
  return inverse * (2.0f - size * inverse);
#else
  return 1.0f / (square_root(a) * scale + more);
#endif
}

// a itself, in a register, and the compiler does not know what it is: it neither fuses the product that it comes from
// with a later sum, nor loads it again.
template <class V>
inline V opaque(V a) {
#if defined(__aarch64__)
  asm("" : "+w"(a));
#elif defined(REWRITE_CORE_ISA_avx512)
  asm("" : "+v"(a));
#else
  asm("" : "+x"(a));
#endif
  return a;
}

// sum += a b for pairs of bfloat16 numbers, two to a lane; call it where detect_bfloat16() says so.
#if defined(REWRITE_CORE_ISA_avx512)
constexpr bool has_pairs = true;
inline void add_pairs(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#else
constexpr bool has_pairs = false;
inline void add_pairs(Vec<float>&, Vec<float>, Vec<float>) { __builtin_trap(); }
#endif

// The lanes of a, then b, that `places` name; constants once loops are unrolled, so one instruction.
template <class V, class Places>
inline V shuffle(V a, V b, Places places) {
#if defined(__clang__)  // has no __builtin_shuffle
  constexpr int n = sizeof(V) / sizeof(a[0]);
  V result;
#pragma GCC unroll 16
  for (int lane = 0; lane < n; ++lane) result[lane] = places[lane] < n ? a[places[lane]] : b[places[lane] - n];
  return result;
#else
  return __builtin_shuffle(a, b, places);
#endif
}

// Rows become columns, for a square of vectors of `bytes`: every round interleaves the upper and the lower half of the
// rows, which rotates the bits of the index (row, lane) by one.
template <int bytes, class Element>
inline void turn(typename Vector<Element, bytes>::type (&row)[bytes / sizeof(Element)]) {
  typedef typename Vector<Element, bytes>::type Part;
  constexpr int n = bytes / sizeof(Element);
  typename Vector<typename Integer<sizeof(Element)>::type, bytes>::type low, high;
#pragma GCC unroll 8
  for (int lane = 0; lane < n; ++lane) {
    low[lane] = lane / 2 + lane % 2 * n;
    high[lane] = low[lane] + n / 2;
  }
#pragma GCC unroll 3
  for (int round = 1; round < n; round *= 2) {
    Part mixed[n];
#pragma GCC unroll 4
    for (int k = 0; k < n / 2; ++k) {
      mixed[2 * k] = shuffle(row[k], row[k + n / 2], low);
      mixed[2 * k + 1] = shuffle(row[k], row[k + n / 2], high);
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) row[k] = mixed[k];
  }
}

// --- sums over lanes
// ---------------------------------------------------------------------------------------------------

// Vectors of lanes / group groups each, and the sums of their groups wanted: adds the halves of every group. Where a
// group was, the result holds a's, then b's, of half the size: every lane of one term stays where it is, which costs a
// blend in place of a shuffle.
template <class Real, int group>
inline Vec<Real> add_halves(Vec<Real> a, Vec<Real> b) {
  constexpr int n = lanes<Real>, half = group / 2;
  Vec<typename Integer<sizeof(Real)>::type> lower, other;
#pragma GCC unroll 16
  for (int lane = 0; lane < n; ++lane) {
    lower[lane] = lane % group < half ? -1 : 0;
    other[lane] = lane % group < half ? lane + half : n + lane - half;  // lanes of b count from n on
  }
  return (lower ? a : b) + shuffle(a, b, other);
}

// The same for one vector: its groups move up to fill the first half.
template <class Real, int group>
inline Vec<Real> add_halves(Vec<Real> a) {
  constexpr int n = lanes<Real>, half = group / 2;
  Vec<typename Integer<sizeof(Real)>::type> first, second;
#pragma GCC unroll 16
  for (int lane = 0; lane < n; ++lane) {
    first[lane] = lane / half * group % n + lane % half;
    second[lane] = first[lane] + half;
  }
  return shuffle(a, a, first) + shuffle(a, a, second);
}

// sums[i] = the sum over the lanes of vectors[i], for i < wanted; count and group are how far the sums are.
template <class Real, int wanted, int count = wanted, int group = lanes<Real>>
inline void sum_lanes(Vec<Real>* vectors, Real* sums) {
  constexpr int n = lanes<Real>;
  if constexpr (count > n) {  // a vector holds no more sums than lanes
    sum_lanes<Real, n>(vectors, sums);
    sum_lanes<Real, wanted - n>(vectors + n, sums + n);
  } else if constexpr (group == 1) {
    __builtin_memcpy(sums, vectors, wanted * sizeof(Real));
  } else if constexpr (count == 1) {
    vectors[0] = add_halves<Real, group>(vectors[0]);
    sum_lanes<Real, wanted, 1, group / 2>(vectors, sums);
  } else {
    static_assert(count % 2 == 0, "pairs of vectors");
    constexpr int pairs = count / 2;  // i and i + pairs: in the end the sums are in order
#pragma GCC unroll 8
    for (int i = 0; i < pairs; ++i) vectors[i] = add_halves<Real, group>(vectors[i], vectors[i + pairs]);
    sum_lanes<Real, wanted, pairs, group / 2>(vectors, sums);
  }
}

inline double total(Vec<double> v) {
#if defined(REWRITE_CORE_ISA_avx512)
  v += _mm512_maskz_shuffle_f64x2(0xff, v, v, 0x4e);  // pairs 2, 3, 0, 1; the plain one warns in GCC 12
  v += _mm512_maskz_shuffle_f64x2(0xff, v, v, 0xb1);  // pairs 1, 0, 3, 2
#elif defined(REWRITE_CORE_ISA_avx2)
  v += _mm256_permute2f128_pd(v, v, 1);  // GCC's own choice takes twice as long on AMD's
#endif
  return v[0] + v[1];
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
#endif

}  // namespace rewrite_core
