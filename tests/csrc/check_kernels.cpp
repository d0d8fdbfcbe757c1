// Calls every kernel of csrc/ without torch or Python, on odd, empty, strided and threaded cases, and compares with
// plain loops. tests/test_sanitizers.py builds and runs it under sanitizers and valgrind; so every array is a heap
// block of exactly the size that the headers promise to stay within, and gaps between strided elements hold NaN.
//
//   check_kernels [smallest] [ISA ...]     default: all cases, every instruction set that this CPU has
//   check_kernels overrun|race|unwritten   makes a mistake, to see that it is caught
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "fit_low_rank.h"
#include "fit_projected.h"
#include "second_moment.h"
#include "spd_solve.h"

using namespace rewrite_core;

namespace {

std::mt19937 generator(1);
std::string what;  // the case that runs
int failures = 0, checks = 0;

void check(bool good, const char* message) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("wrong: %s: %s\n", what.c_str(), message);
}

double normal() { return std::normal_distribution<double>()(generator); }

std::vector<double> normals(int64_t count, double scale = 1) {
  std::vector<double> values(count);
  for (double& value : values) value = scale * normal();
  return values;
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

// --- second moment ---------------------------------------------------------------------------------------------------

int width_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Writes a random value, exactly representable in dtype, and returns it.
double put(char* target, DType dtype) {
  if (dtype == DType::float64) {
    const double value = normal();
    std::memcpy(target, &value, 8);
    return value;
  }
  if (dtype == DType::float32) {
    const float value = static_cast<float>(normal());
    std::memcpy(target, &value, 4);
    return value;
  }
  const bool brain = dtype == DType::bfloat16;  // both: random bits with an exponent near that of 1
  const int mantissa = brain ? 7 : 10, bias = brain ? 127 : 15;
  const uint32_t random = generator();
  const int exponent = static_cast<int>(random % 7) - 5;
  const uint32_t fraction = (random >> 8) % (1u << mantissa), negative = random >> 31;
  const uint16_t bits =
      static_cast<uint16_t>(negative << 15 | static_cast<uint32_t>(exponent + bias) << mantissa | fraction);
  std::memcpy(target, &bits, 2);
  return std::ldexp((negative ? -1.0 : 1.0) * (1 + static_cast<double>(fraction) / (1 << mantissa)), exponent);
}

struct Layout {
  const char* name;
  int64_t sizes[4];    // n, c, h, w
  int64_t strides[4];  // in elements
};

// The layout in memory of exactly its reach, NaN where no element lies; `values` [n, c, h, w] are what is stored.
std::vector<char> store(const Layout& layout, DType dtype, std::vector<double>& values) {
  const auto& size = layout.sizes;
  const auto& stride = layout.strides;
  int64_t reach = 1, count = 1;
  for (int i = 0; i < 4; ++i) {
    reach += (size[i] - 1) * stride[i];
    count *= size[i];
  }
  values.assign(count, 0);
  std::vector<char> memory(count ? reach * width_of(dtype) : 0, static_cast<char>(0xff));  // all ones: NaN
  std::vector<bool> written(memory.size());
  std::vector<double> at(count ? reach : 0);
  int64_t place = 0;
  for (int64_t n = 0; n < size[0]; ++n)
    for (int64_t c = 0; c < size[1]; ++c)
      for (int64_t h = 0; h < size[2]; ++h)
        for (int64_t w = 0; w < size[3]; ++w) {
          const int64_t offset = n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
          if (!written[offset]) at[offset] = put(memory.data() + offset * width_of(dtype), dtype);
          written[offset] = true;  // expanded tensors come here again
          values[place++] = at[offset];
        }
  return memory;
}

void check_second_moment(const Layout& layout, DType dtype, Isa isa) {
  what = std::string("second_moment, ") + layout.name + ", dtype " + std::to_string(static_cast<int>(dtype)) + ", " +
         isa_name(isa);
  std::vector<double> values;
  const std::vector<char> memory = store(layout, dtype, values);
  const int64_t channels = layout.sizes[1], map = layout.sizes[2] * layout.sizes[3];
  const int64_t positions = layout.sizes[0] * map;
  std::vector<double> before(channels * channels), want, out, again;
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t j = 0; j <= i; ++j) before[i * channels + j] = before[j * channels + i] = normal();
  want = out = again = before;
  for (int64_t p = 0; p < positions; ++p) {
    const double* key = values.data() + p / map * channels * map + p % map;
    for (int64_t i = 0; i < channels; ++i)
      for (int64_t j = 0; j < channels; ++j) want[i * channels + j] += key[i * map] * key[j * map];
  }
  const auto run = [&](std::vector<double>& sum, int threads) {
    return second_moment(memory.data(), dtype, layout.sizes, layout.strides, sum.data(), threads, isa);
  };
  check(run(out, 1) == Status::ok && run(again, 5) == Status::ok, "its status");
  check(same_bits(out, again), "the number of threads changes its bits");
  bool right = true, symmetric = true;
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t j = 0; j < channels; ++j) {
      const double scale = std::sqrt(want[i * channels + i] - before[i * channels + i]) *
                           std::sqrt(want[j * channels + j] - before[j * channels + j]);
      right &= std::abs(out[i * channels + j] - want[i * channels + j]) <= 1e-6 * scale + 1e-12;
      symmetric &= out[i * channels + j] == out[j * channels + i];
    }
  check(right, "its sum");
  check(symmetric, "its two triangles");
}

// Groups of channels are as many calls, each with the channels of one.
void check_groups(const Layout& layout, DType dtype, Isa isa, int64_t groups) {
  what = std::string("second_moment, ") + std::to_string(groups) + " groups, " + layout.name + ", dtype " +
         std::to_string(static_cast<int>(dtype)) + ", " + isa_name(isa);
  std::vector<double> values;
  const std::vector<char> memory = store(layout, dtype, values);
  const int64_t size = layout.sizes[1] / groups, square = size * size;
  const int64_t own[4] = {layout.sizes[0], size, layout.sizes[2], layout.sizes[3]};
  std::vector<double> out(groups * square, 1.0), again = out, want = out;
  for (int64_t group = 0; group < groups; ++group) {
    second_moment(memory.data() + group * size * layout.strides[1] * width_of(dtype), dtype, own, layout.strides,
                  want.data() + group * square, 1, isa);
  }
  const auto run = [&](std::vector<double>& sum, int threads) {
    return second_moment(memory.data(), dtype, layout.sizes, layout.strides, sum.data(), threads, isa, groups);
  };
  check(run(out, 1) == Status::ok && run(again, 5) == Status::ok, "its status");
  check(same_bits(out, again), "the number of threads changes its bits");
  bool right = true, symmetric = true;
  for (int64_t i = 0; i < groups * square; ++i) {
    const int64_t first = i / square * square, row = i % square / size, column = i % size;
    const double scale = std::sqrt(want[first + row * (size + 1)]) * std::sqrt(want[first + column * (size + 1)]);
    right &= std::abs(out[i] - want[i]) <= 1e-6 * scale;
    symmetric &= out[i] == out[first + column * size + row];
  }
  check(right, "its sums");
  check(symmetric, "their triangles");
}

void check_second_moments(bool smallest, Isa isa) {
  const std::vector<Layout> layouts = {
      {"one number", {1, 1, 1, 1}, {1, 1, 1, 1}},
      {"rows", {9, 5, 1, 1}, {5, 1, 0, 0}},
      {"maps", {2, 3, 4, 5}, {60, 20, 5, 1}},
      {"no images", {0, 5, 3, 3}, {45, 9, 3, 1}},
      {"no width", {2, 5, 3, 0}, {15, 3, 1, 1}},
      {"channels last", {2, 7, 3, 5}, {105, 1, 35, 7}},
      {"gaps", {2, 3, 3, 4}, {300, 90, 20, 3}},
      {"expanded", {4, 6, 3, 3}, {0, 9, 0, 1}},
      {"more than a run", {3, 70, 17, 11}, {13090, 187, 11, 1}},
      {"transposed maps", {2, 33, 9, 31}, {9207, 279, 1, 9}},
      {"columns", {700, 65, 1, 1}, {1, 700, 0, 0}},
      {"wide rows", {37, 300, 1, 1}, {301, 1, 0, 0}},
      {"few keys", {2, 130, 1, 7}, {1040, 8, 8, 1}},
      {"groups of runs", {2, 24, 96, 96}, {221184, 9216, 96, 1}},
      {"blocks of channels", {4, 250, 16, 16}, {64000, 256, 16, 1}},
  };
  for (const Layout& layout : layouts) {
    if (smallest && layout.sizes[0] * layout.sizes[1] * layout.sizes[2] * layout.sizes[3] > 300) continue;
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
      check_second_moment(layout, dtype, isa);
      const int64_t channels = layout.sizes[1];
      for (int64_t size : {1, 2, 3, 5, 7, 10, 35}) {
        if (channels % size == 0 && size < channels) check_groups(layout, dtype, isa, channels / size);
      }
    }
  }
  what = std::string("second_moment, bad arguments, ") + isa_name(isa);
  const int64_t one[4] = {1, 1, 1, 1}, negative[4] = {1, 1, 1, -1}, none[4] = {1, 0, 1, 1};
  float feature = 1;
  double sum = 0;
  const auto refused = [&](const float* features, const int64_t sizes[4], const int64_t strides[4], double* out) {
    return second_moment(features, DType::float32, sizes, strides, out, 1, isa) == Status::bad_argument;
  };
  check(refused(&feature, one, negative, &sum), "a negative stride");
  check(refused(&feature, none, one, &sum), "no channels");
  check(refused(nullptr, one, one, &sum), "no features");
  check(refused(&feature, one, one, nullptr), "no output");
  for (int64_t groups : {0, 2}) {
    check(second_moment(&feature, DType::float32, one, one, &sum, 1, isa, groups) == Status::bad_argument,
          "its groups");
  }
  check(sum == 0, "a refused call writes");
}

// --- Cholesky ----------------------------------------------------------------------------------------------------

// A well-conditioned one: B B^T / n + 1.
std::vector<double> positive_definite(int64_t batch, int64_t n) {
  std::vector<double> matrices(batch * n * n);
  for (int64_t b = 0; b < batch; ++b) {
    const std::vector<double> root = normals(n * n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = i == j;
        for (int64_t k = 0; k < n; ++k) sum += root[i * n + k] * root[j * n + k] / static_cast<double>(n);
        matrices[(b * n + i) * n + j] = sum;
      }
  }
  return matrices;
}

void check_cholesky(int64_t batch, int64_t n, int64_t sides, Isa isa) {
  what = "cholesky, " + std::to_string(batch) + " of " + std::to_string(n) + ", " + std::to_string(sides) +
         " right-hand sides, " + isa_name(isa);
  const std::vector<double> matrices = positive_definite(batch, n);
  std::vector<double> lower(matrices.size(), NAN), again = lower;
  std::vector<int64_t> info(batch, -1);
  check(cholesky(matrices.data(), lower.data(), batch, n, 1e-13, info.data(), 1, isa) == Status::ok, "its status");
  check(std::all_of(info.begin(), info.end(), [](int64_t i) { return i == 0; }), "its info");
  check(cholesky(matrices.data(), again.data(), batch, n, 1e-13, info.data(), 5, isa) == Status::ok,
        "its status with threads");
  check(same_bits(lower, again), "the number of threads changes its bits");
  double worst = 0, above = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const double* l = lower.data() + b * n * n;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0;
        for (int64_t k = 0; k <= j; ++k) sum += l[i * n + k] * l[j * n + k];
        worst = std::max(worst, std::abs(sum - matrices[(b * n + i) * n + j]));
        if (j < i) above = std::max(above, std::abs(l[j * n + i]));
      }
  }
  check(worst < 1e-12 * static_cast<double>(n + 10), "L L^T");
  check(above == 0, "its upper triangle");

  std::vector<double> right = normals(batch * sides * n);
  const auto residual = [&](const std::vector<double>& x) {
    double largest = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t m = 0; m < sides; ++m)
        for (int64_t i = 0; i < n; ++i) {
          double sum = -right[(b * n + i) * sides + m];
          for (int64_t j = 0; j < n; ++j) sum += matrices[(b * n + i) * n + j] * x[(b * n + j) * sides + m];
          largest = std::max(largest, std::abs(sum));
        }
    return largest;
  };
  const double most = 1e-12 * static_cast<double>(n + 10);
  const SPDLimits limits{1e-6, 1e-290, 1e-13};
  std::vector<double> x(right.size(), NAN), sketches(2 * sketch_rows * batch * n, NAN);
  check(sketch(matrices.data(), batch, n, sketches.data(), 1, isa) == Status::ok, "the sketch's status");
  for (int threads : {1, 5}) {
    std::vector<double> mine(right.size(), NAN), all = mine, sketched = mine, other(sketches.size(), NAN);
    bool finite = false, good = false;
    check(sketch(matrices.data(), batch, n, other.data(), threads, isa) == Status::ok && same_bits(other, sketches),
          "the number of threads changes the sketch's bits");
    check(cholesky_solve(matrices.data(), lower.data(), sketches.data(), batch, n, right.data(), sides, sketched.data(),
                         finite, threads, isa) == Status::ok &&
              finite,
          "the sketched solve's status");
    check(cholesky_solve(matrices.data(), lower.data(), nullptr, batch, n, right.data(), sides, mine.data(), finite,
                         threads, isa) == Status::ok &&
              finite,
          "the solve's status");
    check(spd_solve(matrices.data(), batch, n, limits, right.data(), sides, all.data(), good, threads, isa) ==
                  Status::ok &&
              good,
          "the whole's status");
    if (threads == 1) x = mine;
    check(same_bits(x, mine), "the number of threads changes the solve's bits");
    check(same_bits(x, all), "the whole in one call gives other bits");
    check(same_bits(x, sketched), "a sketch gives other bits");
  }
  check(residual(x) < most, "the solve's residual");

  // A factor of a matrix that is a little off: the residual tells, and the solve is refined.
  std::vector<double> off = lower;
  for (double& entry : off) entry *= 1 + 1e-9;
  bool finite = false;
  for (const double* sketched : {static_cast<const double*>(nullptr), static_cast<const double*>(sketches.data())}) {
    check(cholesky_solve(matrices.data(), off.data(), sketched, batch, n, right.data(), sides, x.data(), finite, 5,
                         isa) == Status::ok,
          "the refined solve's status");
    check(residual(x) < most, "the refined solve's residual");
  }

  if (right.empty()) return;
  bool good = true;
  right.back() = INFINITY;
  check(cholesky_solve(matrices.data(), lower.data(), nullptr, batch, n, right.data(), sides, x.data(), finite, 1,
                       isa) == Status::ok &&
            !finite,
        "an infinite right-hand side goes unseen");
  check(
      spd_solve(matrices.data(), batch, n, limits, right.data(), sides, x.data(), good, 5, isa) == Status::ok && !good,
      "an infinite right-hand side goes unseen");
  right.back() = 1;
  for (int kind = 0; kind < 3; ++kind) {
    std::vector<double> bad = matrices;
    if (kind == 0) bad[bad.size() - n * n] = -1;
    if (kind == 1) bad.back() = NAN;
    if (kind == 2 && n > 1) bad[bad.size() - 2] += 1e3;
    if (kind == 2 && n == 1) continue;
    good = true;
    check(spd_solve(bad.data(), batch, n, limits, right.data(), sides, x.data(), good, 1, isa) == Status::ok && !good,
          "a matrix that cannot be solved with goes unseen");
  }
}

// Substitutions that threads share, with a factor that is not quite the matrix's: they run for the change, too.
void check_shared_solves(int64_t n, int64_t sides, Isa isa) {
  what =
      "a shared solve of " + std::to_string(n) + ", " + std::to_string(sides) + " right-hand sides, " + isa_name(isa);
  std::vector<double> matrix(n * n, 0.0), lower = matrix;
  for (int64_t i = 0; i < n; ++i) {
    matrix[i * n + i] = 4;
    for (int64_t j = 0; j < i; ++j) lower[i * n + j] = 1e-9 * static_cast<double>((i + 3 * j) % 7);
    lower[i * n + i] = 2;
  }
  const std::vector<double> right = normals(n * sides);
  std::vector<double> alone(right.size(), NAN), shared = alone;
  bool finite = false;
  for (int threads : {1, 5}) {
    check(cholesky_solve(matrix.data(), lower.data(), nullptr, 1, n, right.data(), sides,
                         (threads == 1 ? alone : shared).data(), finite, threads, isa) == Status::ok &&
              finite,
          "its status");
  }
  check(same_bits(alone, shared), "the number of threads changes its bits");
  double worst = 0;
  for (int64_t i = 0; i < n * sides; ++i) worst = std::max(worst, std::abs(4 * alone[i] - right[i]));
  check(worst < 1e-8, "its residual");
}

// `examine` has one variant for all instruction sets.
void check_examine(int64_t batch, int64_t n) {
  what = "examine, " + std::to_string(batch) + " of " + std::to_string(n);
  std::vector<double> matrices = positive_definite(batch, n);
  for (double& entry : matrices) entry += 1e-3 * normal();
  for (bool finite : {true, false}) {
    if (!finite) matrices[batch * n * n - n] = INFINITY;  // the last row's first entry
    for (int threads : {1, 5}) {
      std::vector<double> found(3 * batch, -1);
      check(examine(matrices.data(), batch, n, found.data(), threads) == Status::ok, "its status");
      bool right = true;
      for (int64_t b = 0; b < batch; ++b) {
        const double* const a = matrices.data() + b * n * n;
        double mean = 0, largest = 0, difference = 0;
        for (int64_t i = 0; i < n; ++i) {
          mean += a[i * n + i] / static_cast<double>(n);
          largest = std::max(largest, std::abs(a[i * n + i]));
          for (int64_t j = 0; j < i; ++j) difference = std::max(difference, std::abs(a[i * n + j] - a[j * n + i]));
        }
        const double* const mine = found.data() + 3 * b;
        if (!finite && b == batch - 1) {
          right &= std::isnan(mine[2]);
        } else {
          right &= std::abs(mine[0] - mean) <= 1e-12 * std::abs(mean) && mine[1] == largest && mine[2] == difference;
        }
      }
      check(right, "what it finds");
    }
  }
}

void check_choleskys(bool smallest, Isa isa) {
  for (int64_t n : smallest ? std::vector<int64_t>{1, 3, 9} : std::vector<int64_t>{1, 2, 7, 31, 63, 64, 65, 130, 261}) {
    check_cholesky(1, n, 1, isa);
    check_cholesky(n < 100 ? 5 : 2, n, 7, isa);
    check_cholesky(1, n, smallest ? 2 : 53, isa);
  }
  for (int64_t sides : {3, 4, 20}) {
    if (!smallest) check_shared_solves(1100, sides, isa);
  }
  if (!smallest && isa == Isa::portable) check_shared_solves(2050, 7, isa);  // in more than one panel
  check_cholesky(0, 4, 2, isa);
  check_cholesky(2, 4, 0, isa);
  const int64_t n = smallest ? 9 : 150;
  what = std::string("cholesky, not positive definite, ") + isa_name(isa);
  for (int threads : {1, 5}) {
    std::vector<double> matrices = positive_definite(3, n);
    matrices[n * n + (n - 3) * n + n - 3] = -1e3;  // in the last block of the second one
    std::vector<double> lower(matrices.size());
    std::vector<int64_t> info(3, -1);
    check(cholesky(matrices.data(), lower.data(), 3, n, 1e-13, info.data(), threads, isa) == Status::ok, "its status");
    check(info[0] == 0 && info[1] == n - 2 && info[2] == 0, "its info");
  }
}

// --- fits ----------------------------------------------------------------------------------------------------------

struct FitCase {
  const char* name;
  int64_t edits, channels, unknowns, pixels;
  double slope;
  bool absolute, demodulated, penalised, weighted, broadcast_shift;
  int64_t styles = 1;
};

template <class Real>
void check_fit(const FitCase& given, Isa isa) {
  constexpr bool wide = std::is_same_v<Real, double>;
  what = std::string("fit_low_rank, ") + given.name + (wide ? ", double, " : ", float, ") + isa_name(isa);
  const int64_t edits = given.edits, channels = given.channels, unknowns = given.unknowns, pixels = given.pixels;
  const auto random = [](int64_t count) {
    std::vector<Real> values(count);
    for (Real& value : values) value = static_cast<Real>(normal());
    return values;
  };
  const std::vector<Real> basis = random(edits * unknowns * pixels), base = random(edits * channels * pixels);
  const std::vector<Real> target = random(edits * channels * pixels);
  const std::vector<Real> shift = random(given.broadcast_shift ? channels : edits * channels * pixels);
  const int64_t styles = given.styles;
  std::vector<double> constant(edits * styles * channels), linear = normals(edits * styles * channels * unknowns, 0.01);
  for (double& value : constant) value = 1 + std::abs(normal());
  const std::vector<double> quadratic = positive_definite(edits * styles, unknowns);
  const std::vector<double> penalty = positive_definite(edits, unknowns);
  std::vector<double> scale(edits * channels, 0.1), weights(edits * pixels, 1);
  for (int64_t i = 0; given.weighted && i < edits * pixels; ++i) {
    weights[i] = i % 3 ? 0.5 + static_cast<double>(i % 5) : 0;
  }

  std::vector<int64_t> segments(edits * pixels);
  for (int64_t i = 0; i < edits * pixels; ++i) segments[i] = i * i % styles;

  FitLowRankProblem problem{};
  problem.basis = basis.data();
  problem.base = base.data();
  problem.target = target.data();
  problem.shift = shift.data();
  const int64_t dense[3] = {channels * pixels, pixels, 1}, broadcast[3] = {0, 1, 0};
  std::copy_n(given.broadcast_shift ? broadcast : dense, 3, problem.shift_strides);
  problem.is_double = wide;
  if (given.demodulated) {
    problem.constant = constant.data();
    problem.linear = linear.data();
    problem.quadratic = quadratic.data();
  }
  if (given.penalised) {
    problem.penalty = penalty.data();
    problem.penalty_scale = scale.data();
  }
  if (given.weighted) problem.pixel_weights = weights.data();
  if (styles > 1) problem.segments = segments.data();
  problem.styles = styles;
  problem.edits = edits;
  problem.channels = channels;
  problem.unknowns = unknowns;
  problem.pixels = pixels;
  problem.slope = given.slope;
  problem.gain = 1.5;
  problem.absolute = given.absolute;
  problem.max_iterations = 25;
  problem.tolerance = 1e-5;

  struct Outputs {
    std::vector<Real> coefficients;
    std::vector<double> loss, initial;
    std::vector<int32_t> iterations, status;
  };
  const auto run = [&](int threads) {
    Outputs outputs{std::vector<Real>(edits * channels * unknowns, std::numeric_limits<Real>::quiet_NaN()),
                    std::vector<double>(edits * channels, NAN), std::vector<double>(edits * channels, NAN),
                    std::vector<int32_t>(edits * channels, -1), std::vector<int32_t>(edits * channels, -1)};
    FitLowRankProblem filled = problem;
    filled.coefficients = outputs.coefficients.data();
    filled.loss = outputs.loss.data();
    filled.initial_loss = outputs.initial.data();
    filled.iterations = outputs.iterations.data();
    filled.status = outputs.status.data();
    bool finite = false;
    check(fit_low_rank(filled, finite, threads, isa) == Status::ok && finite, "its status");
    return outputs;
  };
  const Outputs found = run(1), threaded = run(5);
  check(found.coefficients == threaded.coefficients && same_bits(found.loss, threaded.loss) &&
            found.iterations == threaded.iterations && found.status == threaded.status,
        "the number of threads changes its results");

  // What rewrite_core/ops/fit_low_rank_op/problem.py documents, read back as plain loops.
  const auto objective = [&](int64_t b, int64_t o, const std::vector<double>& x) {
    std::vector<double> norms(styles, 1);
    for (int64_t style = 0; given.demodulated && style < styles; ++style) {
      const int64_t own = b * styles + style;
      double& norm = norms[style] = constant[own * channels + o];
      for (int64_t i = 0; i < unknowns; ++i) {
        norm += 2 * linear[(own * channels + o) * unknowns + i] * x[i];
        for (int64_t j = 0; j < unknowns; ++j) norm += x[i] * quadratic[(own * unknowns + i) * unknowns + j] * x[j];
      }
    }
    double sum = 0, total = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      double value = base[(b * channels + o) * pixels + p];
      for (int64_t i = 0; i < unknowns; ++i) value += x[i] * basis[(b * unknowns + i) * pixels + p];
      const int64_t* const strides = problem.shift_strides;
      value =
          value / std::sqrt(norms[segments[b * pixels + p]]) + shift[b * strides[0] + o * strides[1] + p * strides[2]];
      value = 1.5 * (value > 0 ? value : given.slope * value) - target[(b * channels + o) * pixels + p];
      sum += weights[b * pixels + p] * (given.absolute ? std::abs(value) : value * value);
      total += weights[b * pixels + p];
    }
    double fine = 0;
    for (int64_t i = 0; given.penalised && i < unknowns; ++i)
      for (int64_t j = 0; j < unknowns; ++j)
        fine += scale[b * channels + o] * x[i] * penalty[(b * unknowns + i) * unknowns + j] * x[j];
    return std::pair<double, double>(sum / total, sum / total + fine);
  };
  const double tolerance = wide ? 1e-9 : 1e-4;
  bool right = true, starts = true, lower = true, best = true;
  for (int64_t b = 0; b < edits; ++b)
    for (int64_t o = 0; o < channels; ++o) {
      const int64_t at = b * channels + o;
      const Real* const coefficients = found.coefficients.data() + at * unknowns;
      const std::vector<double> x(coefficients, coefficients + unknowns);
      const auto [loss, all] = objective(b, o, x);
      const double initial = objective(b, o, std::vector<double>(unknowns, 0.0)).second;
      right &= std::abs(loss - found.loss[at]) <= tolerance * (1 + loss);
      starts &= std::abs(initial - found.initial[at]) <= tolerance * (1 + initial);
      lower &= all <= initial * (1 + tolerance);
      for (int64_t i = 0; i < unknowns; ++i)  // no neighbour is clearly better
        for (double step : {-1e-2, 1e-2}) {
          std::vector<double> near = x;
          near[i] += step;
          best &= objective(b, o, near).second >= all - (given.absolute ? 3e-3 : 1e-3) * (1 + all);
        }
    }
  check(right, "its loss");
  check(starts, "its initial loss");
  check(lower, "it is no better than no change");
  check(best, "it is no minimum");
}

void check_fits(bool smallest, Isa isa) {
  const std::vector<FitCase> cases = {
      {"one number", 1, 1, 1, 1, 1.0, true, false, false, false, false},
      {"least squares", 2, 3, 4, 15, 1.0, false, false, false, true, true},
      {"leaky", 1, 3, 5, 21, 0.2, true, false, false, true, false},
      {"demodulated", 2, 2, 3, 17, 0.2, true, true, false, false, true},
      {"few pixels", 1, 3, 9, 4, 0.2, true, false, false, false, false},
      {"no edits", 0, 3, 4, 5, 0.2, true, false, false, false, true},
      {"no channels", 2, 0, 4, 5, 0.2, true, false, false, false, true},
      {"least squares, penalised", 3, 17, 13, 101, 1.0, false, false, true, false, false},
      {"rank 2, all at once", 5, 40, 18, 100, 0.2, true, true, true, true, false},
      {"squares, leaky, few pixels", 3, 9, 27, 11, 0.2, false, true, false, true, true},
      {"two styles", 1, 3, 3, 17, 0.2, true, true, false, false, true, 2},
      {"three styles, few pixels", 2, 3, 40, 14, 0.2, true, true, false, true, false, 3},
      {"three styles, penalised", 2, 5, 13, 150, 0.2, false, true, true, true, false, 3},
  };
  for (const FitCase& one : cases) {
    if (smallest && one.edits * one.channels * one.unknowns * one.pixels > 500) continue;
    check_fit<float>(one, isa);
    check_fit<double>(one, isa);
  }
}

// --- projected fits ------------------------------------------------------------------------------------------------

struct ProjectedCase {
  int tile;
  int64_t channels, taps, height, width, rank;
  bool absolute, demodulated, project_gradient;
};

// The maps are random: without a transform they are the operator itself, and plain loops follow all steps; with one no
// more than the first loss is compared.
void check_projected(const ProjectedCase& given, Isa isa) {
  const int64_t channels = given.channels, taps = given.taps, pixels = given.height * given.width, rank = given.rank;
  const int64_t inputs = 2 * fit_projected_constants::GROUP, tile = given.tile, steps = 4, every = 2;
  what = "fit_projected, tile " + std::to_string(tile) + ", " + std::to_string(channels) + " channels, " +
         std::to_string(taps) + " taps, rank " + std::to_string(rank) + ", " + isa_name(isa);
  const auto random = [](int64_t count, float scale) {
    std::vector<float> values(count);
    for (float& value : values) value = scale * static_cast<float>(normal());
    return values;
  };
  FitProjectedProblem problem{};
  problem.tile = given.tile;
  problem.inputs = inputs;
  problem.taps = taps;
  problem.height = given.height;
  problem.width = given.width;
  problem.pixels = pixels;
  problem.channels = channels;
  problem.rank = rank;
  problem.products = tile ? (tile + 2) * (tile + 2) : taps;
  problem.slots = tile ? (given.height + tile - 1) / tile * ((given.width + tile - 1) / tile) : pixels;
  const std::vector<float> maps = random(inputs * problem.products * problem.slots, 1);
  const std::vector<float> base = random(channels * pixels, 1);
  const std::vector<float> target = random(channels * pixels, 1), value = random(channels * pixels, 1);
  const std::vector<float> shift = random(channels, 1), weight = random(channels * inputs * taps, 0.3f);
  const std::vector<float> directions = random(rank * inputs, 0.25f);
  std::vector<float> square = random(inputs, 1), basis(rank * taps * pixels);
  for (float& number : square) number *= number;
  const auto operate = [&](int64_t i, int64_t t, int64_t p) {
    return maps[((i / fit_projected_constants::GROUP * taps + t) * pixels + p) * fit_projected_constants::GROUP +
                i % fit_projected_constants::GROUP];
  };
  for (int64_t k = 0; !tile && k < rank * taps * pixels; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < inputs; ++i) {
      sum += directions[k / (taps * pixels) * inputs + i] * operate(i, k / pixels % taps, k % pixels);
    }
    basis[k] = static_cast<float>(sum);
  }
  std::vector<float> rates(2 * steps);
  for (int64_t step = 0; step < steps; ++step) {
    rates[2 * step] = static_cast<float>(0.01 / (1 - std::pow(0.9, step + 1)));
    rates[2 * step + 1] = static_cast<float>(1 / std::sqrt(1 - std::pow(0.999, step + 1)));
  }
  problem.maps = maps.data();
  problem.base = base.data();
  problem.target = target.data();
  problem.value = value.data();
  problem.shift = shift.data();
  problem.shift_strides[0] = 1;
  if (given.demodulated) {
    problem.weight = weight.data();
    problem.square = square.data();
  }
  problem.directions = directions.data();
  problem.basis = basis.data();
  problem.eps = 1e-8f;
  problem.slope = 0.2f;
  problem.gain = 1.5f;
  problem.absolute = given.absolute;
  problem.steps = steps;
  problem.project_every = every;
  problem.project_gradient = given.project_gradient;
  problem.rates = rates.data();

  const int64_t lanes = projected_lanes(isa), blocks = (channels + lanes - 1) / lanes, kept = rank ? rank : inputs;
  std::vector<double> losses[2];
  std::vector<float> coefficients[2];
  for (int each : {0, 1}) {  // all blocks by one thread; the first block, then the others by several
    problem.losses = (losses[each] = std::vector<double>(blocks * steps, NAN)).data();
    problem.coefficients = (coefficients[each] = std::vector<float>(channels * kept * taps, NAN)).data();
    const int64_t first = each ? std::min<int64_t>(blocks, 1) : blocks;
    check(fit_projected(problem, 0, first, 1, isa) == Status::ok, "its status");
    check(fit_projected(problem, first, blocks - first, 5, isa) == Status::ok, "its status");
  }
  check(same_bits(losses[0], losses[1]) && coefficients[0] == coefficients[1], "threads or ranges change its bits");
  check(fit_projected(problem, 0, blocks + 1, 1, isa) == Status::bad_argument, "more blocks than there are");

  bool starts = true, follows = true, ends = true, finite = true;
  for (double loss : losses[0]) finite &= std::isfinite(loss);
  for (float number : coefficients[0]) finite &= std::isfinite(number);
  check(finite, "a number that is not finite");
  std::vector<double> want(blocks * steps), result(channels * kept * taps);
  for (int64_t o = 0; o < channels; ++o) {
    std::vector<double> change(inputs * taps), mean(inputs * taps), power(inputs * taps), gradient(inputs * taps);
    const auto project = [&](std::vector<double>& rows, double* out) {  // in place, and the coefficients
      std::vector<double> part(rank * taps);
      for (int64_t k = 0; k < rank * inputs * taps; ++k) {
        part[k / (inputs * taps) * taps + k % taps] += directions[k / taps] * rows[k % (inputs * taps)];
      }
      std::fill(rows.begin(), rows.end(), 0.0);
      for (int64_t k = 0; k < rank * inputs * taps; ++k) {
        rows[k % (inputs * taps)] += directions[k / taps] * part[k / (inputs * taps) * taps + k % taps];
      }
      if (out) std::copy(part.begin(), part.end(), out);
    };
    for (int64_t step = 0; step < (tile ? 1 : steps); ++step) {
      const auto whole = [&](int64_t k) { return weight[o * inputs * taps + k] + change[k]; };
      double norm = problem.eps, along = 0;
      for (int64_t k = 0; k < inputs * taps; ++k) norm += square[k / taps] * whole(k) * whole(k);
      const double m = given.demodulated ? 1 / std::sqrt(norm) : 1;
      std::fill(gradient.begin(), gradient.end(), 0.0);
      for (int64_t p = 0; p < pixels; ++p) {
        double lin = base[o * pixels + p];
        for (int64_t k = 0; step && k < inputs * taps; ++k) lin += change[k] * operate(k / taps, k % taps, p);
        const double pre = m * lin + shift[o], steep = pre > 0 ? 1.5 : 1.5 * problem.slope;
        const double r = steep * pre - target[o * pixels + p];
        want[o / lanes * steps + step] += given.absolute ? std::abs(r) : r * r;
        const double by_value = given.absolute ? (r > 0 ? 1 : -1) : 2 * r;
        const double slope = steep * by_value / static_cast<double>(channels * pixels);
        along += slope * lin;
        for (int64_t k = 0; !tile && k < inputs * taps; ++k) gradient[k] += slope * m * operate(k / taps, k % taps, p);
      }
      for (int64_t k = 0; given.demodulated && k < inputs * taps; ++k) {
        gradient[k] -= along * m * m * m * square[k / taps] * whole(k);
      }
      if (given.project_gradient) project(gradient, nullptr);
      for (int64_t k = 0; k < inputs * taps; ++k) {
        mean[k] += 0.1 * (gradient[k] - mean[k]);
        power[k] += 0.001 * (gradient[k] * gradient[k] - power[k]);
        change[k] -= rates[2 * step] * mean[k] / (std::sqrt(power[k]) * rates[2 * step + 1] + 1e-8);
      }
      if (rank && (step % every == 0 || step == steps - 1)) project(change, result.data() + o * kept * taps);
    }
    if (!rank) std::copy(change.begin(), change.end(), result.data() + o * kept * taps);
  }
  for (int64_t k = 0; k < blocks * steps; ++k) {
    const bool close = std::abs(losses[0][k] - want[k]) <= 1e-4 * want[k];
    (k % steps ? follows : starts) &= close;
  }
  for (int64_t k = 0; k < channels * kept * taps; ++k) ends &= std::abs(coefficients[0][k] - result[k]) <= 1e-3;
  check(starts, "its first loss");
  check(tile || follows, "its losses");
  check(tile || ends, "its coefficients");
}

void check_all_projected(bool smallest, Isa isa) {
  const std::vector<ProjectedCase> cases = {
      {0, 1, 1, 1, 1, 0, true, false, false},    {0, 3, 4, 2, 3, 1, false, true, false},
      {2, 2, 9, 3, 3, 0, true, true, false},     {0, 0, 4, 5, 4, 2, true, true, false},
      {0, 17, 9, 5, 4, 2, true, true, false},    {0, 33, 9, 3, 11, 2, false, true, true},
      {0, 33, 64, 2, 9, 0, false, false, false}, {0, 17, 64, 2, 4, 2, true, false, true},
      {2, 33, 9, 5, 4, 2, true, true, false},    {2, 17, 9, 1, 1, 2, false, true, true},
      {4, 33, 9, 3, 11, 0, true, true, false},   {4, 1, 9, 6, 9, 2, false, false, true},
      {5, 17, 9, 5, 4, 2, false, true, false},   {5, 33, 9, 6, 11, 2, true, false, false},
  };
  for (const ProjectedCase& one : cases) {
    if (!smallest || one.channels * one.taps * one.height * one.width <= 200) check_projected(one, isa);
  }
}

// --- threads -------------------------------------------------------------------------------------------------------

// Several callers at once, many phases, helpers that come and go: every task of every phase is done once, before the
// phase ends, and workers have numbers of their own.
void check_team(bool smallest) {
  const int callers = 3, phases = smallest ? 3 : 200, workers = 5;
  const int64_t tasks = 40;
  std::vector<char> right(callers, true);
  const auto call = [&](int caller) {
    bool good = true;
    std::vector<int64_t> done(tasks);
    std::vector<std::atomic<int>> inside(workers);
    for (int repeat = 0; repeat < 3; ++repeat) {
      Team::run(workers, [&](Team& team) {
        good &= team.workers() == workers;
        for (int phase = 0; phase < phases; ++phase) {
          std::fill(done.begin(), done.end(), 0);
          std::atomic<bool> alone{true};
          team.each([&](int worker) {
            if (worker < 0 || worker >= workers || inside[worker]++) alone = false;
            for (int64_t task = team.next(); task < tasks; task = team.next()) done[task] += task + phase;
            --inside[worker];
          });
          for (int64_t task = 0; task < tasks; ++task) good &= done[task] == task + phase;
          good &= alone;
        }
        if (repeat == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // helpers are asleep then
      });
    }
    right[caller] = good;
  };
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) threads.emplace_back(call, caller);
  for (std::thread& thread : threads) thread.join();
  check(std::find(right.begin(), right.end(), false) == right.end(), "a team's tasks");
}

// --- mistakes ------------------------------------------------------------------------------------------------------

int make(const std::string& mistake) {
  const int64_t sizes[4] = {100, 3, 1, 1}, strides[4] = {3, 1, 0, 0};
  std::vector<float> features(mistake == "overrun" ? 299 : 300, 1.0f);
  std::vector<double> out(9);
  const auto run = [&] {
    second_moment(features.data(), DType::float32, sizes, strides, out.data(), 1, Isa::portable);
  };
  if (mistake == "race") {
    std::thread other(run);
    run();
    other.join();
  } else if (mistake == "overrun") {
    run();
  } else {
    double* const matrix = static_cast<double*>(std::malloc(4 * sizeof(double)));
    double lower[4];
    int64_t info = 0;
    cholesky(matrix, lower, 1, 2, 0.0, &info, 1, Isa::portable);
    std::printf("%d\n", info != 0);
    std::free(matrix);
  }
  return 0;
}

}  // namespace

// Calls of `milliseconds` from `now` on, each of which waits for helpers `late` ones; how many would do without.
int calls(Crowd& crowd, int& now, int milliseconds, int count, bool late) {
  int without = 0;
  for (int call = 0; call < count; ++call) {
    const bool alone = crowd.expected(std::chrono::milliseconds(now));
    without += alone;
    now += milliseconds;
    if (!alone) crowd.waited(std::chrono::milliseconds(late ? 3 : 0), std::chrono::milliseconds(now));
  }
  return without;
}

void check_crowd() {
  Crowd crowd;
  int now = 1000;
  for (int round = 0; round < 20; ++round) {  // for some milliseconds another program's threads spin
    check(calls(crowd, now, 3, 4, true) == 0, "late calls for a moment");
    check(calls(crowd, now, 3, 50, false) == 0, "calls after a moment of late ones");
  }
  check(calls(crowd, now, 200, 20, true) == 0, "late calls that are far apart");
  for (int round = 0; round < 10; ++round) {  // a core that is another program's half of the time
    calls(crowd, now, 1, 4, true);
    calls(crowd, now, 1, 4, false);
  }
  check(calls(crowd, now, 1, 1000, true) > 900, "a core that is taken");
  check(calls(crowd, now, 1, 1000, false) < 200, "a core that is free again");
  check(calls(crowd, now, 1, 1000, false) == 0, "a core that is free");
  check(calls(crowd, now, 3, 4, true) == 0, "late calls for a moment, long after a core was taken");
}

int main(int count, char** arguments) {
  bool smallest = false;
  std::vector<std::string> named;
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    if (word == "overrun" || word == "race" || word == "unwritten") return make(word);
    if (word == "smallest") {
      smallest = true;
    } else {
      named.push_back(word);
    }
  }
  std::string ran;
  check_team(smallest);
  check_crowd();
  for (int64_t n : smallest ? std::vector<int64_t>{1, 9} : std::vector<int64_t>{1, 9, 64, 65, 300}) check_examine(2, n);
  for (int number = 0; number <= static_cast<int>(detect_isa()); ++number) {
    const Isa isa = static_cast<Isa>(number);
    if (!named.empty() && std::find(named.begin(), named.end(), isa_name(isa)) == named.end()) continue;
    for (const auto& checks_of : {check_second_moments, check_choleskys, check_fits, check_all_projected}) {
      generator.seed(1);  // what one draws changes nothing for the next
      checks_of(smallest, isa);
    }
    ran += std::string(" ") + isa_name(isa);
  }
  std::printf("%d checks, %d wrong, on%s\n", checks, failures, ran.empty() ? " nothing" : ran.c_str());
  return failures || ran.empty();
}
