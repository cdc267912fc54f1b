#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deep_ep::gpu_test {

/// A kernel that fills `bytes` at `to` with the number of its round, again and again, until `*stop`
/// (host memory that the device maps) is not 0; then writes the number of rounds.
cudaError_t start_writer(cudaStream_t stream, const int* stop, void* to, std::int64_t bytes,
                         unsigned long long* rounds);

}  // namespace deep_ep::gpu_test
