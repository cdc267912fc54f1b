#pragma once

#include <cstddef>

#include "backend/cuda/check.hpp"

namespace deep_ep::cuda {

/// Fills memory of the current device with zeros and waits for that, but for nothing else: the
/// default stream would wait for the caller's streams, and one that is captured for a replay.
inline void zero(void* memory, std::size_t bytes) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  cudaError_t status = cudaMemsetAsync(memory, 0, bytes, stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  (void)cudaStreamDestroy(stream);
  check(status, "cudaMemsetAsync");
}

}  // namespace deep_ep::cuda
