// All pybind11 code. Functions take addresses (tensor.data_ptr()), sizes and strides in elements, and the
// thread count; Python has checked them. A bad status becomes an exception here and nowhere else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"
#include "fit_low_rank.h"
#include "fit_projected.h"
#include "second_moment.h"
#include "spd_solve.h"

namespace py = pybind11;
using namespace rewrite_core;

namespace {

void check(Status status, const char* where) {
  if (status == Status::ok) return;
  if (status == Status::out_of_memory) throw std::bad_alloc();
  throw std::runtime_error(std::string(where) + ": " + status_message(status) + ".");
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// An instruction set by name, "" for the best one: tests run every one the CPU has.
Isa isa_of(const std::string& name) {
  if (name.empty()) return detect_isa();
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(isa) && isa <= detect_isa()) return isa;
  }
  throw std::invalid_argument("this CPU has no instruction set " + name + ".");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "rewrite_core's CPU kernels; called through rewrite_core.ops.";
  m.def("isa", [] { return isa_name(detect_isa()); }, "The instruction set the kernels use on this CPU.");

  m.def(
      "source", [] { return std::string(REWRITE_CORE_SOURCE); },
      "Digest of the sources this was built with (rewrite_core.version.source_digest).");

  m.def(
      "second_moment",
      [](std::uintptr_t features, int dtype, std::array<int64_t, 4> sizes, std::array<int64_t, 4> strides,
         std::uintptr_t out, int threads, const std::string& isa) {
        const Isa use = isa_of(isa);
        Status status;
        {
          py::gil_scoped_release release;
          status = second_moment(pointer<const void>(features), static_cast<DType>(dtype), sizes.data(), strides.data(),
                                 pointer<double>(out), threads, use);
        }
        check(status, "second_moment");
      },
      py::arg("features"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("out"), py::arg("threads"),
      py::arg("isa") = "",
      "out [c, c] += the second moment of features (n, c, h, w); dtype 0 float32, 1 float64, 2 bfloat16, "
      "3 float16.");

  m.def(
      "examine",
      [](std::uintptr_t matrices, int64_t batch, int64_t n, int threads) {
        std::vector<std::array<double, 3>> found(batch);
        Status status;
        {
          py::gil_scoped_release release;
          status = examine(pointer<const double>(matrices), batch, n, found.data()->data(), threads);
        }
        check(status, "examine");
        return found;
      },
      py::arg("matrices"), py::arg("batch"), py::arg("n"), py::arg("threads"),
      "Of each of [batch, n, n] doubles: the mean diagonal, the largest |diagonal|, and the largest |a_ij - a_ji|, NaN "
      "where anything is not finite.");

  m.def(
      "cholesky",
      [](std::uintptr_t matrices, int64_t batch, int64_t n, double least, std::uintptr_t info, int threads,
         const std::string& isa) {
        const Isa use = isa_of(isa);
        Status status;
        {
          py::gil_scoped_release release;
          status = cholesky(pointer<double>(matrices), batch, n, least, pointer<int64_t>(info), threads, use);
        }
        check(status, "cholesky");
      },
      py::arg("matrices"), py::arg("batch"), py::arg("n"), py::arg("least"), py::arg("info"), py::arg("threads"),
      py::arg("isa") = "",
      "Lower factors of [batch, n, n] doubles in place; info [batch] int64: 0, or the first pivot that is not above "
      "`least` times its diagonal entry.");

  m.def(
      "cholesky_solve",
      [](std::uintptr_t lower, int64_t batch, int64_t n, std::uintptr_t x, int64_t m, int threads,
         const std::string& isa) {
        const Isa use = isa_of(isa);
        Status status;
        {
          py::gil_scoped_release release;
          status = cholesky_solve(pointer<const double>(lower), batch, n, pointer<double>(x), m, threads, use);
        }
        check(status, "cholesky_solve");
      },
      py::arg("lower"), py::arg("batch"), py::arg("n"), py::arg("x"), py::arg("m"), py::arg("threads"),
      py::arg("isa") = "", "Solves L L^T x = b in place for x [batch, m, n].");

  m.def(
      "fit_low_rank",
      [](std::array<std::uintptr_t, 11> inputs, std::array<int64_t, 3> shift_strides, bool is_double,
         std::array<int64_t, 5> sizes, double slope, double gain, bool absolute, int max_iterations, double tolerance,
         std::array<std::uintptr_t, 5> outputs, int threads, const std::string& isa) {
        const Isa use = isa_of(isa);
        FitProblem problem{};
        problem.basis = pointer<const void>(inputs[0]);
        problem.base = pointer<const void>(inputs[1]);
        problem.target = pointer<const void>(inputs[2]);
        problem.shift = pointer<const void>(inputs[3]);
        for (int i = 0; i < 3; ++i) problem.shift_strides[i] = shift_strides[i];
        problem.is_double = is_double;
        problem.constant = pointer<const double>(inputs[4]);
        problem.linear = pointer<const double>(inputs[5]);
        problem.quadratic = pointer<const double>(inputs[6]);
        problem.pixel_weights = pointer<const double>(inputs[7]);
        problem.penalty = pointer<const double>(inputs[8]);
        problem.penalty_scale = pointer<const double>(inputs[9]);
        problem.segments = pointer<const int64_t>(inputs[10]);
        problem.edits = sizes[0];
        problem.channels = sizes[1];
        problem.unknowns = sizes[2];
        problem.pixels = sizes[3];
        problem.styles = sizes[4];
        problem.slope = slope;
        problem.gain = gain;
        problem.absolute = absolute;
        problem.max_iterations = max_iterations;
        problem.tolerance = tolerance;
        problem.coefficients = pointer<void>(outputs[0]);
        problem.loss = pointer<double>(outputs[1]);
        problem.initial_loss = pointer<double>(outputs[2]);
        problem.iterations = pointer<int32_t>(outputs[3]);
        problem.status = pointer<int32_t>(outputs[4]);
        Status status;
        {
          py::gil_scoped_release release;
          status = fit_low_rank(problem, threads, use);
        }
        check(status, "fit_low_rank");
      },
      py::arg("inputs"), py::arg("shift_strides"), py::arg("is_double"), py::arg("sizes"), py::arg("slope"),
      py::arg("gain"), py::arg("absolute"), py::arg("max_iterations"), py::arg("tolerance"), py::arg("outputs"),
      py::arg("threads"), py::arg("isa") = "",
      "inputs: basis, base, target, shift (float or double), constant, linear, quadratic, pixel_weights, "
      "penalty, penalty_scale (double), segments (int64), 0 where absent; sizes: edits, channels, unknowns, pixels, "
      "styles; outputs: "
      "coefficients, loss, initial_loss, iterations (int32), status (int32).");

  m.def(
      "projected_lanes", [](const std::string& isa) { return projected_lanes(isa_of(isa)); }, py::arg("isa") = "",
      "Channels in one block of fit_projected.");

  m.def(
      "fit_projected",
      [](std::array<std::uintptr_t, 9> inputs, std::array<int64_t, 2> shift_strides, std::array<int64_t, 9> sizes,
         std::array<float, 3> numbers, bool absolute, int64_t steps, int64_t project_every, bool project_gradient,
         std::uintptr_t rates, std::array<std::uintptr_t, 2> outputs, int64_t first, int64_t count, int threads,
         const std::string& isa) {
        const Isa use = isa_of(isa);
        ProjectedProblem problem{};
        problem.maps = pointer<const float>(inputs[0]);
        problem.base = pointer<const float>(inputs[1]);
        problem.target = pointer<const float>(inputs[2]);
        problem.value = pointer<const float>(inputs[3]);
        problem.shift = pointer<const float>(inputs[4]);
        problem.weight = pointer<const float>(inputs[5]);
        problem.square = pointer<const float>(inputs[6]);
        problem.directions = pointer<const float>(inputs[7]);
        problem.basis = pointer<const float>(inputs[8]);
        problem.shift_strides[0] = shift_strides[0];
        problem.shift_strides[1] = shift_strides[1];
        problem.tile = static_cast<int>(sizes[0]);
        problem.inputs = sizes[1];
        problem.taps = sizes[2];
        problem.height = sizes[3];
        problem.width = sizes[4];
        problem.pixels = sizes[3] * sizes[4];
        problem.channels = sizes[5];
        problem.rank = sizes[6];
        problem.products = sizes[7];
        problem.slots = sizes[8];
        problem.eps = numbers[0];
        problem.slope = numbers[1];
        problem.gain = numbers[2];
        problem.absolute = absolute;
        problem.steps = steps;
        problem.project_every = project_every;
        problem.project_gradient = project_gradient;
        problem.rates = pointer<const float>(rates);
        problem.losses = pointer<double>(outputs[0]);
        problem.coefficients = pointer<float>(outputs[1]);
        Status status;
        {
          py::gil_scoped_release release;
          status = fit_projected(problem, first, count, threads, use);
        }
        check(status, "fit_projected");
      },
      py::arg("inputs"), py::arg("shift_strides"), py::arg("sizes"), py::arg("numbers"), py::arg("absolute"),
      py::arg("steps"), py::arg("project_every"), py::arg("project_gradient"), py::arg("rates"), py::arg("outputs"),
      py::arg("first"), py::arg("count"), py::arg("threads"), py::arg("isa") = "",
      "inputs: maps, base, target, value, shift, weight, square, directions, basis (float), 0 where absent; sizes: "
      "tile, inputs, taps, height, width, channels, rank, products, slots; numbers: eps, slope, gain; outputs: losses "
      "[blocks, steps] (double), coefficients.");
}
