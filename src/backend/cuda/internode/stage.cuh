#pragma once

#include "backend/cuda/device/ptx.cuh"
#include "backend/cuda/internode/steps.hpp"

namespace deep_ep::cuda::internode {

/// A warp's shared memory, through which a part of a row passes: in by a bulk copy or as a sum, out
/// by bulk copies to one or several places. A warp waits for its part; what keeps the links busy
/// are the other warps of the block.
class Stage {
 public:
  struct Storage {
    alignas(128) std::byte bytes[kMostPart];
    std::uint64_t barrier;
  };

  /// By the whole warp, as all that follows.
  __device__ explicit Stage(Storage& storage) : storage_(storage) {
    if (threadIdx.x % 32 == 0) {
      mbarrier_init(&storage_.barrier, 1);
      fence_mbarrier_init_release_cluster();
    }
    __syncwarp();
  }

  /// Begins to load, behind the stores of the part before. What others wrote to `from` lane 0 has
  /// acquired. Multiples of 16 bytes.
  __device__ void load(const std::byte* from, std::int64_t bytes) {
    bulk_wait_group_read<0>();
    __syncwarp();
    bytes_ = static_cast<std::uint32_t>(bytes);
    if (threadIdx.x % 32 != 0) return;
    mbarrier_arrive_expect_tx(&storage_.barrier, bytes_);
    bulk_load(storage_.bytes, from, bytes_, &storage_.barrier);
  }
  /// What has been loaded, to be written over by a sum.
  __device__ std::byte* loaded() {
    wait();
    return storage_.bytes;
  }
  /// For a sum of `bytes` bytes, behind the stores of the part before.
  __device__ std::byte* begin_sum(std::int64_t bytes) {
    bulk_wait_group_read<0>();
    __syncwarp();
    bytes_ = static_cast<std::uint32_t>(bytes);
    return storage_.bytes;
  }
  /// All lanes have written the sum.
  __device__ void end_sum() const {
    fence_proxy_async_shared();
    __syncwarp();
  }
  /// The part has been read.
  __device__ void wait() {
    while (!mbarrier_try_wait_parity_acquire_cta(&storage_.barrier, parity_)) {
    }
    parity_ ^= 1;
  }
  /// By a lane, between wait() and stored().
  __device__ void store(std::byte* to) const { bulk_store(to, storage_.bytes, bytes_); }
  __device__ void stored() const { bulk_commit_group(); }
  /// What this lane has stored is complete.
  __device__ void finish() const { bulk_wait_group<0>(); }

 private:
  Storage& storage_;
  std::uint32_t bytes_ = 0;
  std::uint32_t parity_ = 0;
};

}  // namespace deep_ep::cuda::internode
