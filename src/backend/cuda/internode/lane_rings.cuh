#pragma once

#include "backend/cuda/internode/turns.cuh"

// What a combine adds comes by all rings of a lane, token by token: one warp is their receiving
// end.
namespace deep_ep::cuda::internode {

/// By a warp: the receiving ends of a lane's rings; those of peer i are lane i % 32's.
class LaneRings {
 public:
  __device__ LaneRings(const Rails& rails, int lane) : lane_(lane) {
    for_each_peer(
        rails, [&](int i, std::int64_t ring) { consumed_[i] = rails.state.rings[ring].consumed; });
  }
  __device__ int lane() const { return lane_; }
  /// Items of `peer` that have been read.
  __device__ std::uint64_t consumed(int peer) const {
    std::uint64_t mine = consumed_[0];
#pragma unroll
    for (int i = 1; i < kPeersALane; ++i) mine = peer / 32 == i ? consumed_[i] : mine;
    return __shfl_sync(0xffffffff, mine, peer % 32);
  }
  __device__ void advance(int peer) {
#pragma unroll
    for (int i = 0; i < kPeersALane; ++i) consumed_[i] += peer == i * 32 + lane_id();
  }
  __device__ void keep(const Rails& rails) const {
    for_each_peer(
        rails, [&](int i, std::int64_t ring) { rails.state.rings[ring].consumed = consumed_[i]; });
    __syncwarp();
  }

 private:
  static constexpr int kPeersALane = (plan::kMaxNodes + 31) / 32;

  template <class Body>
  __device__ void for_each_peer(const Rails& rails, Body&& body) const {
#pragma unroll
    for (int i = 0; i < kPeersALane; ++i) {
      const int peer = i * 32 + lane_id();
      if (peer < rails.shape.num_peers()) body(i, rails.ring(lane_, peer));
    }
  }

  int lane_;
  std::uint64_t consumed_[kPeersALane] = {};
};

/// By a warp that has nothing else to do: waits for the next item of a ring. Null, and reported, if
/// it does not come.
__device__ inline const std::byte* wait_item(const CombineArgs& args, const MappedPeers& peers,
                                             const LaneRings& rings, int peer) {
  const Rails& rails = args.rails;
  const std::int64_t ring = rails.ring(rings.lane(), peer);
  const std::uint64_t items = rings.consumed(peer);
  const auto slot = static_cast<int>(items % static_cast<std::uint32_t>(args.item.slots));
  if (const std::byte* next = next_item(rails, peers, args.item, ring, peer, items, slot))
    return next;
  bool here = false;
  if (lane_id() == 0)
    here = wait_for_rail(args.comm, rails, peers, peer, Wait::kRows,
                         rails.block.filled + ring * RailShape::kMostSlots + slot, items + 1);
  return __shfl_sync(0xffffffff, here, 0)
             ? next_item(rails, peers, args.item, ring, peer, items, slot)
             : nullptr;
}

}  // namespace deep_ep::cuda::internode
