// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see fit_low_rank_isa.h.
// The mathematics and the names are those of `_reference` in rewrite_core/ops/fit_low_rank.py. One
// difference: the Jacobian m basis + dm lin^T is never formed, its products are expanded.
#include "fit_low_rank_isa.h"

#include <immintrin.h>

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

#if defined(REWRITE_CORE_ISA_avx512)
typedef __m512d Vec;
inline Vec square_root(Vec a) { return _mm512_maskz_sqrt_pd(0xff, a); }  // the plain one warns in GCC 12
#elif defined(REWRITE_CORE_ISA_avx2)
typedef __m256d Vec;
inline Vec square_root(Vec a) { return _mm256_sqrt_pd(a); }
#else
typedef __m128d Vec;
inline Vec square_root(Vec a) { return _mm_sqrt_pd(a); }
#endif
constexpr int lanes = sizeof(Vec) / sizeof(double);

// of both halves: the move that clears one can be encoded in a way that valgrind does not know
inline double square_root(double a) { return _mm_cvtsd_f64(_mm_sqrt_pd(_mm_set1_pd(a))); }
inline Vec fill(double a) { return Vec{} + a; }

// 1 / sqrt(a) for a > 0, to the last bit or two.
inline Vec inverse_root(Vec a) {
#if defined(REWRITE_CORE_ISA_avx512)
  // 14 bits, doubled twice: a third of the time of a root and a division
  Vec y = _mm512_maskz_rsqrt14_pd(0xff, a);
  const Vec half = 0.5 * a;
  y *= 1.5 - half * y * y;
  return y * (1.5 - half * y * y);
#else
  return 1.0 / square_root(a);
#endif
}
inline Vec load(const double* a) { return *reinterpret_cast<const Vec*>(a); }
inline void store(double* a, Vec v) { *reinterpret_cast<Vec*>(a) = v; }
inline Vec magnitude(Vec a) { return a < 0.0 ? -a : a; }
inline double magnitude(double a) { return a < 0.0 ? -a : a; }
inline bool finite(double a) { return a - a == 0.0; }

inline double total(Vec v) {
#if defined(REWRITE_CORE_ISA_avx512)
  v += _mm512_maskz_shuffle_f64x2(0xff, v, v, 0x4e);  // pairs 2, 3, 0, 1; the plain one warns in GCC 12
  v += _mm512_maskz_shuffle_f64x2(0xff, v, v, 0xb1);  // pairs 1, 0, 3, 2
#elif defined(REWRITE_CORE_ISA_avx2)
  v += _mm256_permute2f128_pd(v, v, 1);
#endif
  return v[0] + v[1];
}

inline double dot(const double* a, const double* b, int64_t n) {  // n a whole number of vectors
  Vec sum = {};
  for (int64_t i = 0; i < n; i += lanes) sum += load(a + i) * load(b + i);
  return total(sum);
}

inline Vec places(int64_t first) {  // first, first + 1, ...
  Vec v;
  for (int i = 0; i < lanes; ++i) v[i] = static_cast<double>(first + i);
  return v;
}

inline void copy(const double* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

inline void clear(double* a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] = 0.0;
}

inline void exchange(double*& a, double*& b) {
  double* const c = a;
  a = b;
  b = c;
}

// matrix [n, leading] times x; n <= leading, both padded with zeros.
void multiply(const double* matrix, int64_t leading, int64_t n, const double* x, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(matrix + i * leading, x, leading);
}

// A vector of floats, of a numbers type chosen for the normal equations.
typedef float FloatVec __attribute__((vector_size(sizeof(Vec))));
typedef float HalfVec __attribute__((vector_size(sizeof(Vec) / 2)));
template <class Real>
struct VecOf;
template <>
struct VecOf<double> {
  typedef Vec type;
};
template <>
struct VecOf<float> {
  typedef FloatVec type;
};

inline void store_as(double* a, Vec v) { store(a, v); }
inline void store_as(float* a, Vec v) { *reinterpret_cast<HalfVec*>(a) = __builtin_convertvector(v, HalfVec); }

// out[i * leading + j] += total(sum[i][j]) for rows i and columns j; where there are instructions for it, by adding
// pairs of vectors crosswise instead of each one's lanes.
#if defined(REWRITE_CORE_ISA_avx512)
inline FloatVec add_quarters(FloatVec a, FloatVec b, FloatVec c, FloatVec d) {  // each one's, four lanes apiece
  const FloatVec x = _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x44) + _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xee);
  const FloatVec y = _mm512_maskz_shuffle_f32x4(0xffff, c, d, 0x44) + _mm512_maskz_shuffle_f32x4(0xffff, c, d, 0xee);
  return _mm512_maskz_shuffle_f32x4(0xffff, x, y, 0x88) + _mm512_maskz_shuffle_f32x4(0xffff, x, y, 0xdd);
}

template <int rows, int columns>
inline void add_totals(const FloatVec sum[rows][columns], double* out, int64_t leading) {
  FloatVec part[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if (j < columns) {
      part[j] = add_quarters(sum[0][j], sum[1][j], sum[2][j], rows > 3 ? sum[rows - 1][j] : FloatVec{});
    } else {
      part[j] = FloatVec{};
    }
  }
  const FloatVec x =
      _mm512_maskz_shuffle_ps(0xffff, part[0], part[1], 0x44) + _mm512_maskz_shuffle_ps(0xffff, part[0], part[1], 0xee);
  const FloatVec y =
      _mm512_maskz_shuffle_ps(0xffff, part[2], part[3], 0x44) + _mm512_maskz_shuffle_ps(0xffff, part[2], part[3], 0xee);
  const FloatVec all = _mm512_maskz_shuffle_ps(0xffff, x, y, 0x88) + _mm512_maskz_shuffle_ps(0xffff, x, y, 0xdd);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) out[i * leading + j] += static_cast<double>(all[4 * i + j]);
  }
}

template <int rows, int columns>
inline void add_totals(const Vec sum[rows][columns], double* out, int64_t leading) {
  static_assert(rows <= 4);
  constexpr int last = rows - 1;
  for (int j = 0; j < columns; j += 2) {
    Vec part[2] = {};
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      if (j + k >= columns) continue;
      const Vec a = sum[0][j + k], b = sum[1][j + k], c = sum[2][j + k], d = rows > 3 ? sum[last][j + k] : Vec{};
      const Vec x = _mm512_maskz_shuffle_f64x2(0xff, a, b, 0x44) + _mm512_maskz_shuffle_f64x2(0xff, a, b, 0xee);
      const Vec y = _mm512_maskz_shuffle_f64x2(0xff, c, d, 0x44) + _mm512_maskz_shuffle_f64x2(0xff, c, d, 0xee);
      part[k] = _mm512_maskz_shuffle_f64x2(0xff, x, y, 0x88) + _mm512_maskz_shuffle_f64x2(0xff, x, y, 0xdd);
    }
    const Vec all = _mm512_maskz_unpacklo_pd(0xff, part[0], part[1]) + _mm512_maskz_unpackhi_pd(0xff, part[0], part[1]);
    for (int i = 0; i < rows; ++i) {
      for (int k = 0; k < 2 && j + k < columns; ++k) out[i * leading + j + k] += all[2 * i + k];
    }
  }
}
#else
inline double total(FloatVec v) {
  const HalfVec* halves = reinterpret_cast<const HalfVec*>(&v);
  return total(__builtin_convertvector(halves[0] + halves[1], Vec));
}

template <int rows, int columns, class Wide>
inline void add_totals(const Wide sum[rows][columns], double* out, int64_t leading) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) out[i * leading + j] += total(sum[i][j]);
  }
}
#endif

// One register block of the weighted Gram matrix: out[i, j] += sum_p weighted[i, p] plain[j, p].
template <int block, class Real>
inline void gram_block(const Real* weighted, int64_t weighted_stride, const Real* plain, int64_t plain_stride,
                       int64_t count, double* out, int64_t leading) {
  typedef typename VecOf<Real>::type Wide;
  constexpr int width = sizeof(Wide) / sizeof(Real);
  Wide sum[block][block] = {};
  for (int64_t p = 0; p < count; p += width) {
    Wide column[block];
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) column[j] = *reinterpret_cast<const Wide*>(plain + j * plain_stride + p);
#pragma GCC unroll 4
    for (int i = 0; i < block; ++i) {
      const Wide row = *reinterpret_cast<const Wide*>(weighted + i * weighted_stride + p);
#pragma GCC unroll 4
      for (int j = 0; j < block; ++j) sum[i][j] += row * column[j];
    }
  }
  add_totals<block, block>(sum, out, leading);
}

inline const double* basis_as(const FitEdit& edit, const double*) { return edit.basis; }
inline const float* basis_as(const FitEdit& edit, const float*) { return edit.single; }

// Upper triangle (by blocks) of matrix [unknowns, leading] = sum_p curvature_p basis_p basis_p^T, its products in
// Real. Where they are given also leaning = sum_p curvature_p lin_p basis_p of each style [styles, leading], and
// gradient = sum_p slopes_p basis_p. Where m [styles] is given, curvature and slopes are multiplied by a style's m over
// the first one's, squared and not.
template <int block, class Real>
void gram_of(const FitEdit& edit, int64_t styles, int64_t unknowns, const double* m, const double* curvature,
             const double* lin, const double* slopes, double* matrix, double* leaning, double* gradient,
             Real* weighted) {
  constexpr int64_t width = sizeof(Vec) / sizeof(Real);
  const int64_t rows = (unknowns + block - 1) / block * block;
  const Real* const plains = basis_as(edit, static_cast<const Real*>(nullptr));
  const int64_t plain_stride = sizeof(Real) == sizeof(double) ? edit.stride : edit.single_stride;
  clear(matrix, rows * edit.leading);
  if (gradient) {
    clear(leaning, styles * edit.leading);
    clear(gradient, rows);
  }
  for (int64_t style = 0; style < styles; ++style) {
    const double ratio = m ? m[style] / m[0] : 1.0;
    const int64_t end = edit.starts[style + 1];
    for (int64_t start = edit.starts[style]; start < end; start += fit_panel) {
      const int64_t count = end - start < fit_panel ? end - start : fit_panel;
      const int64_t whole = (count + width - 1) / width * width;
      const double* basis = edit.basis + start;
      for (int64_t j = 0; j < rows; j += block) {
        Vec leans[block][1] = {}, turns[block][1] = {};
        for (int64_t p = 0; p < count; p += lanes) {
          const Vec scale = ratio * ratio * load(curvature + start + p);
          const Vec along = gradient ? load(lin + start + p) : Vec{};
          const Vec slope = gradient ? ratio * load(slopes + start + p) : Vec{};
#pragma GCC unroll 4
          for (int i = 0; i < block; ++i) {
            const Vec plain = load(basis + (j + i) * edit.stride + p), row = plain * scale;
            store_as(weighted + (j + i) * fit_panel + p, row);
            leans[i][0] += row * along;
            turns[i][0] += plain * slope;
          }
        }
        if (whole > count) {
          for (int i = 0; i < block; ++i) store_as(weighted + (j + i) * fit_panel + count, Vec{});
        }
        if (!gradient) continue;
        add_totals<block, 1>(leans, leaning + style * edit.leading + j, 1);
        add_totals<block, 1>(turns, gradient + j, 1);
      }
      for (int64_t i = 0; i < rows; i += block) {
        for (int64_t j = i; j < rows; j += block) {
          gram_block<block>(weighted + i * fit_panel, fit_panel, plains + start + j * plain_stride, plain_stride, whole,
                            matrix + i * edit.leading + j, edit.leading);
        }
      }
    }
  }
}

template <class Real>
void gram(const FitEdit& edit, int64_t styles, int64_t unknowns, const double* m, const double* curvature,
          const double* lin, const double* slopes, double* matrix, double* leaning, double* gradient,
          double* weighted) {
  Real* const panel = reinterpret_cast<Real*>(weighted);
#if defined(REWRITE_CORE_ISA_avx512)
  if (unknowns > 12) {
    return gram_of<4>(edit, styles, unknowns, m, curvature, lin, slopes, matrix, leaning, gradient, panel);
  }
#endif
  gram_of<3>(edit, styles, unknowns, m, curvature, lin, slopes, matrix, leaning, gradient, panel);
}

// out[i] -= sum_k scales[k][i] others[k] for up to four rows i, `width` vectors of each.
template <int width>
inline void take_rows(const double* others, const double* scales, int64_t count, int64_t rows, int64_t leading,
                      double* out) {
  Vec rest[4][width];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < width; ++j) rest[i][j] = i < rows ? load(out + i * leading + j * lanes) : Vec{};
  }
  for (int64_t k = 0; k < count; ++k) {
    Vec row[width];
#pragma GCC unroll 2
    for (int j = 0; j < width; ++j) row[j] = load(others + k * leading + j * lanes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < width; ++j) rest[i][j] -= scales[k * 4 + i] * row[j];
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < width; ++j) store(out + i * leading + j * lanes, rest[i][j]);
  }
}

// factor = U, upper, with U^T D^-1 U = matrix + shift I and D the diagonal of U, which is stored inverted.
// Where `right` is given, its forward substitution rides along in column n. False where a pivot is not above
// `least`. Four rows at a time: what the rows above take from them stays in registers, and every load of those
// serves all four.
bool factorise(const double* matrix, int64_t n, int64_t leading, double shift, double least, const double* right,
               double* factor) {
  typedef double Four __attribute__((vector_size(32), aligned(8)));
  constexpr int64_t block = 4, chunk = 64;
  double scales[chunk * block];
  for (int64_t start = 0; start < n; start += block) {
    const int64_t rows = n - start < block ? n - start : block, first = start & ~int64_t{lanes - 1};
    // in whole vectors: a number stored by itself would hold up the loads of its vector
    for (int64_t i = start; i < start + rows; ++i) {
      double* row = factor + i * leading;
      const double* from = matrix + i * leading;
      Vec column = places(first);
      const double here = static_cast<double>(i), last = static_cast<double>(n);
      for (int64_t j = first; j < leading; j += lanes, column += static_cast<double>(lanes)) {
        Vec v = load(from + j);
        v = column == here ? v + shift : v;
        if (right) v = column == last ? fill(right[i]) : v;
        store(row + j, v);
      }
    }
    double* const mine = factor + start * leading;
    for (int64_t above = 0; above < start; above += chunk) {
      const int64_t count = start - above < chunk ? start - above : chunk;
      for (int64_t k = 0; k < count; ++k) {
        const double* row = factor + (above + k) * leading;
        *reinterpret_cast<Four*>(scales + k * block) = *reinterpret_cast<const Four*>(row + start) * row[above + k];
      }
      const double* const others = factor + above * leading;
      int64_t j = first;
      for (; j + lanes < leading; j += 2 * lanes) take_rows<2>(others + j, scales, count, rows, leading, mine + j);
      if (j < leading) take_rows<1>(others + j, scales, count, rows, leading, mine + j);
    }
    for (int64_t k = 0; k < rows; ++k) {
      double* const row = mine + k * leading;
      const double pivot = row[start + k];
      if (!(pivot > least) || !finite(pivot)) return false;
      const double inverse = 1.0 / pivot;
      for (int64_t i = k + 1; i < rows; ++i) {
        const double scale = row[start + i] * inverse;
        double* const other = mine + i * leading;
        for (int64_t j = first; j < leading; j += lanes) store(other + j, load(other + j) - scale * load(row + j));
      }
    }
    for (int64_t k = start; k < start + rows; ++k) {
      double* const row = factor + k * leading;
      const double inverse = 1.0 / row[k], here = static_cast<double>(k);
      for (int64_t j = first; j <= k; j += lanes) {  // leftovers of the other triangle go
        const Vec column = places(j);
        store(row + j, column < here ? Vec{} : column == here ? fill(inverse) : load(row + j));
      }
    }
  }
  return true;
}

// The same substitution for a right-hand side of its own, in place; x is padded to `leading`.
void substitute(const double* factor, int64_t n, int64_t leading, double* x) {
  for (int64_t k = 0; k < n; ++k) {
    const double* row = factor + k * leading;
    const double value = x[k], scale = value * row[k];
    for (int64_t j = k & ~int64_t{lanes - 1}; j < leading; j += lanes) {
      store(x + j, load(x + j) - scale * load(row + j));
    }
    x[k] = value;
  }
}

// x [leading] = -(matrix + shift I)^-1 right, for a `right` substituted already; its entries are `step`
// apart. A vector's worth of unknowns at a time: their sums over the unknowns after them do not wait for each other.
void solve_negative(const double* factor, int64_t n, int64_t leading, const double* right, int64_t step, double* x) {
  clear(x, leading);
  for (int64_t first = (n - 1) & ~int64_t{lanes - 1}; first >= 0; first -= lanes) {
    const int64_t count = n - first < lanes ? n - first : lanes, after = first + lanes;
    double part[lanes];
    for (int64_t k = 0; k < count; ++k) {
      part[k] = right[(first + k) * step] + dot(factor + (first + k) * leading + after, x + after, leading - after);
    }
    for (int64_t k = count - 1; k >= 0; --k) {
      const double value = -part[k] * factor[(first + k) * leading + first + k];
      part[k] = value;
      for (int64_t i = 0; i < k; ++i) part[i] += factor[(first + i) * leading + first + k] * value;
    }
    for (int64_t k = 0; k < count; ++k) x[first + k] = part[k];
  }
}

// Value, residual and derivatives of one channel; float64, unknowns scaled.
struct Model {
  const FitProblem& problem;
  const FitEdit& edit;
  const FitScratch& scratch;
  int64_t channel;
  double scale = 0.0;  // penalty_scale

  int64_t place(int64_t style) const { return (edit.number * problem.styles + style) * problem.channels + channel; }

  // lin [pixels]; m [styles]; dm [styles, unknowns], nothing without demodulation. Returns x^T quadratic x over its
  // largest allowed value, of the style where that is most; 0 without demodulation.
  double linearise(const double* x, double* lin, double* m, double* dm) const {
    const int64_t unknowns = problem.unknowns, stride = edit.stride;
    int64_t p = 0;
    for (; p + 4 * lanes <= stride; p += 4 * lanes) {
      const double* at = scratch.base + p;
      Vec a = load(at), b = load(at + lanes), c = load(at + 2 * lanes), d = load(at + 3 * lanes);
      for (int64_t j = 0; j < unknowns; ++j) {
        const double* row = edit.basis + j * stride + p;
        a += x[j] * load(row);
        b += x[j] * load(row + lanes);
        c += x[j] * load(row + 2 * lanes);
        d += x[j] * load(row + 3 * lanes);
      }
      store(lin + p, a);
      store(lin + p + lanes, b);
      store(lin + p + 2 * lanes, c);
      store(lin + p + 3 * lanes, d);
    }
    for (; p < stride; p += lanes) {
      Vec a = load(scratch.base + p);
      for (int64_t j = 0; j < unknowns; ++j) a += x[j] * load(edit.basis + j * stride + p);
      store(lin + p, a);
    }
    if (!problem.constant) {
      m[0] = 1.0;
      return 0.0;
    }
    double reach = 0.0;
    for (int64_t style = 0; style < problem.styles; ++style, dm += edit.leading) {
      const double constant = problem.constant[place(style)];
      const double* linear = problem.linear + place(style) * unknowns;
      double square = constant, own = 0.0;
      multiply(edit.quadratic + style * unknowns * edit.leading, edit.leading, unknowns, x, dm);
      for (int64_t j = 0; j < unknowns; ++j) {
        const double slant = linear[j] / edit.size[j];
        own += x[j] * dm[j];
        dm[j] += slant;  // half the gradient of the squared norm
        square += (slant + dm[j]) * x[j];
      }
      m[style] = 1.0 / square_root(square);  // NaN or infinite where not positive: rejected
      const double factor = -m[style] * m[style] * m[style];
      for (int64_t j = 0; j < unknowns; ++j) dm[j] *= factor;
      own /= fit_reach * fit_reach * constant;
      if (own > reach) reach = own;
    }
    return reach;
  }

  double penalised(const double* x) const {
    if (!edit.penalty) return 0.0;
    double sum = 0.0;
    for (int64_t j = 0; j < problem.unknowns; ++j) {
      sum += x[j] * dot(edit.penalty + j * edit.leading, x, edit.leading);
    }
    return scale * sum;
  }
};

struct Objectives {
  double smooth;  // with the rounded kink and, for l1, the rounded absolute value
  double data;    // the loss itself
};

template <bool absolute, bool rounded>
Objectives objectives(const Model& model, const double* lin, const double* m, double smoothing) {
  const FitScratch& scratch = model.scratch;
  const double slope = model.problem.slope, gain = model.problem.gain;
  const double kink = rounded ? fit_kink / magnitude(gain) * smoothing : 0.0;
  const double up = 0.5 * gain * (1.0 + slope), down = 0.5 * gain * (1.0 - slope);
  Vec smooth = {}, data = {};
  for (int64_t style = 0; style < model.problem.styles; ++style) {
    const double by = m[style];
    for (int64_t p = model.edit.starts[style]; p < model.edit.starts[style + 1]; p += lanes) {
      const Vec pre = by * load(lin + p) + load(scratch.shift + p);
      const Vec target = load(scratch.target + p), weight = load(model.edit.weights + p);
      Vec sharp, r;
      if (rounded) {
        const Vec steep = pre > 0.0 ? fill(gain) : fill(gain * slope);
        sharp = steep * pre - target;
        const Vec square = pre * pre + kink * kink;
        r = up * pre + down * (square * inverse_root(square)) - target;
      } else {
        r = sharp = gain * pre - target;
      }
      if (absolute) {
        const Vec square = r * r + smoothing * smoothing;
        smooth += weight * (square * inverse_root(square));
        data += weight * magnitude(sharp);
      } else {
        smooth += weight * (r * r);
        data += weight * (sharp * sharp);
      }
    }
  }
  return {total(smooth), total(data)};
}

// At the current point: r, inverse (1 / eta), steep, slopes, curvature. Returns the smooth objective.
template <bool absolute, bool rounded>
double derive(const Model& model, const double* lin, const double* m, double smoothing) {
  const FitScratch& scratch = model.scratch;
  const double slope = model.problem.slope, gain = model.problem.gain;
  const double kink = rounded ? fit_kink / magnitude(gain) * smoothing : 0.0;
  const double up = 0.5 * gain * (1.0 + slope), down = 0.5 * gain * (1.0 - slope);
  Vec smooth = {};
  for (int64_t style = 0; style < model.problem.styles; ++style) {
    const double by = m[style];
    for (int64_t p = model.edit.starts[style]; p < model.edit.starts[style + 1]; p += lanes) {
      const Vec pre = by * load(lin + p) + load(scratch.shift + p);
      const Vec target = load(scratch.target + p), weight = load(model.edit.weights + p);
      Vec r, steep, bend = {};
      if (rounded) {
        const Vec square = pre * pre + kink * kink, flat = inverse_root(square);
        const Vec sine = pre * flat;
        r = up * pre + down * (square * flat) - target;
        steep = up + down * sine;
        bend = (down * kink * kink) * (flat * flat * flat);
      } else {
        r = gain * pre - target;
        steep = fill(gain);
      }
      Vec slopes, curvature;
      if (absolute) {
        const Vec square = r * r + smoothing * smoothing, inverse = inverse_root(square);
        const Vec ratio = r * inverse;
        smooth += weight * (square * inverse);
        slopes = weight * ratio;
        curvature = weight * (1.0 - load(scratch.dual + p) * ratio) * inverse;
        store(scratch.inverse + p, inverse);
      } else {
        smooth += weight * (r * r);
        slopes = 2.0 * weight * r;
        curvature = 2.0 * weight;
      }
      curvature *= steep * steep;
      if (rounded) {  // the kink bends the value: the half of its curvature that is convex
        const Vec more = slopes * bend;
        curvature += more > 0.0 ? more : Vec{};
      }
      store(scratch.r + p, r);
      store(scratch.steep + p, steep);
      store(scratch.slopes + p, slopes * steep);
      store(scratch.curvature + p, curvature);
    }
  }
  return total(smooth);
}

// The running estimate of r / eta moves with the step that was taken.
void follow(const Model& model, const double* lin, const double* new_lin, const double* m, const double* dm) {
  const FitScratch& scratch = model.scratch;
  for (int64_t style = 0; style < model.problem.styles; ++style) {
    const int64_t leading = model.edit.leading;
    const double by = m[style], turn = model.problem.constant ? dot(dm + style * leading, scratch.step, leading) : 0.0;
    for (int64_t p = model.edit.starts[style]; p < model.edit.starts[style + 1]; p += lanes) {
      const Vec old = load(lin + p), r = load(scratch.r + p), inverse = load(scratch.inverse + p);
      const Vec change = (by * (load(new_lin + p) - old) + turn * old) * load(scratch.steep + p);
      Vec dual = load(scratch.dual + p);
      dual = (r + change - dual * (r * inverse) * change) * inverse;
      dual = dual > 1.0 ? fill(1.0) : dual;
      store(scratch.dual + p, dual < -1.0 ? fill(-1.0) : dual);
    }
  }
}

// matrix, gradient and their mean curvature at the current point. With the Jacobian's rows [unknowns, pixels],
//   rows_jp = m basis_jp + dm_j lin_p, m and dm those of pixel p's style,
// and c the curvature the matrix is rows diag(c) rows^T + 2 scale penalty. In dual form (fewer pixels than unknowns, no
// penalty) it is over pixels, S rows^T rows S with S = sqrt(diag(c)), and
//   step = -rows S (S rows^T rows S + mu I)^-1 S^-1 slopes, gradient = rows slopes;
// (rows^T rows)_ip = m m' gram_ip + m' lin_i turned_p + (m turned'_i + dm.dm' lin_i) lin_p, with gram = basis^T basis
// and turned = basis^T dm, what has a prime being of p's style and the rest of i's.
double assemble(const Model& model, const double* lin, const double* m, const double* x, const double* dm) {
  const FitEdit& edit = model.edit;
  const FitScratch& scratch = model.scratch;
  const int64_t unknowns = model.problem.unknowns, stride = edit.stride, leading = edit.leading;
  const int64_t styles = model.problem.styles;
  const int64_t* const starts = edit.starts;
  const bool demodulated = model.problem.constant != nullptr;
  double* const matrix = scratch.matrix;
  double* const gradient = scratch.gradient;
  double trace = 0.0;
  if (edit.dual_form) {
    double* const turned = scratch.turned;  // basis^T dm of each style
    for (int64_t style = 0; style < styles; ++style) {
      const int64_t start = starts[style], count = starts[style + 1] - start;
      const double by = m[style] / m[0];
      for (int64_t j = 0; j < unknowns; ++j) {
        const double part = by * dot(edit.basis + j * stride + start, scratch.slopes + start, count);
        gradient[j] = style == 0 ? part : gradient[j] + part;
      }
      if (!demodulated) continue;
      double* const own = turned + style * stride;
      clear(own, stride);
      for (int64_t j = 0; j < unknowns; ++j) {
        const double along = dm[style * leading + j];
        for (int64_t p = 0; p < stride; p += lanes) {
          store(own + p, load(own + p) + along * load(edit.basis + j * stride + p));
        }
      }
    }
    double* const root = scratch.root;
    for (int64_t p = 0; p < stride; p += lanes) store(root + p, square_root(load(scratch.curvature + p)));
    for (int64_t mine = 0; mine < styles; ++mine) {
      const int64_t last = starts[mine + 1] < edit.order ? starts[mine + 1] : edit.order;
      for (int64_t other = mine; other < styles; ++other) {
        const double product = demodulated ? dot(dm + mine * leading, dm + other * leading, leading) : 0.0;
        const double* const own = turned + mine * stride;
        for (int64_t i = starts[mine]; i < last; ++i) {
          double* row = matrix + i * edit.order_leading;
          const double* gram_row = edit.gram + i * edit.order_leading;
          const double by_basis = m[mine] * m[other] * root[i];
          const double by_turned = demodulated ? m[other] * root[i] * lin[i] : 0.0;
          const double by_lin = demodulated ? root[i] * (m[mine] * turned[other * stride + i] + product * lin[i]) : 0.0;
          const int64_t first = i & ~int64_t{lanes - 1};
          for (int64_t p = first > starts[other] ? first : starts[other]; p < starts[other + 1]; p += lanes) {
            Vec sum = by_basis * load(gram_row + p);
            if (demodulated) sum += by_turned * load(own + p) + by_lin * load(lin + p);
            store(row + p, sum * load(root + p));
          }
          if (other == mine) trace += row[i];
        }
      }
    }
  } else {
    double* const leaning = scratch.half;
    (edit.single ? gram<float> : gram<double>)(edit, styles, unknowns, m, scratch.curvature, lin, scratch.slopes,
                                               matrix, leaning, gradient, scratch.weighted);
    const double square = m[0] * m[0];
    for (int64_t i = 0; demodulated && i < unknowns; ++i) {
      double* row = matrix + i * leading;
      for (int64_t j = i; j < unknowns; ++j) row[j] *= square;
    }
    for (int64_t style = 0; demodulated && style < styles; ++style) {
      for (int64_t p = starts[style]; p < starts[style + 1]; p += lanes) {
        store(scratch.spare + p, load(scratch.curvature + p) * load(lin + p));
      }
      const double bent = dot(scratch.spare + starts[style], lin + starts[style], starts[style + 1] - starts[style]);
      const double ratio = m[style] / m[0], by = m[style] / (ratio * ratio);
      const double *lean = leaning + style * leading, *own = dm + style * leading;
      for (int64_t i = 0; i < unknowns; ++i) {
        double* row = matrix + i * leading;
        const double by_leaning = by * own[i], by_dm = by * lean[i] + bent * own[i];
        for (int64_t j = i; j < unknowns; ++j) row[j] += by_leaning * lean[j] + by_dm * own[j];
      }
    }
    for (int64_t i = 0; i < unknowns; ++i) {
      double* row = matrix + i * leading;
      if (edit.penalty) {
        const double* penalty = edit.penalty + i * leading;
        for (int64_t j = i; j < unknowns; ++j) row[j] += 2.0 * model.scale * penalty[j];
      }
      trace += row[i];
    }
  }
  for (int64_t j = 0; j < unknowns; ++j) gradient[j] *= m[0];
  for (int64_t style = 0; demodulated && style < styles; ++style) {
    const int64_t start = starts[style];
    const double along = dot(scratch.slopes + start, lin + start, starts[style + 1] - start);
    for (int64_t j = 0; j < unknowns; ++j) gradient[j] += along * dm[style * leading + j];
  }
  for (int64_t j = 0; edit.penalty && j < unknowns; ++j) {
    gradient[j] += 2.0 * model.scale * dot(edit.penalty + j * leading, x, leading);
  }
  return trace / static_cast<double>(unknowns);
}

// scratch.step; false where the damped matrix does not factor.
bool damped_step(const Model& model, const double* lin, const double* m, const double* dm, double mu) {
  const FitEdit& edit = model.edit;
  const FitScratch& scratch = model.scratch;
  const int64_t unknowns = model.problem.unknowns, stride = edit.stride;
  double* const step = scratch.step;
  if (!edit.dual_form) {
    if (!factorise(scratch.matrix, unknowns, edit.leading, mu, 0.0, scratch.gradient, scratch.factor)) {
      return false;
    }
    solve_negative(scratch.factor, unknowns, edit.leading, scratch.factor + unknowns, edit.leading, step);
  } else {
    double* const y = scratch.spare;
    for (int64_t p = 0; p < stride; ++p) {
      y[p] = scratch.root[p] > 0.0 ? scratch.slopes[p] / scratch.root[p] : 0.0;
    }
    if (!factorise(scratch.matrix, edit.order, edit.order_leading, mu, 0.0, y, scratch.factor)) return false;
    solve_negative(scratch.factor, edit.order, edit.order_leading, scratch.factor + edit.order, edit.order_leading, y);
    for (int64_t p = 0; p < stride; ++p) y[p] *= scratch.root[p];
    clear(step, edit.leading);
    for (int64_t style = 0; style < model.problem.styles; ++style) {
      const int64_t start = edit.starts[style], count = edit.starts[style + 1] - start;
      const double along = model.problem.constant ? dot(y + start, lin + start, count) : 0.0;
      const double* const own = dm + style * edit.leading;
      for (int64_t j = 0; j < unknowns; ++j) {
        step[j] += m[style] * dot(edit.basis + j * stride + start, y + start, count);
        if (model.problem.constant) step[j] += along * own[j];
      }
    }
  }
  for (int64_t j = 0; j < unknowns; ++j) {
    if (!finite(step[j])) return false;
  }
  return true;
}

struct Outcome {
  double loss, initial;
  int32_t iterations, status;
};

// Levenberg-Marquardt; the result is in scratch.best_x.
template <bool absolute, bool rounded>
Outcome fit_channel(const Model& model) {
  const FitProblem& problem = model.problem;
  const FitEdit& edit = model.edit;
  const FitScratch& scratch = model.scratch;
  const int64_t unknowns = problem.unknowns, stride = edit.stride, leading = edit.leading;
  double *x = scratch.x, *new_x = scratch.new_x, *lin = scratch.lin, *new_lin = scratch.new_lin;
  double *m = scratch.m, *new_m = scratch.new_m, *dm = scratch.dm, *new_dm = scratch.new_dm;
  clear(x, leading);
  clear(new_x, leading);
  clear(scratch.best_x, leading);
  clear(scratch.step, leading);
  clear(scratch.gradient, leading);
  clear(dm, problem.styles * leading);
  clear(new_dm, problem.styles * leading);
  clear(scratch.dual, stride);

  model.linearise(x, lin, m, dm);
  double level = 0.0;
  for (int64_t p = 0; p < stride; ++p) level += edit.weights[p] * magnitude(scratch.target[p]);
  const double initial = objectives<absolute, rounded>(model, lin, m, 0.0).data;
  Outcome result{initial, initial, 0, fit_max_iterations};
  double best = initial, best_reach = 0.0;
  const double scale = absolute ? initial : square_root(initial);
  if (!finite(initial) || !finite(level)) {
    result.status = fit_nonfinite;
    return result;
  }
  if (edit.pixels == 0 || !(scale > 1e-15 * level) || problem.gain == 0.0) {
    result.status = edit.pixels > 0 && !(scale > 1e-15 * level) ? fit_zero_residual : fit_degenerate;
    return result;
  }

  const double smoothing_end = fit_smoothing_end * scale;
  double smoothing = absolute || rounded ? scale : smoothing_end;
  double damping = fit_damping_start, growth = fit_damping_up;
  double now = 0.0, mean = 0.0;
  bool moved = true;
  while (result.iterations < problem.max_iterations) {
    if (moved) {
      now = derive<absolute, rounded>(model, lin, m, smoothing) + model.penalised(x);
      mean = assemble(model, lin, m, x, dm);
      if (!finite(mean) || !finite(now)) {
        result.status = fit_nonfinite;
        break;
      }
      if (mean == 0.0) {  // nothing bends: no coefficient matters here
        result.status = result.iterations == 0 ? fit_degenerate : fit_converged;
        break;
      }
    }
    ++result.iterations;
    const double mu = damping * mean;
    const bool good = damped_step(model, lin, m, dm, mu);
    bool taken = false;
    double fresh = 0.0, predicted = 0.0;
    Objectives trial{};
    if (good) {
      double along = 0.0, square = 0.0;
      for (int64_t j = 0; j < unknowns; ++j) {
        along += scratch.gradient[j] * scratch.step[j];
        square += scratch.step[j] * scratch.step[j];
        new_x[j] = x[j] + scratch.step[j];
      }
      predicted = 0.5 * (mu * square - along);
      double reach = model.linearise(new_x, new_lin, new_m, new_dm);
      if (reach > 1.0) {  // back to where W0 still counts
        const double shorten = 1.0 / square_root(reach);
        for (int64_t j = 0; j < unknowns; ++j) {
          new_x[j] *= shorten;
          scratch.step[j] = new_x[j] - x[j];
        }
        reach = model.linearise(new_x, new_lin, new_m, new_dm);
      }
      trial = objectives<absolute, rounded>(model, new_lin, new_m, smoothing);
      const double extra = model.penalised(new_x);
      fresh = trial.smooth + extra;
      taken = fresh < now;  // false for NaN
      if (taken && trial.data + extra < best) {
        best = trial.data + extra;
        best_reach = reach;
        result.loss = trial.data;
        copy(new_x, scratch.best_x, unknowns);
      }
    }
    const bool at_end = smoothing <= smoothing_end;
    bool stalled = false, small = false, well = false;
    if (taken) {
      const double drop = now - fresh, quality = drop / predicted;
      if (absolute) follow(model, lin, new_lin, m, dm);
      exchange(x, new_x);
      exchange(lin, new_lin);
      exchange(dm, new_dm);
      exchange(m, new_m);
      well = quality > fit_good;
      damping *= well ? fit_damping_down : quality > fit_poor ? 1.0 : 2.0;
      growth = fit_damping_up;
      small = drop <= problem.tolerance * now || (!absolute && fresh <= 1e-20 * scale * scale);
    } else {
      stalled = damping > fit_damping_stall || (good && predicted <= 1e-12 * now);
      damping = stalled ? fit_damping_start : damping * growth;
      growth *= 2.0;
    }
    if (damping < fit_damping_min) damping = fit_damping_min;
    if (at_end && (small || stalled)) {
      result.status = fit_converged;
      break;
    }
    moved = taken || stalled;
    if (moved) {
      const bool slow = smoothing > fit_smoothing_slow * scale;
      smoothing *= slow ? (well ? problem.slow_rate_well : problem.slow_rate)
                        : (well ? problem.fast_rate_well : fit_smoothing_rate);
      if (smoothing < smoothing_end) smoothing = smoothing_end;
    }
  }
  if (result.status != fit_nonfinite && best_reach > fit_reached) result.status = fit_bounded;
  return result;
}

// The factor of gram + scale * penalty, with no diagonal shift or the smallest that is enough.
int factor_exact(const FitProblem& problem, const FitEdit& edit, double scale, double* matrix, double* factor) {
  const int64_t unknowns = problem.unknowns, leading = edit.leading;
  double size = 0.0;
  for (int64_t i = 0; i < unknowns; ++i) {
    const double* gram_row = edit.gram + i * leading;
    const double* penalty = edit.penalty ? edit.penalty + i * leading : nullptr;
    double* row = matrix + i * leading;
    for (int64_t j = 0; j < leading; ++j) row[j] = gram_row[j] + (penalty ? scale * penalty[j] : 0.0);
    if (!finite(row[i])) return fit_nonfinite;
    if (row[i] > size) size = row[i];
  }
  if (size == 0.0) return fit_degenerate;
  const double least = 0.5 * fit_pivot * size;
  if (factorise(matrix, unknowns, leading, 0.0, least, nullptr, factor)) return fit_converged;
  double shift = fit_pivot * size;
  for (int i = 0; i < 12; ++i, shift *= 10.0) {
    if (factorise(matrix, unknowns, leading, shift, least, nullptr, factor)) return fit_shifted;
  }
  return fit_nonfinite;
}

// The linear l2 problem; the result is in scratch.best_x.
Outcome fit_exactly(const Model& model) {
  const FitProblem& problem = model.problem;
  const FitEdit& edit = model.edit;
  const FitScratch& scratch = model.scratch;
  const int64_t unknowns = problem.unknowns, stride = edit.stride, leading = edit.leading;
  const double gain = problem.gain;
  double *x = scratch.x, *rest = scratch.step, *right = scratch.gradient;
  clear(x, leading);
  clear(rest, leading);
  clear(right, leading);
  clear(scratch.best_x, leading);
  scratch.m[0] = 1.0;
  const double initial = objectives<false, false>(model, scratch.base, scratch.m, 0.0).data;
  Outcome result{initial, initial, 1, fit_converged};
  double level = 0.0;
  for (int64_t p = 0; p < stride; ++p) level += edit.weights[p] * magnitude(scratch.target[p]);
  if (!finite(initial) || !finite(level)) {
    result.status = fit_nonfinite;
    return result;
  }
  if (edit.pixels > 0 && !(square_root(initial) > 1e-15 * level)) {
    result.status = fit_zero_residual;
    return result;
  }
  const double* factor = edit.factor;
  result.status = edit.factor_status;
  if (edit.penalty && model.scale != edit.factor_scale) {
    result.status = factor_exact(problem, edit, model.scale, scratch.matrix, scratch.factor);
    factor = scratch.factor;
  }
  if (edit.pixels == 0 || gain == 0.0) result.status = fit_degenerate;
  if (result.status == fit_degenerate || result.status == fit_nonfinite) return result;

  for (int64_t p = 0; p < stride; ++p) {
    const double wanted = scratch.target[p] - gain * (scratch.base[p] + scratch.shift[p]);
    scratch.slopes[p] = gain * edit.weights[p] * wanted;
  }
  for (int64_t j = 0; j < unknowns; ++j) right[j] = dot(edit.basis + j * stride, scratch.slopes, stride);
  for (int round = 0; round < 3; ++round) {  // each time the shift's error shrinks by shift / eigenvalue
    for (int64_t j = 0; j < unknowns; ++j) {
      rest[j] = right[j] - dot(edit.gram + j * leading, x, leading);
      if (edit.penalty) rest[j] -= model.scale * dot(edit.penalty + j * leading, x, leading);
    }
    substitute(factor, unknowns, leading, rest);
    solve_negative(factor, unknowns, leading, rest, 1, scratch.half);
    for (int64_t j = 0; j < unknowns; ++j) x[j] -= scratch.half[j];
  }
  model.linearise(x, scratch.lin, scratch.m, scratch.dm);
  const double data = objectives<false, false>(model, scratch.lin, scratch.m, 0.0).data;
  if (data + model.penalised(x) < initial) {  // false for NaN
    result.loss = data;
    copy(x, scratch.best_x, unknowns);
  }
  return result;
}

template <class Real>
void gather(const FitEdit& edit, const Real* row, int64_t pixel_stride, double* out) {
  for (int64_t p = 0; p < edit.stride; ++p) {
    out[p] = edit.kept[p] < 0 ? 0.0 : static_cast<double>(row[edit.kept[p] * pixel_stride]);
  }
}

template <class Real>
void prepare_of(const FitProblem& problem, FitEdit& edit, const FitScratch& scratch) {
  const int64_t unknowns = problem.unknowns, stride = edit.stride, leading = edit.leading;
  for (int64_t j = 0; j < edit.rows; ++j) {
    double* row = edit.basis + j * stride;
    if (j >= unknowns) {
      clear(row, stride);
      continue;
    }
    gather(edit, static_cast<const Real*>(problem.basis) + (edit.number * unknowns + j) * problem.pixels, 1, row);
    double square = 0.0;
    for (int64_t p = 0; p < stride; ++p) square += edit.weights[p] * row[p] * row[p];
    edit.size[j] = square > 0.0 ? square_root(square) : 1.0;
    for (int64_t p = 0; p < stride; ++p) row[p] /= edit.size[j];
  }
  if (edit.single) {
    for (int64_t j = 0; j < edit.rows; ++j) {
      float* row = edit.single + j * edit.single_stride;
      for (int64_t p = 0; p < edit.single_stride; ++p) {
        row[p] = p < stride ? static_cast<float>(edit.basis[j * stride + p]) : 0.0f;
      }
    }
  }
  const auto scaled = [&](const double* matrix, double* out) {
    clear(out, unknowns * leading);
    for (int64_t i = 0; i < unknowns; ++i) {
      for (int64_t j = 0; j < unknowns; ++j) {
        out[i * leading + j] = matrix[i * unknowns + j] / edit.size[i] / edit.size[j];
      }
    }
  };
  const int64_t square = unknowns * unknowns;
  for (int64_t style = 0; edit.quadratic && style < problem.styles; ++style) {
    const int64_t place = edit.number * problem.styles + style;
    scaled(problem.quadratic + place * square, edit.quadratic + style * unknowns * leading);
  }
  if (edit.penalty) scaled(problem.penalty + edit.number * square, edit.penalty);
  if (edit.dual_form) {
    for (int64_t i = 0; i < edit.order; ++i) {
      double* row = edit.gram + i * edit.order_leading;
      clear(row, stride);
      for (int64_t j = 0; j < unknowns; ++j) {
        const double* map = edit.basis + j * stride;
        for (int64_t p = 0; p < stride; p += lanes) store(row + p, load(row + p) + map[i] * load(map + p));
      }
    }
  }
  if (edit.exact) {
    for (int64_t p = 0; p < stride; ++p) scratch.curvature[p] = problem.gain * problem.gain * edit.weights[p];
    gram<double>(edit, problem.styles, unknowns, nullptr, scratch.curvature, nullptr, nullptr, edit.gram, nullptr,
                 nullptr, scratch.weighted);
    for (int64_t i = 0; i < unknowns; ++i) {
      for (int64_t j = 0; j < i; ++j) edit.gram[i * leading + j] = edit.gram[j * leading + i];
    }
    edit.factor_scale = problem.penalty ? problem.penalty_scale[edit.number * problem.channels] : 0.0;
    edit.factor_status = factor_exact(problem, edit, edit.factor_scale, scratch.matrix, edit.factor);
  }
}

template <class Real>
void fit_of(const FitProblem& problem, const FitEdit& edit, int64_t channel, const FitScratch& scratch) {
  const int64_t unknowns = problem.unknowns, at = edit.number * problem.channels + channel;
  Model model{problem, edit, scratch, channel};
  gather(edit, static_cast<const Real*>(problem.base) + at * problem.pixels, 1, scratch.base);
  gather(edit, static_cast<const Real*>(problem.target) + at * problem.pixels, 1, scratch.target);
  if (problem.shift) {
    const int64_t* strides = problem.shift_strides;
    gather(edit, static_cast<const Real*>(problem.shift) + edit.number * strides[0] + channel * strides[1], strides[2],
           scratch.shift);
  } else {
    clear(scratch.shift, edit.stride);
  }
  if (problem.penalty) model.scale = problem.penalty_scale[at];

  const bool rounded = problem.slope != 1.0;
  Outcome result = edit.exact         ? fit_exactly(model)
                   : problem.absolute ? (rounded ? fit_channel<true, true>(model) : fit_channel<true, false>(model))
                                      : (rounded ? fit_channel<false, true>(model) : fit_channel<false, false>(model));
  Real* coefficients = static_cast<Real*>(problem.coefficients) + at * unknowns;
  bool fits = true;  // in the output's type
  for (int64_t j = 0; j < unknowns; ++j) {
    coefficients[j] = static_cast<Real>(scratch.best_x[j] / edit.size[j]);
    fits = fits && finite(static_cast<double>(coefficients[j]));
  }
  if (!fits) {
    for (int64_t j = 0; j < unknowns; ++j) coefficients[j] = Real(0);
    result.loss = result.initial;
    result.status = fit_nonfinite;
  }
  problem.loss[at] = result.loss;
  problem.initial_loss[at] = result.initial;
  problem.iterations[at] = result.iterations;
  problem.status[at] = result.status;
}

void prepare(const FitProblem& problem, FitEdit& edit, const FitScratch& scratch) {
  if (problem.is_double) return prepare_of<double>(problem, edit, scratch);
  prepare_of<float>(problem, edit, scratch);
}

void fit(const FitProblem& problem, const FitEdit& edit, int64_t channel, const FitScratch& scratch) {
  if (problem.is_double) return fit_of<double>(problem, edit, channel, scratch);
  fit_of<float>(problem, edit, channel, scratch);
}

}  // namespace

const FitTable fit_table = {prepare, fit};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
