#pragma once

#include "backend/cuda/internode/rail.cuh"

// Rings between rail peers, each served by one warp at either end, item by item in order. The words
// of a ring outlive calls; at the end of a call it is empty (I18).
namespace deep_ep::cuda::internode {

/// What a warp could do for one of its rings.
enum class Turn { kMoved, kStuck, kDone };

/// A warp among those of the grid that have its role.
struct Role {
  std::int64_t number;
  std::int64_t count;
  /// `first` is the first warp of a block that has the role, of `warps`. Neighbours in number are
  /// of different blocks.
  __device__ Role(int first, int warps)
      : number((std::int64_t{threadIdx.x / 32} - first) * gridDim.x + blockIdx.x),
        count(std::int64_t{gridDim.x} * warps) {}
};

/// What a ring carries in this call, by RailState::lanes_out or lanes_in.
struct RingItems {
  int node;  // of the peer
  std::int64_t ring;
  std::int32_t record;  // number of the first one among those of the node
  std::int64_t count;

  __device__ RingItems(const Rails& rails, const ItemShape& item, const std::int32_t* lanes,
                       int lane, int peer)
      : node(RailShape::node_of_peer(peer, rails.node)), ring(rails.ring(lane, peer)) {
    const std::int32_t* first = lanes + std::int64_t{node} * (rails.shape.num_lanes + 1) + lane;
    record = first[0];
    count = std::int64_t{first[1] - first[0]} * item.pieces;
  }
};

/// By the warp that serves the ring's sending end: items that the receiver has not read.
__device__ inline std::uint64_t items_in_flight(const Rails& rails, std::int64_t ring) {
  std::uint64_t read = 0;
  if (threadIdx.x % 32 == 0) read = nvshmem_signal_fetch(rails.block.credits + ring);
  read = __shfl_sync(0xffffffff, read, 0);
  return rails.state.rings[ring].sent - read;
}

/// Where the next item is composed.
__device__ inline std::byte* out_slot(const Rails& rails, const ItemShape& item,
                                      std::int64_t ring) {
  const std::uint64_t slot = rails.state.rings[ring].sent % item.slots;
  return rails.block.out_slots + ring * RailShape::kRingBytes + slot * item.slot_bytes;
}

/// By the warp: the item of `bytes` bytes that its lanes have composed in out_slot(), to the peer,
/// with the word that it is there.
__device__ inline void put_item(const Rails& rails, const ItemShape& item, int lane, int peer,
                                std::int64_t bytes) {
  const std::int64_t ring = rails.ring(lane, peer);
  RailState::Ring& state = rails.state.rings[ring];
  const std::uint64_t number = state.sent + 1;
  const std::uint64_t slot = state.sent % item.slots;
  const std::int64_t there = rails.ring(
      lane, RailShape::peer_index(rails.node, RailShape::node_of_peer(peer, rails.node)));
  // What the lanes wrote is visible to who puts it, a network's adapter too.
  fence_acq_rel_sys();
  __syncwarp();
  nvshmemx_putmem_signal_nbi_warp(
      rails.block.slots + there * RailShape::kRingBytes + slot * item.slot_bytes,
      rails.block.out_slots + ring * RailShape::kRingBytes + slot * item.slot_bytes,
      static_cast<std::size_t>(bytes), rails.block.filled + there * RailShape::kMostSlots + slot,
      number, NVSHMEM_SIGNAL_SET, rails.rank_of_peer(peer));
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    state.sent = number;
    state.out_item += 1;
  }
  __syncwarp();
}

/// By the warp that serves the ring's receiving end: the next item, or null while it is not here.
__device__ inline const std::byte* next_item(const Rails& rails, const ItemShape& item,
                                             std::int64_t ring) {
  const std::uint64_t consumed = rails.state.rings[ring].consumed;
  const std::uint64_t slot = consumed % item.slots;
  bool here = false;
  if (threadIdx.x % 32 == 0)
    here = reached(rails.block.filled + ring * RailShape::kMostSlots + slot, consumed + 1);
  here = __shfl_sync(0xffffffff, here, 0);
  if (!here) return nullptr;
  // What lane 0 acquired is visible to all.
  fence_acq_rel_sys();
  __syncwarp();
  return rails.block.slots + ring * RailShape::kRingBytes + slot * item.slot_bytes;
}

/// By the same warp, where it has nothing else to do: waits for the next item. Null, and reported,
/// if it does not come.
__device__ inline const std::byte* wait_item(const Comm& comm, const Rails& rails,
                                             const ItemShape& item, int lane, int peer) {
  const std::int64_t ring = rails.ring(lane, peer);
  const std::uint64_t consumed = rails.state.rings[ring].consumed;
  const std::uint64_t slot = consumed % item.slots;
  bool here = false;
  if (threadIdx.x % 32 == 0)
    here = wait_for_rail(comm, rails, rails.rank_of_peer(peer), Wait::kRows,
                         rails.block.filled + ring * RailShape::kMostSlots + slot, consumed + 1);
  return __shfl_sync(0xffffffff, here, 0) ? next_item(rails, item, ring) : nullptr;
}

/// By the same warp: the item has been read. Credits are added, not set: so they need no order
/// among themselves.
__device__ inline void release_item(const Rails& rails, int lane, int peer) {
  RailState::Ring& state = rails.state.rings[rails.ring(lane, peer)];
  const std::int64_t there = rails.ring(
      lane, RailShape::peer_index(rails.node, RailShape::node_of_peer(peer, rails.node)));
  fence_acq_rel_sys();  // the lanes' reads come before the credit
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    state.consumed += 1;
    state.in_item += 1;
    nvshmemx_signal_op(rails.block.credits + there, 1, NVSHMEM_SIGNAL_ADD,
                       rails.rank_of_peer(peer));
  }
  __syncwarp();
}

/// By a warp that has a role: turn(ring's lane, peer) for each of its rings, over and over, until
/// all are done and `rest()`, work that waits for nobody, has no more to do. missing(ring) gives
/// what one that has not moved waits for. False if it left for a fault.
template <class TakeTurn, class Rest, class Missing>
__device__ bool serve_rings(const Comm& comm, const Rails& rails, const Role& role, TakeTurn&& turn,
                            Rest&& rest, Missing&& missing) {
  const int peers = rails.shape.num_peers();
  const std::int64_t rings = rails.shape.num_rings();
  Patience patience(comm, rails);
  while (true) {
    bool moved = false;
    std::int64_t stuck = -1;
    for (std::int64_t ring = role.number; ring < rings; ring += role.count) {
      const Turn done = turn(static_cast<int>(ring / peers), static_cast<int>(ring % peers));
      moved = moved || done == Turn::kMoved;
      if (done == Turn::kStuck) stuck = ring;
    }
    if (rest()) continue;
    if (moved) {
      patience.moved();
      continue;
    }
    if (stuck < 0) return true;
    bool go_on = false;
    if (threadIdx.x % 32 == 0)
      go_on = patience.wait(rails.rank_of_peer(static_cast<int>(stuck % peers)),
                            [&] { return missing(stuck); });
    if (!__shfl_sync(0xffffffff, go_on, 0)) return false;
  }
}

/// What the sending end of a ring waits for.
__device__ inline Awaited missing_room(const Rails& rails, std::int64_t ring) {
  return {Wait::kRoom, rails.state.rings[ring].sent,
          nvshmem_signal_fetch(rails.block.credits + ring)};
}

/// By a warp, before it serves its rings in one of the two roles.
template <std::int64_t RailState::Ring::*kItem>
__device__ void begin_rings(const Rails& rails, const Role& role) {
  if (threadIdx.x % 32 == 0) {
    for (std::int64_t ring = role.number; ring < rails.shape.num_rings(); ring += role.count)
      rails.state.rings[ring].*kItem = 0;
  }
  __syncwarp();
}

}  // namespace deep_ep::cuda::internode
