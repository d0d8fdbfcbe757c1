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

// What torch.Tensor is, once Python has said so.
class Tensors {
 public:
  static Tensors& all() {
    static Tensors tensors;
    return tensors;
  }

  // Whether torch has the API.
  bool know(pybind11::type tensor) {
    const pybind11::object found = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
    if (found.is_none()) return false;
    const auto* exchange = static_cast<DLPackExchange*>(PyCapsule_GetPointer(found.ptr(), "dlpack_exchange_api"));
    if (!exchange) throw pybind11::error_already_set();
    if (exchange->major != 1) return false;
    is_neg_ = PyUnicode_InternFromString("is_neg");
    requires_grad_ = PyUnicode_InternFromString("requires_grad");
    if (!is_neg_ || !requires_grad_) throw pybind11::error_already_set();
    look_ = exchange->look;
    type_ = tensor.release().ptr();  // as the process has it
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

 private:
  static bool is_false(PyObject* owned) {
    return pybind11::reinterpret_steal<pybind11::object>(owned).ptr() == Py_False;
  }

  PyObject *type_ = nullptr, *is_neg_ = nullptr, *requires_grad_ = nullptr;
  decltype(DLPackExchange::look) look_ = nullptr;
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

}  // namespace rewrite_core
