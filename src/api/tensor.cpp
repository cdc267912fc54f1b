#include "deep_ep/tensor.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "backend/plugin.hpp"
#include "base/error.hpp"
#include "base/release_hook.hpp"
#include "base/saturate.hpp"

namespace deep_ep {

namespace {

/// The fields of a view are anybody's to write, but its arrays have so many elements.
int known_dims(const TensorView& view) { return std::min(view.ndim, TensorView::kMaxDims); }

}  // namespace

TensorView::TensorView(const void* memory, DType type, std::initializer_list<std::int64_t> sizes,
                       Device where)
    : data(const_cast<void*>(memory)),
      dtype(type),
      ndim(static_cast<int>(sizes.size())),
      device(where) {
  require(sizes.size() <= kMaxDims, "shape has {} dimensions, at most {} allowed", sizes.size(),
          kMaxDims);
  std::int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[i] = sizes.begin()[i];
    require(shape[i] >= 0, "shape[{}] is {}, must not be negative", i, shape[i]);
    strides[i] = stride;
    stride = saturated_product(stride, shape[i]);
  }
}

std::int64_t TensorView::numel() const {
  if (!defined()) return 0;
  std::int64_t count = 1;
  for (int i = 0; i < known_dims(*this); ++i) {
    if (shape[i] <= 0) return 0;
    count = saturated_product(count, shape[i]);
  }
  return count;
}

bool TensorView::is_contiguous() const {
  std::int64_t expected = 1;
  for (int i = known_dims(*this) - 1; i >= 0; --i) {
    // The stride of a dimension of one element says nothing.
    if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
    expected = saturated_product(expected, shape[i]);
  }
  return true;
}

std::string TensorView::describe() const {
  if (!defined()) return "none";
  return fmt::format("{}[{}]", to_string(dtype),
                     fmt::join(shape.begin(), shape.begin() + known_dims(*this), ", "));
}

Tensor Tensor::empty(DType dtype, std::initializer_list<std::int64_t> shape, Device device) {
  constexpr std::align_val_t kAlignment{64};
  TensorView view(nullptr, dtype, shape, device);
  if (device.type == DeviceType::kCuda) {
    auto memory = cuda_parts().allocate(device.index, static_cast<std::int64_t>(view.nbytes()));
    view.data = memory.get();
    return {view, std::move(memory)};
  }
  // Never null, so that a tensor of no elements is still one.
  void* memory = ::operator new(view.nbytes() + 1, kAlignment);
  view.data = memory;
  return {view,
          std::shared_ptr<void>(memory, [](void* data) { ::operator delete(data, kAlignment); })};
}

Tensor Tensor::to(Device target, Stream stream) const {
  if (!defined()) return {};
  const auto bytes = static_cast<std::int64_t>(nbytes());
  const Tensor memory = empty(DType::kUint8, {bytes}, target);
  if (bytes > 0 && device.type == DeviceType::kHost && target.type == DeviceType::kHost) {
    std::memcpy(memory.data, data, static_cast<std::size_t>(bytes));
  } else if (bytes > 0) {
    stream.device = target.type == DeviceType::kCuda ? target : device;
    cuda_parts().copy(memory.data, data, bytes, stream);
  }
  TensorView view = *this;
  view.data = memory.data;
  view.device = target;
  return {view, memory.owner()};
}

void Tensor::release(Stream stream) {
  if (const auto* hook = std::get_deleter<ReleaseHook>(owner_)) hook->add_stream(stream);
  *this = Tensor();
}

}  // namespace deep_ep
