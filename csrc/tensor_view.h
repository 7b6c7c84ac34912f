#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

// torch tensors without torch headers: the DLPack 1.3 C exchange API, which torch >= 2.11 hangs on its tensor type.
namespace fbk {

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  DLPackExchangeAPI* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; does not synchronise
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

enum : int32_t { dl_cpu = 1, dl_cuda = 2 };
enum : uint8_t { dl_int = 0, dl_uint = 1, dl_float = 2, dl_bfloat = 4, dl_bool = 6 };

// Valid while the Python tensor lives, which is as long as the call it is an argument of.
struct TensorView : DLTensor {
  const DLPackExchangeAPI* api;

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; expected *= shape[i--])
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
    return true;
  }
  template <class T>
  T* ptr() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
  void* stream() const {
    void* s = nullptr;
    if (device.type == dl_cpu) return s;  // where CUDA is emulated
    if (api->current_stream(device.type, device.id, &s) != 0) throw pybind11::error_already_set();
    return s;
  }
};

inline TensorView view(pybind11::handle object) {
  namespace py = pybind11;
  static PyObject* name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  auto type = [&] { return std::string(Py_TYPE(object.ptr())->tp_name); };
  auto capsule = py::reinterpret_steal<py::object>(PyObject_GetAttr((PyObject*)Py_TYPE(object.ptr()), name));
  if (!capsule) PyErr_Clear();
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    throw py::type_error("expected a torch.Tensor (of torch >= 2.11), got " + type());
  TensorView v;
  v.api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (v.api->version.major != 1) throw py::type_error("expected the DLPack 1.x exchange API, got another of " + type());
  if (v.api->tensor_from_object(object.ptr(), &v) != 0) {
    std::string cause = py::error_already_set().what();  // its first line; the rest is torch's C++ stack
    throw py::type_error("expected a dense tensor with storage, got " + type() + ": " +
                         cause.substr(0, cause.find('\n')));
  }
  if (v.data == nullptr && v.numel() != 0) throw py::type_error("expected a tensor with storage, got " + type());
  return v;
}

}  // namespace fbk

template <>
struct pybind11::detail::type_caster<fbk::TensorView> {
  PYBIND11_TYPE_CASTER(fbk::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    value = fbk::view(source);
    return true;
  }
};
