#pragma once

#include <cstdint>
#include <memory>

#include "backend/cuda/nvshmem/heap.hpp"
#include "deep_ep/bootstrap.hpp"

namespace deep_ep::cuda::nvshmem {

/// What libdeep_ep_nvshmem.so does for the CUDA backend, which does not link NVSHMEM.
class NvshmemParts {
 public:
  virtual ~NvshmemParts() = default;
  /// Collective; see World::allocate().
  virtual std::unique_ptr<Heap> allocate(Bootstrap& bootstrap, int device, std::int64_t bytes) = 0;
};

}  // namespace deep_ep::cuda::nvshmem
