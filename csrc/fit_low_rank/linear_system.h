// The damped normal equations: matrix and gradient at the present point, their factor, the step.
#pragma once

#include "model.h"

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

// --- weighted Gram matrices of the basis, their products in Real: float or double
// ---------------------------------------

typedef Vector<float, vector_bytes / 2>::type HalfFloats;

inline void store_as(double* a, Wide v) { store(a, v); }
inline void store_as(float* a, Wide v) { *reinterpret_cast<HalfFloats*>(a) = __builtin_convertvector(v, HalfFloats); }

inline double total(Vec<float> v) {
  const HalfFloats* halves = reinterpret_cast<const HalfFloats*>(&v);
  return total(__builtin_convertvector(halves[0] + halves[1], Wide));
}

// out[i * leading + j] += the lanes' sum of sum[i][j] for rows i and columns j; where registers hold them all, by
// adding pairs of vectors crosswise instead of each one's lanes.
template <int rows, int columns, class Real>
inline void add_totals(const Vec<Real> sum[rows][columns], double* out, int64_t leading) {
  if constexpr (registers >= 32) {
    static_assert(rows <= 4 && columns <= 4);
    constexpr int across = columns == 1 ? 1 : 4, count = 4 * across;  // what is missing is zero
    Vec<Real> vectors[count];
    Real sums[count];
#pragma GCC unroll 16
    for (int k = 0; k < count; ++k) {
      const bool inside = k / across < rows && k % across < columns;
      vectors[k] = inside ? sum[inside ? k / across : 0][inside ? k % across : 0] : Vec<Real>{};
    }
    sum_lanes<Real, count>(vectors, sums);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) out[i * leading + j] += static_cast<double>(sums[i * across + j]);
    }
  } else {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) out[i * leading + j] += total(sum[i][j]);
    }
  }
}

// One register block: out[i, j] += sum_p weighted[i, p] plain[j, p].
template <int block, class Real>
__attribute__((always_inline)) inline void gram_block(const Real* weighted, int64_t weighted_stride, const Real* plain,
                                                      int64_t plain_stride, int64_t count, double* out,
                                                      int64_t leading) {
  Vec<Real> sum[block][block] = {};
  for (int64_t p = 0; p < count; p += lanes<Real>) {
    Vec<Real> column[block];
#pragma GCC unroll 4
    for (int j = 0; j < block; ++j) {
      column[j] = load(plain + j * plain_stride + p);
      if (block == 3) column[j] = opaque(column[j]);  // or GCC loads it for each product
    }
#pragma GCC unroll 4
    for (int i = 0; i < block; ++i) {
      const Vec<Real> row = load(weighted + i * weighted_stride + p);
#pragma GCC unroll 4
      for (int j = 0; j < block; ++j) sum[i][j] += row * column[j];
    }
  }
  add_totals<block, block, Real>(sum, out, leading);
}

inline const double* basis_as(const FitLowRankEdit& edit, const double*) { return edit.basis; }
inline const float* basis_as(const FitLowRankEdit& edit, const float*) { return edit.single; }

// Of each pixel: the factors of what is summed. Where m [styles] is given, curvature and slopes are multiplied by a
// style's m over the first one's, squared and not.
struct PixelFactors {
  const double* curvature;
  const double* slopes = nullptr;  // lin comes with it
  const double* lin = nullptr;
  const double* m = nullptr;
};

struct NormalEquations {
  double* matrix;              // [unknowns, leading] sum_p curvature_p basis_p basis_p^T: its upper triangle, by blocks
  double* gradient = nullptr;  // sum_p slopes_p basis_p, if factors has slopes
  double* leaning = nullptr;   // [styles, leading] sum_p curvature_p lin_p basis_p over each style's pixels
};

// Rows of the basis times the curvature for `count` pixels from `start` on, of one style; the gradient's and leaning's
// share of these pixels.
template <int block, class Real>
__attribute__((always_inline)) inline void weigh_rows(const FitLowRankEdit& edit, const PixelFactors& factors,
                                                      double ratio, int64_t start, int64_t count, int64_t rows,
                                                      double* gradient, double* leaning, Real* weighted) {
  constexpr int64_t step = lanes<Real>;
  const int64_t whole = (count + step - 1) / step * step, stride = edit.stride;
  const double *const basis = edit.basis + start, *const curvature = factors.curvature + start;
  const double* const lin = gradient ? factors.lin + start : nullptr;
  const double* const slopes = gradient ? factors.slopes + start : nullptr;
  for (int64_t j = 0; j < rows; j += block) {
    Wide leans[block][1] = {}, turns[block][1] = {};
    for (int64_t p = 0; p < count; p += width) {
      const Wide scale = ratio * ratio * load(curvature + p);
      const Wide along = gradient ? load(lin + p) : Wide{};
      const Wide slope = gradient ? ratio * load(slopes + p) : Wide{};
#pragma GCC unroll 4
      for (int i = 0; i < block; ++i) {
        const Wide plain = load(basis + (j + i) * stride + p), row = plain * scale;
        store_as(weighted + (j + i) * fit_panel + p, row);
        leans[i][0] += row * along;
        turns[i][0] += plain * slope;
      }
    }
    if (whole > count) {
      for (int i = 0; i < block; ++i) store_as(weighted + (j + i) * fit_panel + count, Wide{});
    }
    if (!gradient) continue;
    add_totals<block, 1, double>(leans, leaning + j, 1);
    add_totals<block, 1, double>(turns, gradient + j, 1);
  }
}

template <int block, class Real>
void gram_of(const FitLowRankEdit& edit, int64_t styles, int64_t unknowns, const PixelFactors& factors,
             const NormalEquations& out, Real* weighted) {
  constexpr int64_t step = lanes<Real>;
  const int64_t rows = (unknowns + block - 1) / block * block;
  const Real* const plain = basis_as(edit, static_cast<const Real*>(nullptr));
  const int64_t stride = sizeof(Real) == sizeof(double) ? edit.stride : edit.single_stride;
  clear(out.matrix, rows * edit.leading);
  if (out.gradient) {
    clear(out.leaning, styles * edit.leading);
    clear(out.gradient, rows);
  }
  for (int64_t style = 0; style < styles; ++style) {
    const double ratio = factors.m ? factors.m[style] / factors.m[0] : 1.0;
    double* const leaning = out.gradient ? out.leaning + style * edit.leading : nullptr;
    const int64_t end = edit.starts[style + 1];
    for (int64_t start = edit.starts[style]; start < end; start += fit_panel) {
      const int64_t count = end - start < fit_panel ? end - start : fit_panel;
      const int64_t whole = (count + step - 1) / step * step;
      weigh_rows<block>(edit, factors, ratio, start, count, rows, out.gradient, leaning, weighted);
      for (int64_t i = 0; i < rows; i += block) {
        for (int64_t j = i; j < rows; j += block) {
          gram_block<block>(weighted + i * fit_panel, fit_panel, plain + start + j * stride, stride, whole,
                            out.matrix + i * edit.leading + j, edit.leading);
        }
      }
    }
  }
}

template <class Real>
void gram(const FitLowRankEdit& edit, int64_t styles, int64_t unknowns, const PixelFactors& factors,
          const NormalEquations& out, double* weighted) {
  Real* const panel = reinterpret_cast<Real*>(weighted);
  if constexpr (registers >= 32) {
    if (unknowns > 12) return gram_of<4>(edit, styles, unknowns, factors, out, panel);
  }
  gram_of<3>(edit, styles, unknowns, factors, out, panel);
}

// --- factors
// -----------------------------------------------------------------------------------------------------------

// out[i] -= sum_k scales[k][i] others[k] for up to four rows i, `vectors` vectors of each.
template <int vectors>
inline void take_rows(const double* others, const double* scales, int64_t count, int64_t rows, int64_t leading,
                      double* out) {
  Wide rest[4][vectors];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < vectors; ++j) rest[i][j] = i < rows ? load(out + i * leading + j * width) : Wide{};
  }
  for (int64_t k = 0; k < count; ++k) {
    Wide row[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) row[j] = load(others + k * leading + j * width);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) rest[i][j] -= scales[k * 4 + i] * row[j];
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) store(out + i * leading + j * width, rest[i][j]);
  }
}

// Rows [start, start + rows) of matrix + shift I, and of `right` in column n if it is given; in whole vectors: a number
// stored by itself would hold up the loads of its vector.
inline void copy_rows(const double* matrix, int64_t n, int64_t leading, double shift, const double* right,
                      int64_t start, int64_t rows, double* factor) {
  const int64_t first = start & ~int64_t{width - 1};
  for (int64_t i = start; i < start + rows; ++i) {
    double* row = factor + i * leading;
    const double* from = matrix + i * leading;
    Wide column = places(first);
    const double here = static_cast<double>(i), last = static_cast<double>(n);
    for (int64_t j = first; j < leading; j += width, column += static_cast<double>(width)) {
      Wide v = load(from + j);
      v = column == here ? v + shift : v;
      if (right) v = column == last ? fill(right[i]) : v;
      store(row + j, v);
    }
  }
}

// The rows of a block, less what those above it and above them take, by each other; false where a pivot is not above
// `least`.
inline bool eliminate(double* mine, int64_t rows, int64_t start, int64_t leading, double least) {
  const int64_t first = start & ~int64_t{width - 1};
  for (int64_t k = 0; k < rows; ++k) {
    double* const row = mine + k * leading;
    const double pivot = row[start + k];
    if (!(pivot > least) || !finite(pivot)) return false;
    const double inverse = 1.0 / pivot;
    for (int64_t i = k + 1; i < rows; ++i) {
      const double scale = row[start + i] * inverse;
      double* const other = mine + i * leading;
      for (int64_t j = first; j < leading; j += width) store(other + j, load(other + j) - scale * load(row + j));
    }
  }
  for (int64_t k = start; k < start + rows; ++k) {
    double* const row = mine + (k - start) * leading;
    const double inverse = 1.0 / row[k], here = static_cast<double>(k);
    for (int64_t j = first; j <= k; j += width) {  // leftovers of the other triangle go
      const Wide column = places(j);
      store(row + j, column < here ? Wide{} : column == here ? fill(inverse) : load(row + j));
    }
  }
  return true;
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
    const int64_t rows = n - start < block ? n - start : block, first = start & ~int64_t{width - 1};
    copy_rows(matrix, n, leading, shift, right, start, rows, factor);
    double* const mine = factor + start * leading;
    for (int64_t above = 0; above < start; above += chunk) {
      const int64_t count = start - above < chunk ? start - above : chunk;
      for (int64_t k = 0; k < count; ++k) {
        const double* row = factor + (above + k) * leading;
        *reinterpret_cast<Four*>(scales + k * block) = *reinterpret_cast<const Four*>(row + start) * row[above + k];
      }
      const double* const others = factor + above * leading;
      int64_t j = first;
      for (; j + width < leading; j += 2 * width) take_rows<2>(others + j, scales, count, rows, leading, mine + j);
      if (j < leading) take_rows<1>(others + j, scales, count, rows, leading, mine + j);
    }
    if (!eliminate(mine, rows, start, leading, least)) return false;
  }
  return true;
}

// x [leading] = -(matrix + shift I)^-1 right, for a `right` substituted already; its entries are `step`
// apart. A vector's worth of unknowns at a time: their sums over the unknowns after them do not wait for each other.
void solve_negative(const double* factor, int64_t n, int64_t leading, const double* right, int64_t step, double* x) {
  clear(x, leading);
  for (int64_t first = (n - 1) & ~int64_t{width - 1}; first >= 0; first -= width) {
    const int64_t count = n - first < width ? n - first : width, after = first + width;
    double part[width];
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

// --- a channel's matrix, gradient and step
// -----------------------------------------------------------------------------
//
// With the Jacobian's rows [unknowns, pixels],
//   rows_jp = m basis_jp + dm_j lin_p, m and dm those of pixel p's style,
// and c the curvature the matrix is rows diag(c) rows^T + 2 penalty_scale penalty. In dual form (fewer pixels than
// unknowns, no penalty) it is over pixels, S rows^T rows S with S = sqrt(diag(c)), and
//   step = -rows S (S rows^T rows S + mu I)^-1 S^-1 slopes, gradient = rows slopes;
// (rows^T rows)_ip = m m' gram_ip + m' lin_i turned_p + (m turned'_i + dm.dm' lin_i) lin_p, with gram = basis^T basis
// and turned = basis^T dm, what has a prime being of p's style and the rest of i's.

// The present point.
struct Point {
  const double *x, *lin, *m, *dm;
};

// Over pixels: scratch.matrix, its trace, and scratch.gradient over m[0] and without lin's part.
double assemble_pixels(const Model& model, const Point& at) {
  const FitLowRankEdit& edit = model.edit;
  const FitLowRankScratch& scratch = model.scratch;
  const int64_t unknowns = model.problem.unknowns, stride = edit.stride, leading = edit.leading;
  const int64_t styles = model.problem.styles;
  const int64_t* const starts = edit.starts;
  const bool demodulated = model.problem.constant != nullptr;
  const double *const m = at.m, *const dm = at.dm, *const lin = at.lin;
  double *const gradient = scratch.gradient, *const turned = scratch.turned;  // turned: of each style
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
      for (int64_t p = 0; p < stride; p += width) {
        store(own + p, load(own + p) + along * load(edit.basis + j * stride + p));
      }
    }
  }
  double* const root = scratch.root;
  for (int64_t p = 0; p < stride; p += width) store(root + p, square_root(load(scratch.curvature + p)));
  double trace = 0.0;
  for (int64_t mine = 0; mine < styles; ++mine) {
    const int64_t last = starts[mine + 1] < edit.order ? starts[mine + 1] : edit.order;
    for (int64_t other = mine; other < styles; ++other) {
      const double product = demodulated ? dot(dm + mine * leading, dm + other * leading, leading) : 0.0;
      const double* const own = turned + mine * stride;
      for (int64_t i = starts[mine]; i < last; ++i) {
        double* row = scratch.matrix + i * edit.order_leading;
        const double* gram_row = edit.gram + i * edit.order_leading;
        const double by_basis = m[mine] * m[other] * root[i];
        const double by_turned = demodulated ? m[other] * root[i] * lin[i] : 0.0;
        const double by_lin = demodulated ? root[i] * (m[mine] * turned[other * stride + i] + product * lin[i]) : 0.0;
        const int64_t first = i & ~int64_t{width - 1};
        for (int64_t p = first > starts[other] ? first : starts[other]; p < starts[other + 1]; p += width) {
          Wide sum = by_basis * load(gram_row + p);
          if (demodulated) sum += by_turned * load(own + p) + by_lin * load(lin + p);
          store(row + p, sum * load(root + p));
        }
        if (other == mine) trace += row[i];
      }
    }
  }
  return trace;
}

// Over unknowns: the same.
double assemble_unknowns(const Model& model, const Point& at) {
  const FitLowRankEdit& edit = model.edit;
  const FitLowRankScratch& scratch = model.scratch;
  const int64_t unknowns = model.problem.unknowns, leading = edit.leading, styles = model.problem.styles;
  const bool demodulated = model.problem.constant != nullptr;
  const double *const m = at.m, *const lin = at.lin;
  double *const matrix = scratch.matrix, *const leaning = scratch.half;
  (edit.single ? gram<float> : gram<double>)(edit, styles, unknowns, {scratch.curvature, scratch.slopes, lin, m},
                                             {matrix, scratch.gradient, leaning}, scratch.weighted);
  const double square = m[0] * m[0];
  for (int64_t i = 0; demodulated && i < unknowns; ++i) {
    double* row = matrix + i * leading;
    for (int64_t j = i; j < unknowns; ++j) row[j] *= square;
  }
  for (int64_t style = 0; demodulated && style < styles; ++style) {
    const int64_t start = edit.starts[style], end = edit.starts[style + 1];
    for (int64_t p = start; p < end; p += width) {
      store(scratch.spare + p, load(scratch.curvature + p) * load(lin + p));
    }
    const double bent = dot(scratch.spare + start, lin + start, end - start);
    const double ratio = m[style] / m[0], by = m[style] / (ratio * ratio);
    const double *lean = leaning + style * leading, *own = at.dm + style * leading;
    for (int64_t i = 0; i < unknowns; ++i) {
      double* row = matrix + i * leading;
      const double by_leaning = by * own[i], by_dm = by * lean[i] + bent * own[i];
      for (int64_t j = i; j < unknowns; ++j) row[j] += by_leaning * lean[j] + by_dm * own[j];
    }
  }
  double trace = 0.0;
  for (int64_t i = 0; i < unknowns; ++i) {
    double* row = matrix + i * leading;
    if (edit.penalty) {
      const double* penalty = edit.penalty + i * leading;
      for (int64_t j = i; j < unknowns; ++j) row[j] += 2.0 * model.penalty_scale * penalty[j];
    }
    trace += row[i];
  }
  return trace;
}

// scratch.matrix, scratch.gradient; returns their mean curvature.
double assemble(const Model& model, const Point& at) {
  const FitLowRankEdit& edit = model.edit;
  const FitLowRankScratch& scratch = model.scratch;
  const int64_t unknowns = model.problem.unknowns, leading = edit.leading;
  double* const gradient = scratch.gradient;
  const double trace = edit.dual_form ? assemble_pixels(model, at) : assemble_unknowns(model, at);
  for (int64_t j = 0; j < unknowns; ++j) gradient[j] *= at.m[0];
  for (int64_t style = 0; model.problem.constant && style < model.problem.styles; ++style) {
    const int64_t start = edit.starts[style];
    const double along = dot(scratch.slopes + start, at.lin + start, edit.starts[style + 1] - start);
    for (int64_t j = 0; j < unknowns; ++j) gradient[j] += along * at.dm[style * leading + j];
  }
  for (int64_t j = 0; edit.penalty && j < unknowns; ++j) {
    gradient[j] += 2.0 * model.penalty_scale * dot(edit.penalty + j * leading, at.x, leading);
  }
  return trace / static_cast<double>(unknowns);
}

// scratch.step; false where the damped matrix does not factor.
bool damped_step(const Model& model, const Point& at, double mu) {
  const FitLowRankEdit& edit = model.edit;
  const FitLowRankScratch& scratch = model.scratch;
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
      const double along = model.problem.constant ? dot(y + start, at.lin + start, count) : 0.0;
      const double* const own = at.dm + style * edit.leading;
      for (int64_t j = 0; j < unknowns; ++j) {
        step[j] += at.m[style] * dot(edit.basis + j * stride + start, y + start, count);
        if (model.problem.constant) step[j] += along * own[j];
      }
    }
  }
  for (int64_t j = 0; j < unknowns; ++j) {
    if (!finite(step[j])) return false;
  }
  return true;
}

}  // namespace
}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
