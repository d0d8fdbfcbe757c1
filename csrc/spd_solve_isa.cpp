// Compiled once per instruction set with REWRITE_CORE_ISA as the namespace; see spd_solve_isa.h.
#include "spd_solve_isa.h"

#include <type_traits>

namespace rewrite_core {
namespace REWRITE_CORE_ISA {
namespace {

typedef Vec<double> Wide;
constexpr int width = lanes<double>;

constexpr int columns_ahead = 32;  // of L that are asked for while others are in use
constexpr int most_rows = registers >= 32 ? 8 : 4;

// A tile fills the register file: width x panels vectors of sums, `panels` of columns, one broadcast.
constexpr int tile_panels = (registers - 1) / (width + 1) < 4 ? (registers - 1) / (width + 1) : 4;

// to[c * to_stride + r] = from[r * stride + c] for r, c < width.
inline void transpose(const double* from, int64_t stride, double* to, int64_t to_stride) {
  Wide rows[width];
#pragma GCC unroll 8
  for (int r = 0; r < width; ++r) rows[r] = load_wide(from + r * stride);
  turn<vector_bytes, double>(rows);
#pragma GCC unroll 8
  for (int c = 0; c < width; ++c) store_wide(to + c * to_stride, rows[c]);
}

// Rows j, ..., j + count - 1 of lower^T, when those above them are subtracted. Returns 0 or the number of a bad pivot.
template <int count>
inline int finish_rows(double* transposed, int j, int size) {
  double* const rows = transposed + j * block_size;
  double corner[count][count], root[count];  // the same numbers as in the vectors below, and sooner
#pragma GCC unroll 4
  for (int q = 0; q < count; ++q) {
#pragma GCC unroll 4
    for (int i = q; i < count; ++i) {
      double rest = rows[q * block_size + j + i];
#pragma GCC unroll 4
      for (int p = 0; p < q; ++p) rest -= corner[i][p] * corner[q][p];
      if (i > q) {
        corner[i][q] = rest / root[q];
      } else {
        if (!(rest > 0.0)) return j + q + 1;  // also for NaN
        root[q] = __builtin_sqrt(rest);
      }
    }
  }
  for (int k = j - j % width; k < size; k += width) {
    Wide value[count];
#pragma GCC unroll 4
    for (int q = 0; q < count; ++q) {
      value[q] = load_wide(rows + q * block_size + k);
#pragma GCC unroll 4
      for (int p = 0; p < q; ++p) value[q] -= corner[q][p] * value[p];
      value[q] /= root[q];
      store_wide(rows + q * block_size + k, value[q]);
    }
  }
  for (int q = 0; q < count; ++q) rows[q * block_size + j + q] = root[q];
  return 0;
}

// What is left of the diagonal in lower^T, and above it in lower, is anything: numbers there meet only each other.
int factor_block(double* block, int64_t stride, int size, double* transposed) {
  const int whole = size - size % width;
  for (int i = 0; i < whole; i += width) {
    for (int j = 0; j <= i; j += width)
      transpose(block + i * stride + j, stride, transposed + j * block_size + i, block_size);
  }
  for (int j = 0; j < size && whole < size; ++j) {
    for (int i = whole; i < whole + width; ++i) {
      transposed[j * block_size + i] = j <= i && i < size ? block[i * stride + j] : 0.0;
    }
  }
  for (int j = 0; j < size; j += 4) {
    const int count = size - j < 4 ? size - j : 4;
    const int bad = count == 4   ? finish_rows<4>(transposed, j, size)
                    : count == 3 ? finish_rows<3>(transposed, j, size)
                    : count == 2 ? finish_rows<2>(transposed, j, size)
                                 : finish_rows<1>(transposed, j, size);
    if (bad) return bad;
    const double* const rows = transposed + j * block_size;
    for (int i = j + count; i < size; ++i) {  // only after four: they are read and written once for all of these
      double* const row = transposed + i * block_size;
      double scale[4];
      for (int q = 0; q < 4; ++q) scale[q] = rows[q * block_size + i];
      for (int k = i - i % width; k < size; k += width) {
        Wide rest = load_wide(row + k);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) rest -= scale[q] * load_wide(rows + q * block_size + k);
        store_wide(row + k, rest);
      }
    }
  }
  for (int i = 0; i < whole; i += width) {
    for (int j = 0; j <= i; j += width)
      transpose(transposed + j * block_size + i, block_size, block + i * stride + j, stride);
  }
  for (int i = whole; i < size; ++i) {
    for (int j = 0; j <= i; ++j) block[i * stride + j] = transposed[j * block_size + i];
  }
  return 0;
}

void solve_rows(double* rows, int64_t stride, int count, const double* transposed, double* packed) {
  Wide* const x = reinterpret_cast<Wide*>(packed);
  if (count == width) {
    for (int k = 0; k < block_size; k += width) transpose(rows + k, stride, packed + k * width, width);
  } else {
    for (int k = 0; k < block_size; ++k) {
      for (int row = 0; row < width; ++row) packed[k * width + row] = row < count ? rows[row * stride + k] : 0.0;
    }
  }
  for (int j = 0; j < block_size; j += 4) {
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < i; ++k) x[j + i] -= transposed[(j + k) * block_size + j + i] * x[j + k];
      x[j + i] /= transposed[(j + i) * block_size + j + i];
    }
    const Wide x0 = x[j], x1 = x[j + 1], x2 = x[j + 2], x3 = x[j + 3];
    const double* row = transposed + j * block_size;
    for (int k = j + 4; k < block_size; ++k) {
      x[k] =
          x[k] - row[k] * x0 - row[block_size + k] * x1 - row[2 * block_size + k] * x2 - row[3 * block_size + k] * x3;
    }
  }
  if (count == width) {
    for (int k = 0; k < block_size; k += width) transpose(packed + k * width, width, rows + k, stride);
  } else {
    for (int row = 0; row < count; ++row) {
      for (int k = 0; k < block_size; ++k) rows[row * stride + k] = packed[k * width + row];
    }
  }
}

template <int panels>
void subtract_of(const double* row, const double* columns, Part target) {
  const bool whole = target.rows >= width && target.columns >= panels * width;
  if (whole) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < panels; ++j) __builtin_prefetch(target.data + i * target.stride + j * width, 1);
    }
  }
  Wide sum[width][panels] = {};
  for (int k = 0; k < block_size; ++k) {
    Wide column[panels];
#pragma GCC unroll 4
    for (int j = 0; j < panels; ++j) column[j] = *reinterpret_cast<const Wide*>(columns + (j * block_size + k) * width);
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      const double scale = row[k * width + i];
#pragma GCC unroll 4
      for (int j = 0; j < panels; ++j) sum[i][j] += scale * column[j];
    }
  }
  if (whole) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < panels; ++j) {
        double* const place = target.data + i * target.stride + j * width;
        store_wide(place, load_wide(place) - sum[i][j]);
      }
    }
    return;
  }
  double flat[width * panels * width];
#pragma GCC unroll 8
  for (int i = 0; i < width; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < panels; ++j) store_wide(flat + (i * panels + j) * width, sum[i][j]);
  }
  for (int i = 0; i < width && i < target.rows; ++i) {
    for (int j = 0; j < panels * width && j < target.columns; ++j) {
      target.data[i * target.stride + j] -= flat[i * panels * width + j];
    }
  }
}

void subtract(const double* row, const double* columns, int panel_count, Part target) {
  if (panel_count == 1) return subtract_of<1>(row, columns, target);
  if (panel_count == 2) return subtract_of<2>(row, columns, target);
  return subtract_of<tile_panels>(row, columns, target);
}

inline double sum_lanes(Wide v) {
  double sum = 0;
  for (int lane = 0; lane < width; ++lane) sum += v[lane];
  return sum;
}

// A few right-hand sides, x[r * length]. Four rows of L at a time: every load of x serves four products, and four
// chains of sums run side by side.

// sum[q][r] = row q of four times x, up to `end`, the last `end` % width left out.
template <int rows>
inline void dot_rows(const double* row, int64_t stride, const double* x, int64_t length, int64_t end,
                     Wide (&sum)[4][rows]) {
  for (int64_t k = 0; k + width <= end; k += width) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Wide value = load_wide(x + r * length + k);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) sum[q][r] += value * load_wide(row + q * stride + k);
    }
  }
}

// L y = x of a triangle [n, n] with rows `stride` apart: dot products with the rows of L.
template <int rows>
void forward_of(const double* lower, int64_t stride, int64_t n, double* x, int64_t length) {
  const int64_t whole = n & ~int64_t{3};
  for (int64_t i = 0; i < whole; i += 4) {
    const double* row = lower + i * stride;
    Wide sum[4][rows] = {};
    const int64_t vectors = i - i % width;
    dot_rows<rows>(row, stride, x, length, i, sum);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        double rest = x[r * length + i + q] - sum_lanes(sum[q][r]);
        for (int64_t k = vectors; k < i + q; ++k) rest -= row[q * stride + k] * x[r * length + k];
        x[r * length + i + q] = rest / row[q * stride + i + q];
      }
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    for (int r = 0; r < rows; ++r) {
      double rest = x[r * length + i];
      for (int64_t k = 0; k < i; ++k) rest -= lower[i * stride + k] * x[r * length + k];
      x[r * length + i] = rest / lower[i * stride + i];
    }
  }
}

// x[., first .. end) -= four rows of L, each times its value.
template <int rows>
inline void subtract_rows(const double* row, int64_t stride, const double (&value)[4][rows], int64_t first, int64_t end,
                          double* x, int64_t length) {
  int64_t k = first;
  for (; k + width <= end; k += width) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      Wide rest = load_wide(x + r * length + k);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) rest -= value[q][r] * load_wide(row + q * stride + k);
      store_wide(x + r * length + k, rest);
    }
  }
  for (; k < end; ++k) {
    for (int r = 0; r < rows; ++r) {
      for (int q = 0; q < 4; ++q) x[r * length + k] -= value[q][r] * row[q * stride + k];
    }
  }
}

// L^T x = y of such a triangle: multiples of the same rows.
template <int rows>
void backward_of(const double* lower, int64_t stride, int64_t n, double* x, int64_t length) {
  const int64_t whole = n & ~int64_t{3};
  for (int64_t i = n - 1; i >= whole; --i) {
    for (int r = 0; r < rows; ++r) {
      const double value = x[r * length + i] /= lower[i * stride + i];
      for (int64_t k = 0; k < i; ++k) x[r * length + k] -= value * lower[i * stride + k];
    }
  }
  for (int64_t i = whole - 4; i >= 0; i -= 4) {
    const double* row = lower + i * stride;
    double value[4][rows];
    for (int r = 0; r < rows; ++r) {
      for (int q = 3; q >= 0; --q) {
        value[q][r] = x[r * length + i + q] /= row[q * stride + i + q];
        for (int k = 0; k < q; ++k) x[r * length + i + k] -= value[q][r] * row[q * stride + i + k];
      }
    }
    subtract_rows<rows>(row, stride, value, 0, i, x, length);
  }
}

template <int rows>
void take_left_of(const double* lower, int64_t n, double* x, int64_t first, int64_t end, int64_t columns) {
  int64_t i = first;
  for (; i + 4 <= end; i += 4) {
    Wide sum[4][rows] = {};
    dot_rows<rows>(lower + i * n, n, x, n, columns, sum);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) x[r * n + i + q] -= sum_lanes(sum[q][r]);
    }
  }
  for (; i < end; ++i) {
    for (int r = 0; r < rows; ++r) {
      Wide sum = {};
      for (int64_t k = 0; k < columns; k += width) {
        sum += load_wide(x + r * n + k) * load_wide(lower + i * n + k);
      }
      x[r * n + i] -= sum_lanes(sum);
    }
  }
}

template <int rows>
void take_below_of(const double* lower, int64_t n, double* x, int64_t first, int64_t end, int64_t columns,
                   int64_t columns_end) {
  for (int64_t i = first; i < end; i += 4) {
    const int64_t count = end - i < 4 ? end - i : 4;
    double value[4][rows] = {};
    for (int64_t q = 0; q < count; ++q) {
      for (int r = 0; r < rows; ++r) value[q][r] = x[r * n + i + q];
    }
    if (count == 4) {
      subtract_rows<rows>(lower + i * n, n, value, columns, columns_end, x, n);
      continue;
    }
    for (int64_t q = 0; q < count; ++q) {
      for (int r = 0; r < rows; ++r) {
        for (int64_t k = columns; k < columns_end; ++k) x[r * n + k] -= value[q][r] * lower[(i + q) * n + k];
      }
    }
  }
}

// One of these for a number of right-hand sides.
#define REWRITE_CORE_ROWS(function, ...)          \
  if (rows == 1) return function<1>(__VA_ARGS__); \
  if (rows == 2) return function<2>(__VA_ARGS__); \
  return function<wide_from - 1>(__VA_ARGS__)

void forward(const double* lower, int64_t stride, int64_t n, double* x, int64_t length, int rows) {
  REWRITE_CORE_ROWS(forward_of, lower, stride, n, x, length);
}

void backward(const double* lower, int64_t stride, int64_t n, double* x, int64_t length, int rows) {
  REWRITE_CORE_ROWS(backward_of, lower, stride, n, x, length);
}

void take_left(const double* lower, int64_t n, double* x, int rows, int64_t first, int64_t end, int64_t columns) {
  REWRITE_CORE_ROWS(take_left_of, lower, n, x, first, end, columns);
}

void take_below(const double* lower, int64_t n, double* x, int rows, int64_t first, int64_t end, int64_t columns,
                int64_t columns_end) {
  REWRITE_CORE_ROWS(take_below_of, lower, n, x, first, end, columns, columns_end);
}

// x[first + q] for a few rows q, less what the solution in these columns makes of it, in registers; `entry(k)` is where
// column k's entries of L, or of L^T, are, `apart` from one row to the next.
template <int rows, int vectors, class Entry>
inline void take_wide(Wide (&sum)[rows][vectors], const Wide* x, int64_t first, Range columns, const Entry& entry,
                      int64_t apart) {
#pragma GCC unroll 8
  for (int q = 0; q < rows; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[q][v] = x[(first + q) * vectors + v];
  }
  for (int64_t k = columns.begin; k < columns.end; ++k) {
    const double* const scales = entry(k);
    Wide known[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) known[v] = x[k * vectors + v];
#pragma GCC unroll 8
    for (int q = 0; q < rows; ++q) {
      const double scale = scales[q * apart];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[q][v] -= scale * known[v];
    }
  }
}

// Rows first, ..., first + rows - 1 of L y = x, from these columns; solved: and then themselves.
template <int rows, int vectors, bool solved>
inline void forward_rows(const double* lower, int64_t n, Wide* x, int64_t first, Range columns) {
  const double* row = lower + first * n;
  Wide sum[rows][vectors];
  take_wide<rows, vectors>(sum, x, first, columns, [&](int64_t k) { return row + k; }, n);
#pragma GCC unroll 8
  for (int q = 0; q < rows; ++q) {
#pragma GCC unroll 8
    for (int p = 0; solved && p < q; ++p) {
      const double scale = row[q * n + first + p];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[q][v] -= scale * sum[p][v];
    }
    const double pivot = solved ? row[q * n + first + q] : 1.0;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) x[(first + q) * vectors + v] = solved ? sum[q][v] /= pivot : sum[q][v];
  }
}

// The same rows of L^T x = y. Rows of L are too many for the processor's own look ahead, so it is told what comes next
// in each: of what it should bring no nearer than the second cache, as these rows may share one place in the first.
template <int rows, int vectors, bool solved>
inline void backward_rows(const double* lower, int64_t n, Wide* x, int64_t first, Range columns) {
  Wide sum[rows][vectors];
  const auto entry = [&](int64_t k) {
    const double* const row = lower + k * n + first;
    if (!solved) __builtin_prefetch(row - columns_ahead, 0, 2);
    return row;
  };
  take_wide<rows, vectors>(sum, x, first, columns, entry, 1);
#pragma GCC unroll 8
  for (int q = rows - 1; q >= 0; --q) {
#pragma GCC unroll 8
    for (int p = q + 1; solved && p < rows; ++p) {
      const double scale = lower[(first + p) * n + first + q];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[q][v] -= scale * sum[p][v];
    }
    const double pivot = solved ? lower[(first + q) * n + first + q] : 1.0;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) x[(first + q) * vectors + v] = solved ? sum[q][v] /= pivot : sum[q][v];
  }
}

template <int vectors>
void forward_wide_of(const double* lower, int64_t n, Wide* x, Range rows, Range columns) {
  const int64_t whole = rows.end - (rows.end - rows.begin) % most_rows;
  int64_t i = rows.begin;
  if (columns.end <= rows.begin) {
    for (; i < whole; i += most_rows) forward_rows<most_rows, vectors, false>(lower, n, x, i, columns);
    for (; i < rows.end; ++i) forward_rows<1, vectors, false>(lower, n, x, i, columns);
    return;
  }
  for (; i < whole; i += most_rows) forward_rows<most_rows, vectors, true>(lower, n, x, i, {columns.begin, i});
  for (; i < rows.end; ++i) forward_rows<1, vectors, true>(lower, n, x, i, {columns.begin, i});
}

template <int vectors>
void backward_wide_of(const double* lower, int64_t n, Wide* x, Range rows, Range columns) {
  const int64_t whole = rows.end - (rows.end - rows.begin) % most_rows;
  int64_t i = rows.end;
  if (columns.begin >= rows.end) {
    for (; i > whole; --i) backward_rows<1, vectors, false>(lower, n, x, i - 1, columns);
    for (; i > rows.begin; i -= most_rows) {
      backward_rows<most_rows, vectors, false>(lower, n, x, i - most_rows, columns);
    }
    return;
  }
  for (; i > whole; --i) backward_rows<1, vectors, true>(lower, n, x, i - 1, {i, columns.end});
  for (; i > rows.begin; i -= most_rows) {
    backward_rows<most_rows, vectors, true>(lower, n, x, i - most_rows, {i, columns.end});
  }
}

// One of these for a number of vectors.
#define REWRITE_CORE_VECTORS(function, ...)          \
  if (vectors == 1) return function<1>(__VA_ARGS__); \
  if (vectors == 2) return function<2>(__VA_ARGS__); \
  return function<wide_vectors>(__VA_ARGS__)

void forward_wide(const double* lower, int64_t n, double* x, int vectors, Range rows, Range columns) {
  REWRITE_CORE_VECTORS(forward_wide_of, lower, n, reinterpret_cast<Wide*>(x), rows, columns);
}

void backward_wide(const double* lower, int64_t n, double* x, int vectors, Range rows, Range columns) {
  REWRITE_CORE_VECTORS(backward_wide_of, lower, n, reinterpret_cast<Wide*>(x), rows, columns);
}

inline double magnitude(double x) { return x < 0 ? -x : x; }
inline Wide magnitude(Wide x) {  // without the sign bit: a comparison and a choice take longer
  return (Wide)((Vec<int64_t>)x & INT64_MAX);
}

// Products with a symmetric matrix. Each entry of the lower triangle is read once: it counts in its own row and,
// mirrored, in its column's.

// Rows i, ..., i + rows - 1 of it.
template <int rows>
struct Rows {
  const double* first;
  int64_t n, i;
  double w[rows], v[rows];
  Wide y[2 * rows];  // sums of the rows, then those of |A| v
};

// `width` of their entries from column k on; masked: those up to the diagonal; sized: in z as well. y and z, of the
// columns, are where k's are.
template <int rows, bool sized, bool masked>
inline void multiply_vector(Rows<rows>& r, int64_t k, const double* w, const double* v, double* y, double* z) {
  const Wide wk = load_wide(w + k);
  Wide yk = load_wide(y), vk = {}, zk = {};
  if (sized) vk = load_wide(v + k), zk = load_wide(z);
#pragma GCC unroll 4
  for (int q = 0; q < rows; ++q) {
    __builtin_prefetch(r.first + (q + rows) * r.n + k);  // each row is a new start for the processor's own look ahead
    Wide own = opaque(load_wide(r.first + q * r.n + k)), mirrored = own;
    if (masked) {
      Vec<int64_t> lane_numbers;
#pragma GCC unroll 8
      for (int lane = 0; lane < width; ++lane) lane_numbers[lane] = lane;
      const int64_t diagonal = r.i + q - k;
      own = lane_numbers <= diagonal ? own : Wide{};
      mirrored = lane_numbers < diagonal ? own : Wide{};
    }
    r.y[q] += own * wk;
    yk += r.w[q] * mirrored;
    if (sized) {
      r.y[rows + q] += magnitude(own) * vk;
      zk += r.v[q] * magnitude(mirrored);
    }
  }
  store_wide(y, yk);
  if (sized) store_wide(z, zk);
}

// Of `every` vectors of entries one counts in z, another one in the next rows; 1: each does, 0: none.
template <int rows, int every>
inline void multiply_rows(const SymmetricProduct& p, int64_t i, Range columns, ProductSums own, ProductSums mirrored) {
  Rows<rows> r;  // with {} the compiler clears it by a slow instruction
  r.first = p.a + i * p.n, r.n = p.n, r.i = i;
#pragma GCC unroll 4
  for (int q = 0; q < rows; ++q) {
    r.w[q] = p.w[i + q], r.v[q] = every ? p.v[i + q] : 0.0;
    r.y[q] = r.y[rows + q] = Wide{};
  }
  const int64_t before = i - i % width;  // up to there no entry is right of the diagonal
  const int64_t left = before < columns.end ? before : columns.end;
  int64_t k = columns.begin;
  double *y = mirrored.y, *z = mirrored.z;
  const auto count = [&](auto sized, auto masked) {
    multiply_vector<rows, sized, masked>(r, k, p.w, p.v, y, z);
    k += width, y += width, z += width;
  };
  constexpr std::integral_constant<bool, every != 0> with_size;
  for (int64_t plain = every > 1 ? i / rows % every : 0; k + width <= left; --plain) {
    if (every > 1 && plain) {
      count(std::false_type(), std::false_type());
      continue;
    }
    count(with_size, std::false_type());
    plain = every;
  }
  while (k + width <= p.n && k < i + rows && k < columns.end) count(with_size, std::true_type());
  double sums[2 * rows];
  sum_lanes<double, 2 * rows>(r.y, sums);
  for (int q = 0; q < rows; ++q) {
    for (int64_t j = k; j <= i + q && j < columns.end; ++j) {  // near the matrix's last column
      const double entry = r.first[q * p.n + j];
      sums[q] += entry * p.w[j];
      if (j < i + q) y[j - k] += entry * r.w[q];
      if (!every) continue;
      sums[rows + q] += magnitude(entry) * p.v[j];
      if (j < i + q) z[j - k] += magnitude(entry) * r.v[q];
    }
    own.y[q] += sums[q];
    if (every) own.z[q] += sums[rows + q];
  }
}

template <int every>
void multiply_of(const SymmetricProduct& p, Range rows, Range columns, ProductSums own, ProductSums mirrored) {
  const auto clear = [](ProductSums sums, Range range) {
    for (int64_t i = 0; i < range.end - range.begin; ++i) sums.y[i] = 0.0;
    for (int64_t i = 0; every && i < range.end - range.begin; ++i) sums.z[i] = 0.0;
  };
  clear(own, rows);
  if (mirrored.y != own.y) clear(mirrored, columns);
  const auto from = [&](int64_t i) { return ProductSums{own.y + (i - rows.begin), own.z + (i - rows.begin)}; };
  int64_t i = rows.begin;
  for (; i + 4 <= rows.end; i += 4) multiply_rows<4, every>(p, i, columns, from(i), mirrored);
  for (; i < rows.end; ++i) multiply_rows<1, every>(p, i, columns, from(i), mirrored);
}

void multiply(const SymmetricProduct& product, Range rows, Range columns, Sizes sizes, ProductSums own,
              ProductSums mirrored) {
  if (sizes == Sizes::none) return multiply_of<0>(product, rows, columns, own, mirrored);
  if (sizes == Sizes::some) return multiply_of<4>(product, rows, columns, own, mirrored);
  multiply_of<1>(product, rows, columns, own, mirrored);
}

}  // namespace

const SPDSolveKernels spd_solve_kernels = {width,    tile_panels, factor_block, solve_rows,   subtract,      forward,
                                           backward, take_left,   take_below,   forward_wide, backward_wide, multiply};

}  // namespace REWRITE_CORE_ISA
}  // namespace rewrite_core
