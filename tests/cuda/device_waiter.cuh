#pragma once

#include <cstdint>

#include "backend/cuda/device/ptx.cuh"
#include "protocol/fault.hpp"

namespace deep_ep::cuda_test {

/// The Waiter of one device thread.
struct DeviceWaiter {
  const protocol::FaultRecord* fault;
  std::int64_t timeout_ns;
  std::int64_t deadline = 0;

  __device__ void begin() { deadline = cuda::globaltimer() + timeout_ns; }
  __device__ bool faulted() const { return fault->load() == protocol::FaultRecord::kWritten; }
  __device__ bool expired() const { return cuda::globaltimer() >= deadline; }
  template <class Ready>
  __device__ bool pause(Ready&&) const {
    __nanosleep(100);
    return false;
  }
};

}  // namespace deep_ep::cuda_test
