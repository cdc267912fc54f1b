#pragma once

#include <cuda_runtime.h>

#include <new>

#include "base/error.hpp"

namespace deep_ep::cuda {

/// Throws Error(kSystem, or kOutOfMemory) naming the call and the runtime's reason.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // not left for the next caller to find
  throw Error(
      status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kSystem,
      fmt::format("{}: {} ({})", call, cudaGetErrorString(status), cudaGetErrorName(status)));
}

/// Makes a device current for the thread until the end of the scope. A device that the process does
/// not use yet, as GPU 0 where nobody has chosen, is not made current again: that would give it a
/// context, and take half a GiB of it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) { check(enter(device), "cudaSetDevice"); }
  /// For destructors: what fails here fails again, and is told, by the calls that follow.
  DeviceGuard(int device, std::nothrow_t) noexcept { (void)enter(device); }
  ~DeviceGuard() {
    if (changed_ && is_in_use(before_)) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  cudaError_t enter(int device) noexcept {
    const cudaError_t status = cudaGetDevice(&before_);
    if (status != cudaSuccess || before_ == device) return status;
    changed_ = true;
    return cudaSetDevice(device);
  }
  static bool is_in_use(int device) noexcept {
    using GetState = int (*)(int device, unsigned* flags, int* active);
    static const auto get_state = [] {
      void* entry = nullptr;
      cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
      const cudaError_t status = cudaGetDriverEntryPointByVersion(
          "cuDevicePrimaryCtxGetState", &entry, 12000, cudaEnableDefault, &found);
      return status == cudaSuccess ? reinterpret_cast<GetState>(entry) : nullptr;
    }();
    unsigned flags = 0;
    int active = 1;
    return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
  }

  int before_ = 0;
  bool changed_ = false;
};

/// Lets a thread query events and allocate while it, or another one, captures a stream.
class RelaxedCapture {
 public:
  RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // The legacy stream cannot be captured, and asking about it disturbs other captures.
  if (stream == nullptr) return false;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace deep_ep::cuda
