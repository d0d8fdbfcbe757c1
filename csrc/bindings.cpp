// All pybind11 code, and the only place that raises. Python passes each field of a call's struct by its name: addresses
// (tensor.data_ptr(), None where an optional one is absent), sizes, strides in elements, numbers. Python has checked
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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
#include "tensors.h"
#ifdef REWRITE_CORE_CUDA
#include "fit_projected_cuda.h"
#include "spd_solve_cuda.h"
#endif

namespace py = pybind11;
using namespace rewrite_core;

namespace {

// Runs the call without Python's lock; a bad status becomes an exception.
template <class Call>
void run(const char* op, Call call) {
  Status status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  if (status == Status::ok) return;
  if (status == Status::out_of_memory) throw std::bad_alloc();
  throw std::runtime_error(std::string(op) + ": " + status_message(status) + ".");
}

// An instruction set by name, "" for the best one: tests run every one the CPU has.
Isa isa_of(const std::string& name) {
  if (name.empty()) return detect_isa();
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(isa) && isa <= detect_isa()) return isa;
  }
  throw std::invalid_argument("this CPU has no instruction set " + name + ".");
}

DType dtype_of(const std::string& name) {
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw std::invalid_argument("there is no type " + name + ".");
}

// The keyword arguments of a call, by name; each is taken once. CPython's fast calling convention: a call of pybind11's
// own with as many keywords takes longer than the kernels on small input.
class Fields {
 public:
  Fields(PyObject* const* values, PyObject* names)
      : values_(values), names_(names), count_(names ? PyTuple_GET_SIZE(names) : 0) {}

  template <class T>
  T number(const char* name) {
    return cast<T>(name, need(name));
  }

  template <class T>
  T number(const char* name, T otherwise) {
    const py::handle value = find(name);
    return value ? cast<T>(name, value) : otherwise;
  }

  // An address, or None.
  template <class T>
  T* pointer(const char* name) {
    const py::handle value = need(name);
    if (!value.is_none()) return reinterpret_cast<T*>(cast<std::uintptr_t>(name, value));
    ++taken_;
    return nullptr;
  }

  template <int count>
  void numbers(const char* name, int64_t (&out)[count]) {
    const auto values = number<std::array<int64_t, count>>(name);
    std::copy(values.begin(), values.end(), out);
  }

  Isa isa() { return isa_of(number<std::string>("isa", "")); }

  // What nobody took is a mistake.
  void done() const {
    if (taken_ == count_) return;
    throw py::type_error(std::to_string(count_ - taken_) +
                         " of these fields are none of this call's: " + py::repr(names_).cast<std::string>() + ".");
  }

 private:
  template <class T>
  T cast(const char* name, py::handle value) {
    ++taken_;
    try {
      return value.cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string("the field ") + name + " has a value of the wrong type.");
    }
  }

  py::handle need(const char* name) {
    const py::handle value = find(name);
    if (!value) throw py::type_error(std::string("the field ") + name + " is missing.");
    return value;
  }

  py::handle find(const char* name) {
    for (Py_ssize_t tried = 0; tried < count_; ++tried) {  // from the one after the last: they often come in order
      const Py_ssize_t i = (next_ + tried) % count_;
      if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names_, i), name) != 0) continue;
      next_ = i + 1;
      return values_[i];
    }
    return {};
  }

  PyObject* const* values_;
  PyObject* names_;
  Py_ssize_t count_, taken_ = 0, next_ = 0;
};

// What `function` returns; errors of any kind become Python's.
template <class Function>
PyObject* python_call(const Function& function) {
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A function of Fields as a Python function.
template <py::object (*function)(Fields&)>
PyObject* python_function(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  return python_call([&] {
    if (positional) throw py::type_error("every field is passed by its name.");
    Fields fields(values, names);
    return function(fields).release().ptr();
  });
}

// A function of `count` values, by place.
template <auto function, int count>
PyObject* python_places(PyObject*, PyObject* const* values, Py_ssize_t given) {
  return python_call([&] {
    if (given != count) throw py::type_error(std::to_string(count) + " values are passed by their places.");
    return function(values).release().ptr();
  });
}

py::object call_second_moment(Fields& fields) {
  const void* features = fields.pointer<const void>("features");
  const DType dtype = dtype_of(fields.number<std::string>("dtype"));
  int64_t sizes[4], strides[4];
  fields.numbers("sizes", sizes);
  fields.numbers("strides", strides);
  double* out = fields.pointer<double>("out");
  const int threads = fields.number<int>("threads");
  const Isa isa = fields.isa();
  const int64_t groups = fields.number<int64_t>("groups", 1);
  fields.done();
  run("second_moment", [&] { return second_moment(features, dtype, sizes, strides, out, threads, isa, groups); });
  return py::none();
}

// A usual call of second_moment, of plain tensors on the CPU: features, out, groups, threads. False, and nothing is
// done, where it may be another one, or a mistake: Python's checks then say which. Few keys take less time than those
// checks do, where the caches hold nothing of them.
py::bool_ second_moment_at_once(PyObject* const* values) {
  const auto features = Tensors::all().plain(values[0]), out = Tensors::all().plain(values[1]);
  if (!features || !out || !PyLong_CheckExact(values[2])) return false;
  int no_number = 0;
  const int64_t groups = PyLong_AsLongLongAndOverflow(values[2], &no_number);  // then -1
  const std::optional<DType> dtype = dtype_of(*features);
  if (!dtype || (features->ndim != 2 && features->ndim != 4) || groups < 1) return false;
  int64_t sizes[4] = {1, 1, 1, 1}, strides[4] = {}, last = 0;
  for (int i = 0; i < features->ndim; ++i) {
    sizes[i] = features->shape[i];
    strides[i] = features->strides[i];
    if (sizes[i] < 1) return false;
    last += (sizes[i] - 1) * strides[i];
  }
  if (sizes[1] % groups || dtype_of(*out) != DType::float64 || out->ndim != (groups == 1 ? 2 : 3)) return false;
  const int64_t size = sizes[1] / groups, *shape = out->shape + out->ndim - 2;
  if (shape[0] != size || shape[1] != size || (groups > 1 && out->shape[0] != groups)) return false;
  if (!is_contiguous(*out) || Tensors::all().requires_grad(values[1])) return false;
  const char* const end = features->data + (last + 1) * (features->bits / 8);
  if (features->data < out->data + groups * size * size * 8 && out->data < end) return false;
  double* const sums = reinterpret_cast<double*>(out->data);
  const int threads = py::cast<int>(py::handle(values[3]));
  run("second_moment",
      [&] { return second_moment(features->data, *dtype, sizes, strides, sums, threads, detect_isa(), groups); });
  return true;
}

py::object call_examine(Fields& fields) {
  const double* matrices = fields.pointer<const double>("matrices");
  const int64_t batch = fields.number<int64_t>("batch"), n = fields.number<int64_t>("n");
  const int threads = fields.number<int>("threads");
  fields.done();
  std::vector<std::array<double, 3>> found(batch);
  run("examine", [&] { return examine(matrices, batch, n, found.data()->data(), threads); });
  return py::cast(found);
}

py::object call_cholesky(Fields& fields) {
  const double* matrices = fields.pointer<const double>("matrices");
  double* lower = fields.pointer<double>("lower");
  const int64_t batch = fields.number<int64_t>("batch"), n = fields.number<int64_t>("n");
  const double least = fields.number<double>("least");
  int64_t* info = fields.pointer<int64_t>("info");
  const int threads = fields.number<int>("threads");
  const Isa isa = fields.isa();
  fields.done();
  run("cholesky", [&] { return cholesky(matrices, lower, batch, n, least, info, threads, isa); });
  return py::none();
}

py::object call_sketch(Fields& fields) {
  const double* matrices = fields.pointer<const double>("matrices");
  const int64_t batch = fields.number<int64_t>("batch"), n = fields.number<int64_t>("n");
  double* sketches = fields.pointer<double>("sketches");
  const int threads = fields.number<int>("threads");
  const Isa isa = fields.isa();
  fields.done();
  run("sketch", [&] { return sketch(matrices, batch, n, sketches, threads, isa); });
  return py::none();
}

py::object call_cholesky_solve(Fields& fields) {
  const double* matrices = fields.pointer<const double>("matrices");
  const double* lower = fields.pointer<const double>("lower");
  const double* sketches = fields.pointer<const double>("sketches");
  const int64_t batch = fields.number<int64_t>("batch"), n = fields.number<int64_t>("n");
  const double* rhs = fields.pointer<const double>("rhs");
  const int64_t sides = fields.number<int64_t>("sides");
  double* x = fields.pointer<double>("x");
  const int threads = fields.number<int>("threads");
  const Isa isa = fields.isa();
  fields.done();
  bool finite = true;
  run("cholesky_solve",
      [&] { return cholesky_solve(matrices, lower, sketches, batch, n, rhs, sides, x, finite, threads, isa); });
  return py::bool_(finite);
}

SPDLimits limits_of(int64_t n, double asymmetry, double smallest_mean, double epsilon) {
  return {asymmetry, smallest_mean, static_cast<double>(n) * epsilon};
}

// Right-hand sides [..., n] or [..., n, m] of matrices [n, n] or [B, n, n], and memory for as many solutions.
struct Systems {
  int64_t batch, n, m;
  Doubles rhs, x;
};

// Nothing where the tensors are no such, or may be others.
std::optional<Systems> systems_of(const DLTensor& matrices, PyObject* given) {
  const Tensors& tensors = Tensors::all();
  const auto sides = tensors.plain(given);
  const int rows = matrices.ndim - 1;  // axes
  if (!sides || !dtype_of(*sides) || (rows != 1 && rows != 2) || (sides->ndim != rows && sides->ndim != rows + 1) ||
      dtype_of(matrices) != DType::float64 || matrices.shape[rows] != matrices.shape[rows - 1] ||
      !std::equal(sides->shape, sides->shape + rows, matrices.shape)) {
    return {};
  }
  const int64_t m = sides->ndim == rows ? 1 : sides->shape[rows];
  const auto rhs = tensors.doubles(given, sides);
  const auto x = rhs ? tensors.empty_like(*rhs) : std::nullopt;
  if (!x) return {};
  return Systems{rows == 2 ? matrices.shape[0] : 1, matrices.shape[rows], m, *rhs, *x};
}

// What a call that is made at once returns where it is another one.
py::object another() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

// A usual call of spd_solve, of plain tensors on the CPU: matrix, rhs, asymmetry, smallest_mean, epsilon, threads.
// Returns x; None where not all is within the limits; or NotImplemented, and nothing is done, where it may be another
// call, or a mistake: Python's checks then say which.
py::object spd_solve_at_once(PyObject* const* values) {
  const auto given = Tensors::all().plain(values[0]);
  const auto s = given ? systems_of(*given, values[1]) : std::nullopt;
  const auto matrices = s ? Tensors::all().doubles(values[0], given) : std::nullopt;
  if (!matrices) return another();
  const auto number = [&](int place) { return py::cast<double>(py::handle(values[place])); };
  const SPDLimits limits = limits_of(s->n, number(2), number(3), number(4));
  const int threads = py::cast<int>(py::handle(values[5]));
  bool good = false;
  run("spd_solve", [&] {
    return spd_solve(matrices->data, s->batch, s->n, limits, s->rhs.data, s->m, s->x.data, good, threads, detect_isa());
  });
  return good ? s->x.tensor : py::object(py::none());
}

// Likewise of a factor's solve: matrix, lower, sketch or None, rhs, threads; the first three are never copied. None
// where the right-hand sides are not finite.
py::object cholesky_solve_at_once(PyObject* const* values) {
  const Tensors& tensors = Tensors::all();
  const auto matrix = tensors.plain(values[0]), lower = tensors.plain(values[1]);
  if (!matrix || !lower || !doubles_in(*matrix) || !doubles_in(*lower)) return another();
  if (!std::equal(matrix->shape, matrix->shape + matrix->ndim, lower->shape, lower->shape + lower->ndim)) {
    return another();
  }
  const double* sketches = nullptr;
  if (values[2] != Py_None) {
    const auto sketch = tensors.plain(values[2]);
    sketches = sketch && sketch->ndim == matrix->ndim + 1 ? doubles_in(*sketch) : nullptr;
    if (!sketches) return another();
    const int64_t *const shape = sketch->shape, *const own = shape + sketch->ndim - 2;
    if (!std::equal(shape, own, matrix->shape) || own[0] != 2 || own[1] != sketch_rows) return another();
  }
  const auto s = systems_of(*matrix, values[3]);
  if (!s) return another();
  const int threads = py::cast<int>(py::handle(values[4]));
  bool finite = true;
  run("cholesky_solve", [&] {
    return cholesky_solve(doubles_in(*matrix), doubles_in(*lower), sketches, s->batch, s->n, s->rhs.data, s->m,
                          s->x.data, finite, threads, detect_isa());
  });
  return finite ? s->x.tensor : py::object(py::none());
}

py::object call_spd_solve(Fields& fields) {
  const double* matrices = fields.pointer<const double>("matrices");
  const int64_t batch = fields.number<int64_t>("batch"), n = fields.number<int64_t>("n");
  const double asymmetry = fields.number<double>("asymmetry"), smallest_mean = fields.number<double>("smallest_mean");
  const SPDLimits limits = limits_of(n, asymmetry, smallest_mean, fields.number<double>("epsilon"));
  const double* rhs = fields.pointer<const double>("rhs");
  const int64_t sides = fields.number<int64_t>("sides");
  double* x = fields.pointer<double>("x");
  const int threads = fields.number<int>("threads");
  const Isa isa = fields.isa();
  fields.done();
  bool good = false;
  run("spd_solve", [&] { return spd_solve(matrices, batch, n, limits, rhs, sides, x, good, threads, isa); });
  return py::bool_(good);
}

#ifdef REWRITE_CORE_CUDA
py::object call_spd_solve_cuda(Fields& fields) {
  SPDSolveTask task{};
  task.matrix = fields.pointer<const double>("matrix");
  task.given = fields.pointer<const double>("given");
  task.factor = fields.pointer<const double>("factor");
  task.lower = fields.pointer<double>("lower");
  task.rhs = fields.pointer<const double>("rhs");
  task.x = fields.pointer<double>("x");
  task.facts = fields.pointer<double>("facts");
  task.batch = fields.number<int64_t>("batch");
  task.n = fields.number<int64_t>("n");
  task.sides = fields.number<int64_t>("sides");
  task.asymmetry = fields.number<double>("asymmetry");
  task.smallest_mean = fields.number<double>("smallest_mean");
  task.least = fields.number<double>("least");
  task.first_shift = fields.number<double>("first_shift");
  task.largest_shift = fields.number<double>("largest_shift");
  const int blocks = fields.number<int>("blocks"), device = fields.number<int>("device");
  void* stream = fields.pointer<void>("stream");
  fields.done();
  run("spd_solve on a GPU", [&] { return spd_solve_cuda(task, blocks, device, stream); });
  return py::none();
}

py::object call_spd_solve_blocks(Fields& fields) {
  const int64_t n = fields.number<int64_t>("n");
  const int device = fields.number<int>("device");
  fields.done();
  int blocks = 0;
  run("spd_solve on a GPU", [&] { return spd_solve_blocks(n, device, blocks); });
  return py::int_(blocks);
}

FitProjectedPlan plan_of(Fields& fields) {
  FitProjectedPlan plan;
  plan.tiles = fields.number<int>("tiles"), plan.blocks = fields.number<int>("blocks");
  return plan;
}

py::object call_fit_projected_cuda(Fields& fields) {
  FitProjectedTask task{};
  task.maps = fields.pointer<const float>("maps");
  task.base = fields.pointer<const float>("base");
  task.target = fields.pointer<const float>("target");
  task.value = fields.pointer<const float>("value");
  task.shift = fields.pointer<const float>("shift");
  task.weight = fields.pointer<const float>("weight");
  task.square = fields.pointer<const float>("square");
  task.directions = fields.pointer<const float>("directions");
  task.basis = fields.pointer<const float>("basis");
  task.rates = fields.pointer<const float>("rates");
  task.goal = fields.pointer<float>("goal");
  task.leaning = fields.pointer<float>("leaning");
  task.coefficients = fields.pointer<float>("coefficients");
  task.losses = fields.pointer<double>("losses");
  task.channels = fields.number<int64_t>("channels");
  task.inputs = fields.number<int64_t>("inputs");
  task.taps = fields.number<int64_t>("taps");
  task.pixels = fields.number<int64_t>("pixels");
  task.ranks = fields.number<int64_t>("ranks");
  task.steps = fields.number<int64_t>("steps");
  task.project_every = fields.number<int64_t>("project_every");
  task.absolute = fields.number<bool>("absolute");
  task.eps = static_cast<float>(fields.number<double>("eps"));
  task.slope = static_cast<float>(fields.number<double>("slope"));
  task.gain = static_cast<float>(fields.number<double>("gain"));
  const FitProjectedPlan plan = plan_of(fields);
  const int device = fields.number<int>("device");
  void* stream = fields.pointer<void>("stream");
  fields.done();
  run("fit_projected on a GPU", [&] { return fit_projected_cuda(task, plan, device, stream); });
  return py::none();
}

py::object call_fit_projected_plan(Fields& fields) {
  const int64_t weights = fields.number<int64_t>("weights"), pixels = fields.number<int64_t>("pixels");
  const int64_t taps = fields.number<int64_t>("taps");
  const int device = fields.number<int>("device");
  fields.done();
  FitProjectedPlan plan;
  run("fit_projected on a GPU", [&] { return fit_projected_plan(weights, pixels, taps, device, plan); });
  return py::make_tuple(plan.tiles, plan.blocks);
}

py::object call_fit_projected_parts(Fields& fields) {
  const int64_t channels = fields.number<int64_t>("channels");
  const FitProjectedPlan plan = plan_of(fields);
  fields.done();
  return py::int_(fit_projected_parts(channels, plan));
}
#endif

py::object call_fit_low_rank(Fields& fields) {
  FitLowRankProblem problem{};
  problem.basis = fields.pointer<const void>("basis");
  problem.base = fields.pointer<const void>("base");
  problem.target = fields.pointer<const void>("target");
  problem.shift = fields.pointer<const void>("shift");
  fields.numbers("shift_strides", problem.shift_strides);
  problem.is_double = fields.number<bool>("is_double");
  problem.constant = fields.pointer<const double>("constant");
  problem.linear = fields.pointer<const double>("linear");
  problem.quadratic = fields.pointer<const double>("quadratic");
  problem.segments = fields.pointer<const int64_t>("segments");
  problem.pixel_weights = fields.pointer<const double>("pixel_weights");
  problem.penalty = fields.pointer<const double>("penalty");
  problem.penalty_scale = fields.pointer<const double>("penalty_scale");
  problem.edits = fields.number<int64_t>("edits");
  problem.channels = fields.number<int64_t>("channels");
  problem.unknowns = fields.number<int64_t>("unknowns");
  problem.pixels = fields.number<int64_t>("pixels");
  problem.styles = fields.number<int64_t>("styles");
  problem.slope = fields.number<double>("slope");
  problem.gain = fields.number<double>("gain");
  problem.absolute = fields.number<bool>("absolute");
  problem.max_iterations = fields.number<int>("max_iterations");
  problem.tolerance = fields.number<double>("tolerance");
  problem.coefficients = fields.pointer<void>("coefficients");
  problem.loss = fields.pointer<double>("loss");
  problem.initial_loss = fields.pointer<double>("initial_loss");
  problem.iterations = fields.pointer<int32_t>("iterations");
  problem.status = fields.pointer<int32_t>("status");
  const int threads = fields.number<int>("threads");
  const Isa isa = fields.isa();
  fields.done();
  bool finite = true;
  run("fit_low_rank", [&] { return fit_low_rank(problem, finite, threads, isa); });
  return py::bool_(finite);
}

py::object call_fit_projected(Fields& fields) {
  FitProjectedProblem problem{};
  problem.maps = fields.pointer<const float>("maps");
  problem.tile = fields.number<int>("tile");
  problem.inputs = fields.number<int64_t>("inputs");
  problem.taps = fields.number<int64_t>("taps");
  problem.height = fields.number<int64_t>("height");
  problem.width = fields.number<int64_t>("width");
  problem.pixels = problem.height * problem.width;
  problem.channels = fields.number<int64_t>("channels");
  problem.rank = fields.number<int64_t>("rank");
  problem.products = fields.number<int64_t>("products");
  problem.slots = fields.number<int64_t>("slots");
  problem.base = fields.pointer<const float>("base");
  problem.target = fields.pointer<const float>("target");
  problem.value = fields.pointer<const float>("value");
  problem.shift = fields.pointer<const float>("shift");
  fields.numbers("shift_strides", problem.shift_strides);
  problem.weight = fields.pointer<const float>("weight");
  problem.square = fields.pointer<const float>("square");
  problem.directions = fields.pointer<const float>("directions");
  problem.basis = fields.pointer<const float>("basis");
  problem.eps = fields.number<float>("eps");
  problem.slope = fields.number<float>("slope");
  problem.gain = fields.number<float>("gain");
  problem.absolute = fields.number<bool>("absolute");
  problem.steps = fields.number<int64_t>("steps");
  problem.project_every = fields.number<int64_t>("project_every");
  problem.project_gradient = fields.number<bool>("project_gradient");
  problem.rates = fields.pointer<const float>("rates");
  problem.losses = fields.pointer<double>("losses");
  problem.coefficients = fields.pointer<float>("coefficients");
  const int64_t first = fields.number<int64_t>("first"), count = fields.number<int64_t>("count");
  const int threads = fields.number<int>("threads");
  const Isa isa = fields.isa();
  fields.done();
  run("fit_projected", [&] { return fit_projected(problem, first, count, threads, isa); });
  return py::none();
}

template <py::object (*function)(Fields&)>
PyMethodDef method(const char* name, const char* documentation) {
  // through void (*)(): the type that C compilers do not warn of
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&python_function<function>)),
          METH_FASTCALL | METH_KEYWORDS, documentation};
}

template <auto function, int count>
PyMethodDef by_place(const char* name, const char* documentation) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&python_places<function, count>)),
          METH_FASTCALL, documentation};
}

PyMethodDef methods[] = {
    by_place<second_moment_at_once, 4>("second_moment_at_once",
                                       "Whether it was a usual call, and is done: tensors features and out, groups, "
                                       "threads."),
    by_place<spd_solve_at_once, 6>("spd_solve_at_once",
                                   "NotImplemented where it was no usual call, else x, or None where not all is "
                                   "within the limits: tensors matrix and rhs, asymmetry, smallest_mean, epsilon, "
                                   "threads."),
    by_place<cholesky_solve_at_once, 5>("cholesky_solve_at_once",
                                        "NotImplemented where it was no usual call, else x, or None where not all of "
                                        "rhs is finite: tensors matrix, lower, sketch (or None) and rhs, threads."),
    method<call_second_moment>("second_moment",
                               "out [c, c] += the second moment of features (n, c, h, w): features, dtype (as torch "
                               "names it), sizes, strides, "
                               "out, threads, isa (\"\": the best), groups (of channels, out [groups, c, c])."),
    method<call_examine>("examine",
                         "Of each of matrices [batch, n, n], doubles: the mean diagonal, the largest |diagonal|, and "
                         "the largest |a_ij - "
                         "a_ji|, NaN where anything is not finite: matrices, batch, n, threads."),
    method<call_cholesky>("cholesky",
                          "The lower factors of matrices [batch, n, n], doubles; info [batch] int64: 0, or the first "
                          "pivot that is not above `least` times its diagonal entry: matrices, lower, batch, n, "
                          "least, info, threads, isa."),
    method<call_sketch>("sketch",
                        "sketches [batch, n, 2, sketch_rows] of matrices [batch, n, n], doubles, for cholesky_solve: "
                        "matrices, batch, n, sketches, threads, isa."),
    method<call_cholesky_solve>("cholesky_solve",
                                "x [batch, n, sides] of A x = rhs with A = L L^T; whether rhs is finite: matrices, "
                                "lower, sketches (or None), batch, n, rhs, sides, x, threads, isa."),
    method<call_spd_solve>(
        "spd_solve",
        "All of it; whether every matrix was within the limits and all was finite: matrices, batch, "
        "n, asymmetry, smallest_mean, epsilon (least pivot, of n and its diagonal entry), rhs, sides, "
        "x, threads, isa."),
#ifdef REWRITE_CORE_CUDA
    method<call_spd_solve_cuda>("spd_solve_cuda",
                                "The fields of SPDSolveTask but passes, at addresses of a GPU's; blocks, of "
                                "spd_solve_blocks, device, stream. Does not wait."),
    method<call_spd_solve_blocks>("spd_solve_blocks",
                                  "Blocks of the GPU that work on one matrix [n, n] together; 0 where it does not fit: "
                                  "n, device."),
    method<call_fit_projected_cuda>("fit_projected_cuda",
                                    "The fields of FitProjectedTask, at addresses of a GPU's; tiles and blocks, of "
                                    "fit_projected_plan, device, stream. Does not wait."),
    method<call_fit_projected_plan>("fit_projected_plan",
                                    "Tiles of weights that a warp has (0: it does not fit on the GPU), and blocks that "
                                    "work together: weights, pixels, taps, device."),
    method<call_fit_projected_parts>("fit_projected_parts", "Rows of losses: channels, tiles, blocks."),
#endif
    method<call_fit_low_rank>("fit_low_rank",
                              "One fit per edit and channel: the fields of FitLowRankProblem, threads, isa."),
    method<call_fit_projected>("fit_projected",
                               "Blocks first, ..., first + count - 1 of channels: the fields of FitProjectedProblem, "
                               "first, count, threads, isa."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "rewrite_core's CPU kernels; called through rewrite_core.ops.";
  m.def("isa", [] { return isa_name(detect_isa()); }, "The instruction set the kernels use on this CPU.");
  m.def(
      "source", [] { return std::string(REWRITE_CORE_SOURCE); },
      "Digest of the sources this was built with (rewrite_core.version.source_digest).");
  m.def(
      "projected_lanes", [](const std::string& isa) { return projected_lanes(isa_of(isa)); }, py::arg("isa") = "",
      "Channels in one block of fit_projected.");
  m.def(
      "choose_helpers",
      [](const std::string& kind) {
        if (!Team::choose(kind)) throw std::invalid_argument("there are no helpers " + kind + ".");
      },
      py::arg("kind") = "", "Whose threads help: \"openmp\", \"own\", or \"\" for what suits. For tests.");
  m.def(
      "know_tensors",
      [](const py::type& tensor, const py::function& empty_like) { return Tensors::all().know(tensor, empty_like); },
      py::arg("tensor"), py::arg("empty_like"),
      "Has torch.Tensor and torch.empty_like; whether torch shows its tensors to C. Where not, no call is usual.");
  m.attr("sketch_rows") = sketch_rows;
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();

  // What Python has under the same names: a test compares.
  py::dict fit_low_rank_names, fit_projected_names, constants;
#define REWRITE_CORE_FIT_LOW_RANK(type, name, value) fit_low_rank_names[#name] = fit_low_rank_constants::name;
#define REWRITE_CORE_FIT_PROJECTED(type, name, value) fit_projected_names[#name] = fit_projected_constants::name;
  REWRITE_CORE_FIT_LOW_RANK_CONSTANTS(REWRITE_CORE_FIT_LOW_RANK)
  REWRITE_CORE_FIT_PROJECTED_CONSTANTS(REWRITE_CORE_FIT_PROJECTED)
  constants["fit_low_rank"] = fit_low_rank_names;
  constants["fit_projected"] = fit_projected_names;
  m.attr("constants") = constants;
}
