#pragma once

#include <cstddef>
#include <map>
#include <mutex>

#include "backend/cuda/check.hpp"

namespace deep_ep::cuda {

/// A stream of the current device that memory is made ready on, kept for good: destroying one waits
/// now and then for kernels of others, and one of another Buffer may wait for a call that a rank
/// makes only when this thread has gone on.
inline cudaStream_t memory_stream() {
  struct Streams {
    std::mutex mutex;
    std::map<int, cudaStream_t> of_device;
  };
  static auto& streams = *new Streams;  // outlives every static that holds a Buffer
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(streams.mutex);
  cudaStream_t& stream = streams.of_device[device];
  if (stream == nullptr)
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

/// Fills memory of the current device with zeros and waits for that, but for nothing else: the
/// default stream would wait for the caller's streams, and one that is captured for a replay.
inline void zero(void* memory, std::size_t bytes) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = memory_stream();
  check(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
  check(cudaStreamSynchronize(stream), "cudaMemsetAsync");
}

}  // namespace deep_ep::cuda
