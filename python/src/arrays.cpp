#include "arrays.hpp"

#include <dlpack/dlpack.h>
#include <nanobind/stl/string.h>

#include <array>
#include <string>

#include "torch_calls.hpp"

namespace deep_ep::python {

namespace {

/// A result in the library's own memory, for whoever makes an array of it; the memory lives as long
/// as one of them.
struct Array {
  Tensor tensor;
};

nb::tuple tuple_of(const Tensor& tensor, const std::array<std::int64_t, TensorView::kMaxDims>& all,
                   std::int64_t unit = 1) {
  nb::list list;
  for (int i = 0; i < tensor.ndim; ++i) list.append(all[i] * unit);
  return nb::tuple(list);
}
nb::tuple shape_of(const Tensor& tensor) { return tuple_of(tensor, tensor.shape); }

/// Floats of less than four bytes are given as bytes: their reader knows better what they are than
/// many a DLPack or NumPy.
Tensor as_bytes_if_fp8(const Tensor& tensor) {
  Tensor bytes = tensor;
  if (tensor.dtype == DType::kFloat8E4m3) bytes.dtype = DType::kUint8;
  return bytes;
}

nb::object to_capsule(const Array& array) {
  DLManagedTensor* managed = to_dlpack(as_bytes_if_fp8(array.tensor));
  return nb::steal(PyCapsule_New(managed, "dltensor", [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;  // somebody took it over
    auto* left = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    left->deleter(left);
  }));
}

const char* numpy_type(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return "|b1";
    case DType::kInt32:
      return "<i4";
    case DType::kInt64:
      return "<i8";
    case DType::kFloat32:
      return "<f4";
    case DType::kFloat16:
      return "<f2";
    case DType::kBfloat16:
      return "<u2";
    case DType::kUint8:
    case DType::kFloat8E4m3:
      break;
  }
  return "|u1";
}

nb::dict array_interface(const Array& array) {
  if (array.tensor.device.type != DeviceType::kHost)
    throw nb::attribute_error("the array is not in the memory of the host");
  nb::dict interface;
  interface["version"] = 3;
  interface["shape"] = shape_of(array.tensor);
  interface["strides"] = tuple_of(array.tensor, array.tensor.strides,
                                  static_cast<std::int64_t>(size_of(array.tensor.dtype)));
  interface["typestr"] = numpy_type(array.tensor.dtype);
  interface["data"] = nb::make_tuple(reinterpret_cast<std::uintptr_t>(array.tensor.data), false);
  return interface;
}

nb::tuple dlpack_device(const Array& array) {
  const Device& device = array.tensor.device;
  return nb::make_tuple(static_cast<int>(device.type == DeviceType::kCuda ? kDLCUDA : kDLCPU),
                        device.index);
}

TensorView view_of_parts(const nb::tuple& parts) {
  TensorView view;
  view.data = reinterpret_cast<void*>(nb::cast<std::uintptr_t>(parts[0]));
  view.dtype = static_cast<DType>(nb::cast<int>(parts[1]));
  const auto shape = nb::cast<nb::tuple>(parts[2]);
  const auto strides = nb::cast<nb::tuple>(parts[3]);
  const auto dims = static_cast<int>(shape.size());
  if (dims < 1 || dims > TensorView::kMaxDims)
    throw nb::value_error(
        ("a tensor has " + std::to_string(dims) + " dimensions, allowed are 1 to 4").c_str());
  view.ndim = dims;
  for (int i = 0; i < dims; ++i) {
    view.shape[i] = nb::cast<std::int64_t>(shape[i]);
    view.strides[i] = nb::cast<std::int64_t>(strides[i]);
  }
  const int device = nb::cast<int>(parts[4]);
  if (device >= 0) view.device = {DeviceType::kCuda, device};
  return view;
}

}  // namespace

Library::Library(nb::type_object type, nb::callable view, nb::callable make, nb::callable typed)
    : type_(std::move(type)),
      exchange_(find_exchange(type_)),
      view_(std::move(view)),
      make_(std::move(make)),
      typed_(std::move(typed)) {}

TensorView Library::view(nb::handle array, const char* name, bool is_output) const {
  if (array.is_none()) return {};
  if (exchange_ != nullptr &&
      PyObject_TypeCheck(array.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr())) != 0)
    return exchanged_view(*exchange_, array);
  return view_of_parts(nb::cast<nb::tuple>(view_(array, name, is_output)));
}

nb::object Library::make(const Tensor& tensor) const {
  if (!tensor.defined()) return nb::none();
  if (const auto* block = std::get_deleter<TorchOwner>(tensor.owner()))
    return TorchCalls::get()->object(*block, tensor);
  const int dtype = static_cast<int>(tensor.dtype);
  if (const auto* held = std::get_deleter<ObjectOwner>(tensor.owner())) {
    const std::int64_t offset =
        static_cast<std::byte*>(tensor.data) - static_cast<std::byte*>(tensor.owner().get());
    return make_(nb::make_tuple(nb::borrow(held->object.get()), offset, shape_of(tensor),
                                tuple_of(tensor, tensor.strides)),
                 dtype);
  }
  return make_(Array{tensor}, dtype);
}

nb::object Library::make_like(const Tensor& tensor, nb::handle like) const {
  nb::object made = make(tensor);
  const bool opaque = tensor.defined() && tensor.dtype == DType::kUint8;
  // What a foreign array calls its type, the library cannot know.
  const bool ours = PyObject_TypeCheck(like.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr()));
  return opaque && ours ? typed_(made, like.attr("dtype")) : made;
}

bool is_tuple_of(nb::handle value, std::size_t size) {
  return nb::isinstance<nb::tuple>(value) && nb::len(value) == size;
}

nb::builtin_exception wrong_tuple(const char* name, nb::handle value, const std::string& expected) {
  const std::string what = nb::isinstance<nb::tuple>(value)
                               ? "a tuple of " + std::to_string(nb::len(value))
                               : nb::str(value.type()).c_str();
  return nb::type_error((name + (" is " + what) + ", must be " + expected).c_str());
}

void bind_arrays(nb::module_& module) {
  nb::class_<Array>(module, "Array")
      .def("capsule", &to_capsule)
      .def_prop_ro("shape", [](const Array& array) { return shape_of(array.tensor); })
      .def_prop_ro("__array_interface__", &array_interface)
      .def("__dlpack__", [](const Array& array, const nb::kwargs&) { return to_capsule(array); })
      .def("__dlpack_device__", &dlpack_device);
  nb::class_<Library>(module, "Library")
      .def(nb::init<nb::type_object, nb::callable, nb::callable, nb::callable>());
  module.def("load_torch", &TorchCalls::load);
}

}  // namespace deep_ep::python
