#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "backend/cuda/check.hpp"

// Memory of the current device that no peer maps, got and filled while kernels run. Nothing here
// waits for those: one of a Buffer may wait for a call that another rank makes only when this
// thread has gone on, in a second Buffer. cudaFree waits for all of the GPU, and so, now and then,
// does cudaStreamDestroy.
namespace deep_ep::cuda {

/// What memory is made ready on: the default stream would wait for the caller's streams, and one
/// that is captured for a replay. Kept for good.
inline cudaStream_t memory_stream() {
  static std::mutex mutex;
  static auto& streams = *new std::map<int, cudaStream_t>;  // outlives what is freed after main()
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  cudaStream_t& stream = streams[device];
  if (stream == nullptr)
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

/// Fills memory with zeros.
inline void zero(void* memory, std::size_t bytes) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = memory_stream();
  check(cudaMemsetAsync(memory, 0, bytes, stream), "cudaMemsetAsync");
  check(cudaStreamSynchronize(stream), "cudaMemsetAsync");
}

inline void* allocate(std::size_t bytes) {
  const RelaxedCapture relaxed;
  cudaStream_t stream = memory_stream();
  void* memory = nullptr;
  check(cudaMallocAsync(&memory, bytes, stream), "cudaMallocAsync");
  check(cudaStreamSynchronize(stream), "cudaMallocAsync");
  return memory;
}
/// That nobody uses any more. At the process's end its CUDA context may be gone already.
inline void free_unused(void* memory, int device) noexcept {
  try {
    const DeviceGuard guard(device);
    (void)cudaFreeAsync(memory, memory_stream());
  } catch (const Error&) {
  }
}

/// Its end waits for all that the GPU does, as a replay of a graph that uses it.
struct FreeWhenIdle {
  int device = 0;
  void operator()(void* memory) const noexcept {
    {
      const DeviceGuard guard(device, std::nothrow);
      (void)cudaDeviceSynchronize();
    }
    free_unused(memory, device);
  }
};
using OwnMemory = std::unique_ptr<void, FreeWhenIdle>;

inline OwnMemory allocate_zeroed(std::size_t bytes) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  OwnMemory memory(allocate(bytes), FreeWhenIdle{device});
  zero(memory.get(), bytes);
  return memory;
}

}  // namespace deep_ep::cuda
