#include <dlpack/dlpack.h>

#include <vector>

#include "base/error.hpp"
#include "base/saturate.hpp"
#include "deep_ep/tensor.hpp"

namespace deep_ep {

namespace {

// Type codes newer than some installed dlpack.h (DLPack 1.0 and 1.1).
constexpr int kBoolCode = 6;
constexpr int kFloat8E4m3fnCode = 10;

DLDataType to_dlpack_dtype(DType dtype) {
  const auto type = [](int code, int bits) {
    return DLDataType{static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
  };
  switch (dtype) {
    case DType::kUint8:
      return type(kDLUInt, 8);
    case DType::kBool:
      return type(kBoolCode, 8);
    case DType::kInt32:
      return type(kDLInt, 32);
    case DType::kInt64:
      return type(kDLInt, 64);
    case DType::kFloat32:
      return type(kDLFloat, 32);
    case DType::kFloat16:
      return type(kDLFloat, 16);
    case DType::kBfloat16:
      return type(kDLBfloat, 16);
    case DType::kFloat8E4m3:
      return type(kFloat8E4m3fnCode, 8);
  }
  throw Error(ErrorCode::kUnsupported, "this dtype has no DLPack code");
}

DType from_dlpack_dtype(const DLDataType& type) {
  for (const DType dtype :
       {DType::kUint8, DType::kBool, DType::kInt32, DType::kInt64, DType::kFloat32, DType::kFloat16,
        DType::kBfloat16, DType::kFloat8E4m3}) {
    const DLDataType known = to_dlpack_dtype(dtype);
    if (known.code == type.code && known.bits == type.bits && known.lanes == type.lanes) {
      return dtype;
    }
  }
  throw Error(ErrorCode::kUnsupported,
              fmt::format("DLPack dtype (code {}, bits {}, lanes {}) is not supported; allowed are "
                          "uint8, bool, int32, int64, float32, float16, bfloat16, float8_e4m3fn",
                          type.code, type.bits, type.lanes));
}

Device from_dlpack_device(const DLDevice& device) {
  if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost) return {};
  if (device.device_type == kDLCUDA) return {DeviceType::kCuda, device.device_id};
  throw Error(ErrorCode::kUnsupported,
              fmt::format("DLPack device type {} is not supported; allowed are CPU and CUDA",
                          static_cast<int>(device.device_type)));
}

/// A DLManagedTensor with what it points to.
struct Exported {
  Tensor tensor;
  DLManagedTensor managed{};
};

}  // namespace

DLManagedTensor* to_dlpack(const Tensor& tensor) {
  require(tensor.ndim >= 1 && tensor.ndim <= TensorView::kMaxDims,
          "tensor has {} dimensions, allowed are 1 to {}", tensor.ndim, TensorView::kMaxDims);
  auto exported = std::make_unique<Exported>();
  exported->tensor = tensor;
  DLTensor& out = exported->managed.dl_tensor;
  out.data = tensor.data;
  out.device = tensor.device.type == DeviceType::kCuda ? DLDevice{kDLCUDA, tensor.device.index}
                                                       : DLDevice{kDLCPU, 0};
  out.ndim = tensor.ndim;
  out.dtype = to_dlpack_dtype(tensor.dtype);
  out.shape = exported->tensor.shape.data();
  out.strides = exported->tensor.strides.data();
  out.byte_offset = 0;
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = [](DLManagedTensor* self) {
    delete static_cast<Exported*>(self->manager_ctx);
  };
  return &exported.release()->managed;
}

Tensor from_dlpack(DLManagedTensor* managed) {
  require(managed != nullptr, "managed is null");
  const DLTensor& in = managed->dl_tensor;
  require(in.ndim >= 1 && in.ndim <= TensorView::kMaxDims,
          "the DLPack tensor has {} dimensions, allowed are 1 to {}", in.ndim,
          TensorView::kMaxDims);
  TensorView view;
  view.dtype = from_dlpack_dtype(in.dtype);
  view.device = from_dlpack_device(in.device);
  view.ndim = in.ndim;
  view.data = static_cast<std::byte*>(in.data) + in.byte_offset;
  std::int64_t stride = 1;
  for (int i = in.ndim - 1; i >= 0; --i) {
    require(in.shape[i] >= 0, "shape[{}] of the DLPack tensor is {}, must not be negative", i,
            in.shape[i]);
    view.shape[i] = in.shape[i];
    view.strides[i] = in.strides == nullptr ? stride : in.strides[i];
    stride = saturated_product(stride, in.shape[i]);
  }
  return {view, std::shared_ptr<void>(managed, [](void* self) {
            auto* tensor = static_cast<DLManagedTensor*>(self);
            if (tensor->deleter != nullptr) tensor->deleter(tensor);
          })};
}

}  // namespace deep_ep
