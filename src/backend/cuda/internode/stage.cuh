#pragma once

#include "backend/cuda/device/ptx.cuh"
#include "backend/cuda/internode/steps.hpp"

namespace deep_ep::cuda::internode {

/// A warp's shared memory, through which a part of a row passes: in by bulk copies or as a sum, out
/// by bulk copies to one or several places. It is in shares, so that the first of a part may be on
/// its way in while the last of the part before is on its way out.
///
/// Each part is kShares groups of bulk stores of each lane, though some may be empty: by their
/// number a share is known to have been read.
class Stage {
 public:
  static constexpr int kShares = 2;
  static constexpr std::uint32_t kShareBytes = kMostPart / kShares;
  static_assert(kShareBytes % 128 == 0);
  struct Storage {
    alignas(128) std::byte bytes[kMostPart];
    std::uint64_t barriers[kShares];
  };

  /// By the whole warp, as all that follows.
  __device__ explicit Stage(Storage& storage) : storage_(storage) {
    if (threadIdx.x % 32 == 0) {
      for (std::uint64_t& barrier : storage_.barriers) mbarrier_init(&barrier, 1);
      fence_mbarrier_init_release_cluster();
    }
    __syncwarp();
  }

  /// Begins to load a part, the first share of it, behind the stores that read that share. What
  /// others wrote to `from` lane 0 has acquired. Multiples of 16 bytes.
  __device__ void load(const std::byte* from, std::int64_t bytes) {
    from_ = from;
    bytes_ = static_cast<std::uint32_t>(bytes);
    load_share<0>();
  }
  /// The other shares.
  __device__ void load_rest() { load_from<1>(); }
  /// What has been loaded, to be written over by a sum.
  __device__ std::byte* loaded() {
    for (int share = 0; share < kShares; ++share) wait(share);
    end();
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
  /// store(share) for each share of what is loaded, as soon as it is here, by all lanes; all_here()
  /// ahead of the last one.
  template <class Store, class AllHere>
  __device__ void pass(Store&& store, AllHere&& all_here) {
#pragma unroll
    for (int share = 0; share < kShares; ++share) {
      wait(share);
      if (share == kShares - 1) all_here();
      store(share);
      bulk_commit_group();
    }
    end();
  }
  /// By a lane, for a share: to where the part begins.
  __device__ void store(std::byte* to, int share) const {
    if (size(share) == 0) return;
    bulk_store(to + share * kShareBytes, storage_.bytes + share * kShareBytes, size(share));
  }
  /// A sum, by lane 0: to where the part begins.
  __device__ void store_sum(std::byte* to) const {
#pragma unroll
    for (int share = 0; share < kShares; ++share) {
      if (threadIdx.x % 32 == 0) store(to, share);
      bulk_commit_group();
    }
  }
  /// What this lane has stored is complete.
  __device__ void finish() const { bulk_wait_group<0>(); }

 private:
  /// Of a share of the part.
  __device__ std::uint32_t size(int share) const {
    const std::uint32_t begin = share * kShareBytes;
    if (bytes_ <= begin) return 0;
    return bytes_ - begin < kShareBytes ? bytes_ - begin : kShareBytes;
  }
  template <int kShare>
  __device__ void load_share() {
    // The groups behind that of this share are of later shares.
    bulk_wait_group_read<kShares - 1 - kShare>();
    __syncwarp();
    const std::uint32_t bytes = size(kShare);
    if (bytes == 0 || threadIdx.x % 32 != 0) return;
    std::uint64_t* barrier = storage_.barriers + kShare;
    mbarrier_arrive_expect_tx(barrier, bytes);
    bulk_load(storage_.bytes + kShare * kShareBytes, from_ + kShare * kShareBytes, bytes, barrier);
  }
  template <int kShare>
  __device__ void load_from() {
    if constexpr (kShare < kShares) {
      load_share<kShare>();
      load_from<kShare + 1>();
    }
  }
  __device__ void wait(int share) const {
    if (size(share) == 0) return;
    while (
        !mbarrier_try_wait_parity_acquire_cta(storage_.barriers + share, parities_ >> share & 1)) {
    }
  }
  /// Of the part: all of it has been waited for.
  __device__ void end() {
#pragma unroll
    for (int share = 0; share < kShares; ++share)
      if (size(share) != 0) parities_ ^= 1u << share;
  }

  Storage& storage_;
  const std::byte* from_ = nullptr;
  std::uint32_t bytes_ = 0;
  std::uint32_t parities_ = 0;  // bit i: of share i
};

}  // namespace deep_ep::cuda::internode
