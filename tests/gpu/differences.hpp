#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deep_ep::gpu_test {

/// A kernel that adds to `*number` (GPU memory) how many of the 16-byte words at `here` differ from
/// those at `wanted`.
cudaError_t count_differences(cudaStream_t stream, const void* here, const void* wanted,
                              std::int64_t bytes, unsigned long long* number);

}  // namespace deep_ep::gpu_test
