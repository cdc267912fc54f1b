#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <string>

#include "deep_ep/tensor.hpp"
#include "references.hpp"

namespace deep_ep::python {

/// The deleter of a block of memory that is a tensor of torch's, which Python does not know.
struct TorchOwner {
  void* tensor;
  void operator()(void*) const;
};

/// What libtorch has for compiled code, C functions of a stable ABI, and how its Python part makes
/// an object of a tensor. They are looked up in the libraries that the process has loaded, so
/// nothing of torch is needed to build. None of them needs the GIL but `object`.
class TorchCalls {
 public:
  /// Null unless load() has found all of them.
  static const TorchCalls* get();
  /// `path`: torch's Python part. Whether it has all.
  static bool load(const std::string& path);

  /// Whether no capture of `stream` of a GPU is going on, which takes a tenth of the time that
  /// torch's Python takes for it. False also where torch's CUDA runtime cannot be asked.
  bool is_outside_capture(void* stream) const;
  /// The current stream of this thread on CUDA device `device`; false where torch cannot be asked.
  bool current_stream(int device, void** stream) const {
    return current_stream_ != nullptr && current_stream_(device, stream) == 0;
  }
  /// Bytes of CUDA device `device`, of the host with -1, for that device's current stream. Null if
  /// torch has none, which it says on stderr.
  std::shared_ptr<void> allocate(std::int64_t bytes, int device) const;
  /// A tensor of Python's that shares the memory of `owner`, which holds `tensor`; no view.
  nb::object object(const TorchOwner& owner, const Tensor& tensor) const;

 private:
  bool find(void* library);

  using Handle = void*;  // AtenTensorHandle: an at::Tensor on the heap
  static constexpr int kDTypes = 8;
  std::int32_t dtypes_[kDTypes] = {};  // of torch, by DType
  std::int32_t cpu_ = 0;
  std::int32_t cuda_ = 0;
  std::int32_t (*empty_strided_)(std::int64_t ndim, const std::int64_t* sizes,
                                 const std::int64_t* strides, std::int32_t dtype,
                                 std::int32_t device_type, std::int32_t device,
                                 Handle* made) = nullptr;
  std::int32_t (*alloc_from_pool_)(Handle block, std::int64_t offset_bytes, std::int32_t dtype,
                                   std::int64_t ndim, const std::int64_t* sizes,
                                   const std::int64_t* strides, Handle* made) = nullptr;
  std::int32_t (*get_data_ptr_)(Handle tensor, void** data) = nullptr;
  std::int32_t (*delete_)(Handle tensor) = nullptr;
  PyObject* (*wrap_)(const void* tensor) = nullptr;
  // Null: torch has no CUDA.
  int (*stream_is_capturing_)(void* stream, int* status) = nullptr;
  std::int32_t (*current_stream_)(std::int32_t device, void** stream) = nullptr;
  friend struct TorchOwner;
};

}  // namespace deep_ep::python
