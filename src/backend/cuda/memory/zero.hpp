#pragma once

#include "backend/cuda/check.hpp"
#include "fabric/memory.hpp"

namespace deep_ep::cuda {

/// Fills memory of the current device with zeros and waits for that, but for nothing else: the
/// default stream would wait for the caller's streams.
inline void zero(const fabric::Mapping& mapping) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  cudaError_t status =
      cudaMemsetAsync(mapping.base(), 0, static_cast<std::size_t>(mapping.bytes()), stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  (void)cudaStreamDestroy(stream);
  check(status, "cudaMemsetAsync");
}

}  // namespace deep_ep::cuda
