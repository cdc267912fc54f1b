#include "differences.hpp"

namespace deep_ep::gpu_test {

namespace {

__global__ void differences(const uint4* here, const uint4* wanted, std::int64_t words,
                            unsigned long long* number) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += step) {
    const uint4 a = here[i];
    const uint4 b = wanted[i];
    if (a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w) atomicAdd(number, 1ULL);
  }
}

}  // namespace

cudaError_t count_differences(cudaStream_t stream, const void* here, const void* wanted,
                              std::int64_t bytes, unsigned long long* number) {
  differences<<<32, 256, 0, stream>>>(static_cast<const uint4*>(here),
                                      static_cast<const uint4*>(wanted), bytes / 16, number);
  return cudaGetLastError();
}

}  // namespace deep_ep::gpu_test
