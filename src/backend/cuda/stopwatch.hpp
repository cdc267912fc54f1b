#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/check.hpp"

namespace deep_ep::cuda {

/// What the current device takes for what is queued on a stream between start() and stop().
class Stopwatch {
 public:
  explicit Stopwatch(cudaStream_t stream) : stream_(stream) {}

  void start() { begin_.record(stream_); }
  void stop() { end_.record(stream_); }
  /// Waits until that has happened.
  double milliseconds() const {
    check(cudaEventSynchronize(end_.event), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin_.event, end_.event), "cudaEventElapsedTime");
    return static_cast<double>(ms);
  }

 private:
  struct Event {
    Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
    ~Event() { (void)cudaEventDestroy(event); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(cudaStream_t stream) { check(cudaEventRecord(event, stream), "cudaEventRecord"); }
    cudaEvent_t event = nullptr;
  };

  cudaStream_t stream_;
  Event begin_, end_;
};

}  // namespace deep_ep::cuda
