// Tensors as torch shows them to C, in one call for what takes a dozen in Python: DLPack's exchange API, which torch
// has from 2.10 on. Its layout is fixed by DLPack's version 1.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "common.h"

namespace rewrite_core {

struct DLTensor {
  char* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchange {
  uint32_t major, minor;
  void *older, *allocate, *from_object, *to_object;
  int (*look)(void* object, DLTensor* out);  // 0, or a Python exception is set
};

inline std::optional<DType> dtype_of(const DLTensor& tensor) {
  constexpr int floats = 2, bfloats = 4;
  if (tensor.lanes != 1) return {};
  if (tensor.code == bfloats) return DType::bfloat16;
  if (tensor.code != floats) return {};
  if (tensor.bits == 32) return DType::float32;
  if (tensor.bits == 64) return DType::float64;
  if (tensor.bits == 16) return DType::float16;
  return {};
}

inline bool is_contiguous(const DLTensor& tensor) {
  int64_t step = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != step) return false;
    step *= tensor.shape[i];
  }
  return true;
}

// Numbers that are float64 and lie one after the other; null where they do not.
inline double* doubles_in(const DLTensor& tensor) {
  return dtype_of(tensor) == DType::float64 && is_contiguous(tensor) ? reinterpret_cast<double*>(tensor.data) : nullptr;
}

// Such numbers, and the tensor that keeps them.
struct Doubles {
  pybind11::object tensor;
  double* data;
};

// What torch.Tensor is, once Python has said so.
class Tensors {
 public:
  static Tensors& all() {
    static Tensors tensors;
    return tensors;
  }

  // Whether torch has the API.
  bool know(pybind11::type tensor, pybind11::function empty_like) {
    const pybind11::object found = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
    if (found.is_none()) return false;
    const auto* exchange = static_cast<DLPackExchange*>(PyCapsule_GetPointer(found.ptr(), "dlpack_exchange_api"));
    if (!exchange) throw pybind11::error_already_set();
    if (exchange->major != 1) return false;
    is_neg_ = PyUnicode_InternFromString("is_neg");
    requires_grad_ = PyUnicode_InternFromString("requires_grad");
    double_ = PyUnicode_InternFromString("double");
    contiguous_ = PyUnicode_InternFromString("contiguous");
    if (!is_neg_ || !requires_grad_ || !double_ || !contiguous_) throw pybind11::error_already_set();
    look_ = exchange->look;
    type_ = tensor.release().ptr();  // these as long as the process
    empty_like_ = empty_like.release().ptr();
    return true;
  }

  // A tensor of just that type, in the CPU's memory, with numbers as they lie there; nothing where it is another, or
  // may be.
  std::optional<DLTensor> plain(PyObject* object) const {
    DLTensor tensor;
    if (!type_ || reinterpret_cast<PyObject*>(Py_TYPE(object)) != type_) return {};
    constexpr int cpu = 1;
    const bool seen = !look_(object, &tensor) && tensor.device_type == cpu && tensor.strides && tensor.data &&
                      is_false(PyObject_CallMethodNoArgs(object, is_neg_));
    PyErr_Clear();
    if (!seen) return {};
    tensor.data += tensor.byte_offset;
    return tensor;
  }

  bool requires_grad(PyObject* tensor) const {
    const bool no = is_false(PyObject_GetAttr(tensor, requires_grad_));
    PyErr_Clear();
    return !no;
  }

  // What was seen of a plain tensor as such numbers: in itself, or else in a copy. Nothing where that fails.
  std::optional<Doubles> doubles(PyObject* tensor, std::optional<DLTensor> seen) const {
    auto object = pybind11::reinterpret_borrow<pybind11::object>(tensor);
    if (seen && dtype_of(*seen) != DType::float64) seen = made(PyObject_CallMethodNoArgs(tensor, double_), object);
    if (seen && !is_contiguous(*seen)) seen = made(PyObject_CallMethodNoArgs(object.ptr(), contiguous_), object);
    return seen ? doubles_of(*seen, object) : std::nullopt;
  }

  // New memory for as many numbers, which are anything yet.
  std::optional<Doubles> empty_like(const Doubles& numbers) const {
    pybind11::object object;
    const auto seen = made(PyObject_CallOneArg(empty_like_, numbers.tensor.ptr()), object);
    return seen ? doubles_of(*seen, object) : std::nullopt;
  }

 private:
  // Of what torch made, null where it raised.
  std::optional<DLTensor> made(PyObject* owned, pybind11::object& into) const {
    into = pybind11::reinterpret_steal<pybind11::object>(owned);
    PyErr_Clear();
    return owned ? plain(owned) : std::nullopt;
  }

  static std::optional<Doubles> doubles_of(const DLTensor& seen, const pybind11::object& tensor) {
    double* const data = doubles_in(seen);
    return data ? std::optional<Doubles>({tensor, data}) : std::nullopt;
  }

  static bool is_false(PyObject* owned) {
    return pybind11::reinterpret_steal<pybind11::object>(owned).ptr() == Py_False;
  }

  PyObject *type_ = nullptr, *is_neg_ = nullptr, *requires_grad_ = nullptr, *double_ = nullptr, *contiguous_ = nullptr,
           *empty_like_ = nullptr;
  decltype(DLPackExchange::look) look_ = nullptr;
};

}  // namespace rewrite_core
