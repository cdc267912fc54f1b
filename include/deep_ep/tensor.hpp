#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>

#include "deep_ep/export.hpp"
#include "deep_ep/types.hpp"

struct DLManagedTensor;  // dlpack.h

namespace deep_ep {

/// Pointer, dtype, shape, strides (in elements) and device of an array that somebody else owns.
/// The library never writes through a view that it takes as an input.
struct DEEP_EP_API TensorView {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::kUint8;
  int ndim = 0;  ///< 0 means "no tensor"
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};
  Device device{};

  TensorView() = default;
  /// A contiguous (row-major) array. Throws Error(kInvalidArgument) on more than kMaxDims
  /// dimensions or a negative one.
  TensorView(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
             Device device = {});

  bool defined() const { return ndim > 0; }
  std::int64_t numel() const;
  std::size_t nbytes() const { return static_cast<std::size_t>(numel()) * size_of(dtype); }
  bool is_contiguous() const;
  /// "bfloat16[4096, 7168]"
  std::string describe() const;

  /// The data as T; the caller answers for T matching dtype.
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// A view that keeps its memory alive. Copies share the memory. Results of a Buffer are of this
/// type: the last copy that goes away (or is released) hands the memory back to the Buffer, which
/// may then give it to a later call. Views outlive the Buffer safely. Not thread-safe for one
/// object; distinct copies may be used by distinct threads.
class DEEP_EP_API Tensor : public TensorView {
 public:
  Tensor() = default;
  /// Wraps memory that the caller keeps alive.
  Tensor(const TensorView& view) : TensorView(view) {}  // NOLINT(google-explicit-constructor)
  Tensor(const TensorView& view, std::shared_ptr<void> owner)
      : TensorView(view), owner_(std::move(owner)) {}

  /// Uninitialised memory of the device, 64-byte aligned; a GPU's goes back at once with the last
  /// copy, when no work may use it any more. Throws std::bad_alloc or Error.
  static Tensor empty(DType dtype, std::initializer_list<std::int64_t> shape, Device device = {});

  /// A copy on `device`, with the same shape and strides, made behind the work that `stream` of the
  /// GPU at either end has; waits for it. Throws Error.
  Tensor to(Device device, Stream stream = {}) const;

  /// Gives this copy's reference up; on CUDA the memory is reused only behind the work queued on
  /// `stream` so far.
  void release(Stream stream = {});

  const std::shared_ptr<void>& owner() const { return owner_; }

 private:
  std::shared_ptr<void> owner_;
};

/// DLPack, both ways. `to_dlpack` returns a new DLManagedTensor that shares the memory; its
/// consumer calls its deleter. `from_dlpack` takes ownership of `managed` and calls its deleter
/// when the last copy of the result goes away. Throws Error(kUnsupported) for a dtype or device
/// that the other side cannot express, Error(kInvalidArgument) for no tensor, a shape with a
/// negative size or more than kMaxDims dimensions; then ownership stays. float8_e4m3 uses the type
/// code of DLPack 1.1.
DEEP_EP_API DLManagedTensor* to_dlpack(const Tensor& tensor);
DEEP_EP_API Tensor from_dlpack(DLManagedTensor* managed);

}  // namespace deep_ep
