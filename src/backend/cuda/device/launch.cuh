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

/// Launches a kernel that begins with wait_for_kernel_before(): its blocks take their places while
/// the kernel before in the stream ends, or earlier, where that calls allow_kernel_behind(). That
/// also takes the host 0.5 us less than a launch that waits as a whole.
template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), std::int64_t blocks, int threads,
                          std::int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  if (status != cudaSuccess) (void)cudaGetLastError();  // told here, not to whoever asks next
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
