#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace deep_ep::cuda {

/// Dynamic shared memory of a block, from Hopper on.
constexpr int kMaxSharedBytes = 224 << 10;  // 227, less what kernels have of static size

/// Lets kKernel have `bytes` of dynamic shared memory on the current device, which has to be said
/// once a device.
template <auto kKernel>
cudaError_t allow_shared(int bytes) {
  static std::atomic<std::uint64_t> done{0};  // a bit a device
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::uint64_t bit = std::uint64_t{1} << device % 64;
  if (device < 64 && (done.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

/// Each of the kernels, up to the first that fails.
template <auto... kKernels>
cudaError_t load() {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaSuccess;
  ((status = status == cudaSuccess ? cudaFuncGetAttributes(&attributes, kKernels) : status), ...);
  return status;
}

}  // namespace deep_ep::cuda
