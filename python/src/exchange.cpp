#include "exchange.hpp"

#include <dlpack/dlpack.h>
#include <nanobind/stl/string.h>

#include <string>

namespace deep_ep::python {

// Of DLPack 1.3, which few installed dlpack.h have.
struct ExchangeHeader {
  std::uint32_t major;
  std::uint32_t minor;
  ExchangeHeader* previous;
};
struct Exchange {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, DLTensor* out);
  void* current_work_stream;
};

namespace {

constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsule = "dlpack_exchange_api";

/// False if no call takes it. Other types of one byte are opaque bytes.
bool convert(const DLDataType& type, DType& dtype) {
  constexpr int kBoolCode = 6;
  constexpr int kFloat8E4m3fnCode = 10;
  constexpr int kFirstFloat8Code = 7;
  constexpr int kLastFloat8Code = 14;
  const int code = type.code;
  const int bits = type.bits;
  if (type.lanes != 1) return false;
  if (bits == 8) {
    dtype = code == kBoolCode           ? DType::kBool
            : code == kFloat8E4m3fnCode ? DType::kFloat8E4m3
                                        : DType::kUint8;
    return code == kDLInt || code == kDLUInt || code == kBoolCode ||
           (code >= kFirstFloat8Code && code <= kLastFloat8Code);
  }
  struct Known {
    int code, bits;
    DType dtype;
  };
  for (const Known& known :
       {Known{kDLInt, 32, DType::kInt32}, Known{kDLInt, 64, DType::kInt64},
        Known{kDLFloat, 32, DType::kFloat32}, Known{kDLFloat, 16, DType::kFloat16},
        Known{kDLBfloat, 16, DType::kBfloat16}}) {
    if (code != known.code || bits != known.bits) continue;
    dtype = known.dtype;
    return true;
  }
  return false;
}

}  // namespace

const Exchange* find_exchange(nb::handle type) {
  const nb::object capsule = nb::getattr(type, kAttribute, nb::none());
  if (PyCapsule_IsValid(capsule.ptr(), kCapsule) == 0) return nullptr;
  const auto* exchange =
      static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule));
  return exchange->header.major == 1 && exchange->view_from_object != nullptr ? exchange : nullptr;
}

TensorView exchanged_view(const Exchange& exchange, nb::handle array) {
  DLTensor tensor{};
  if (exchange.view_from_object(array.ptr(), &tensor) != 0) throw nb::python_error();
  if (tensor.ndim < 1 || tensor.ndim > TensorView::kMaxDims)
    throw nb::value_error(
        ("a tensor has " + std::to_string(tensor.ndim) + " dimensions, allowed are 1 to 4")
            .c_str());
  TensorView view;
  view.ndim = tensor.ndim;
  if (!convert(tensor.dtype, view.dtype)) {
    const nb::object dtype = array.attr("dtype");
    const auto name = nb::cast<std::string>(nb::str(nb::handle(dtype)));
    throw nb::type_error(("tensors of " + name +
                          " are not supported; allowed are bool, int32, int64, float32, float16, "
                          "bfloat16, float8_e4m3fn and any type of one byte")
                             .c_str());
  }
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides[i];
  }
  if (tensor.device.device_type == kDLCUDA)
    view.device = {DeviceType::kCuda, tensor.device.device_id};
  return view;
}

}  // namespace deep_ep::python
