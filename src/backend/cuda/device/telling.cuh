#pragma once

#include <cstdint>

#include <cuda/atomic>

#include "backend/cuda/device/ptx.cuh"

// How a block tells peers what its warps have completed.
namespace deep_ep::cuda {

/// What a warp has completed, for the warp of its block that tells the peers: a release to the
/// whole system waits for all that the SM has on its way, microseconds, in which the warp could not
/// move rows. In shared memory, of zeros at first.
template <class Item, std::uint32_t kSize>
struct Untold {
  using Word = ::cuda::atomic_ref<std::uint32_t, ::cuda::thread_scope_block>;

  Item items[kSize];
  std::uint32_t completed;  // so many since the beginning; the last kSize are in items
  std::uint32_t told;       // of them
  std::uint32_t ended;      // 1: nothing more will come

  /// By one thread of the warp, behind `count` earlier ones, of which `known_told` are known to be
  /// told.
  __device__ void put(std::uint32_t count, const Item& item, std::uint32_t& known_told) {
    // acquire: pairs with the release of `told` in tell_all(): the item's place has been read.
    while (count - known_told >= kSize) {
      known_told = Word(told).load(::cuda::std::memory_order_acquire);
      if (count - known_told >= kSize) __nanosleep(100);
    }
    items[count % kSize] = item;
    // release: pairs with the acquire in tell_all(), for what the item tells of, too.
    Word(completed).store(count + 1, ::cuda::std::memory_order_release);
  }
  __device__ void end() { Word(ended).store(1, ::cuda::std::memory_order_release); }
};

/// By one warp of a block, until all have ended: tell(item), by one lane, for all that there is
/// behind one fence, so that its stores may be relaxed. kInOrder: those of a warp one after the
/// other, by the same lane, since they may be of the same word; else in any order.
template <bool kInOrder, class Item, std::uint32_t kSize, int kWarps, class Tell>
__device__ void tell_all(Untold<Item, kSize> (&untold)[kWarps], Tell&& tell) {
  using Word = typename Untold<Item, kSize>::Word;
  static_assert(kWarps <= 32 && kSize <= 32);
  const auto lane = static_cast<std::uint32_t>(threadIdx.x % 32);
  std::uint32_t told = 0;  // lane i < kWarps: of warp i
  for (;;) {
    bool ended = true;
    std::uint32_t completed = 0;
    if (lane < kWarps) {
      ended = Word(untold[lane].ended).load(::cuda::std::memory_order_acquire) != 0;
      // acquire: pairs with the release in put().
      completed = Word(untold[lane].completed).load(::cuda::std::memory_order_acquire);
    }
    __syncwarp();
    if (!__any_sync(0xffffffff, completed != told)) {
      if (__all_sync(0xffffffff, ended)) return;
      __nanosleep(100);
      continue;
    }
    // release: with the stores of tell(); pairs with the acquire of who waits for them.
    fence_acq_rel_sys();
    if constexpr (kInOrder) {
      for (std::uint32_t i = told; i != completed; ++i) tell(untold[lane].items[i % kSize]);
    } else {
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const std::uint32_t i = __shfl_sync(0xffffffff, told, warp) + lane;
        if (i - __shfl_sync(0xffffffff, completed, warp) < std::uint32_t{1} << 31) continue;
        tell(untold[warp].items[i % kSize]);
      }
    }
    __syncwarp();
    told = completed;
    if (lane < kWarps) Word(untold[lane].told).store(told, ::cuda::std::memory_order_release);
  }
}

}  // namespace deep_ep::cuda
