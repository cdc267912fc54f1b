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

/// A ring's next item on its way out.
struct OutItem {
  std::uint64_t number;  // from 1
  std::uint64_t* word;   // the slot's, in this rank's heap
  std::uint64_t* there;  // the same at the peer, if its memory is mapped here, else null
  std::byte* in_ring;    // the slot, in this rank's heap
  std::byte* to;         // where it is composed: in the slot at the peer, else in its mirror

  __device__ OutItem(const Rails& rails, const ItemShape& item, int lane, int peer) {
    const std::int64_t ring = rails.ring(lane, peer);
    const std::int64_t at_peer = rails.ring(
        lane, RailShape::peer_index(rails.node, RailShape::node_of_peer(peer, rails.node)));
    const std::uint64_t sent = rails.state.rings[ring].sent;
    const std::uint64_t slot = sent % item.slots;
    const std::int64_t in_slots = slot * item.slot_bytes;
    const int rank = rails.rank_of_peer(peer);
    number = sent + 1;
    word = rails.block.filled + at_peer * RailShape::kMostSlots + slot;
    there = mapped(rails, word, rank);
    in_ring = rails.block.slots + at_peer * RailShape::kRingBytes + in_slots;
    to = there != nullptr ? mapped(rails, in_ring, rank)
                          : rails.block.out_slots + ring * RailShape::kRingBytes + in_slots;
  }
};

/// What a warp has written to the memory of peers and not yet told: an item's bytes are on their
/// way while it turns to the next.
class Untold {
 public:
  __device__ void add(const OutItem& out) {
    word_ = out.there;
    number_ = out.number;
  }
  /// By the warp: tells, behind all that its lanes wrote and that lane 0's bulk copies did, but for
  /// the last kPending groups of these, which are of a later item.
  template <int kPending = 0>
  __device__ void tell() {
    if (word_ == nullptr) return;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      bulk_wait_group<kPending>();
      // release: pairs with the acquire in next_item() of the peer.
      protocol::store_release(word_, number_);
    }
    word_ = nullptr;
    __syncwarp();
  }

 private:
  std::uint64_t* word_ = nullptr;
  std::uint64_t number_ = 0;
};

/// By the warp: an item from the mirror. Not inlined, since it takes registers that loops need.
__device__ __noinline__ inline void put_out(const OutItem& out, std::int64_t bytes, int rank) {
  // What the lanes wrote is visible to who puts it, a network's adapter too.
  fence_acq_rel_sys();
  __syncwarp();
  nvshmemx_putmem_signal_nbi_warp(out.in_ring, out.to, static_cast<std::size_t>(bytes), out.word,
                                  out.number, NVSHMEM_SIGNAL_SET, rank);
}

/// By the warp: the item of `bytes` bytes, composed by its lanes, goes to the peer, with the word
/// that it is there. If it was composed there, that word is told later.
__device__ inline void send_out(const Rails& rails, const OutItem& out, Untold& untold, int lane,
                                int peer, std::int64_t bytes) {
  RailState::Ring& state = rails.state.rings[rails.ring(lane, peer)];
  if (out.there != nullptr) {
    untold.add(out);
  } else {
    put_out(out, bytes, rails.rank_of_peer(peer));
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    state.sent = out.number;
  }
  __syncwarp();
}

/// By the warp that serves the ring's receiving end: the next item, or null while it is not here.
__device__ inline const std::byte* next_item(const Rails& rails, const ItemShape& item, int lane,
                                             int peer) {
  const std::int64_t ring = rails.ring(lane, peer);
  const std::uint64_t consumed = rails.state.rings[ring].consumed;
  const std::uint64_t slot = consumed % item.slots;
  bool here = false;
  if (threadIdx.x % 32 == 0)
    here = reached_from(rails, rails.rank_of_peer(peer),
                        rails.block.filled + ring * RailShape::kMostSlots + slot, consumed + 1);
  here = __shfl_sync(0xffffffff, here, 0);
  if (!here) return nullptr;
  __syncwarp();  // what lane 0 acquired is visible to all
  return rails.block.slots + ring * RailShape::kRingBytes + slot * item.slot_bytes;
}

/// By the same warp, where it has nothing else to do: waits for the next item. Null, and reported,
/// if it does not come.
__device__ inline const std::byte* wait_item(const Comm& comm, const Rails& rails,
                                             const ItemShape& item, int lane, int peer) {
  const std::int64_t ring = rails.ring(lane, peer);
  if (const std::byte* next = next_item(rails, item, lane, peer)) return next;
  const std::uint64_t consumed = rails.state.rings[ring].consumed;
  const std::uint64_t slot = consumed % item.slots;
  bool here = false;
  if (threadIdx.x % 32 == 0)
    here = wait_for_rail(comm, rails, rails.rank_of_peer(peer), Wait::kRows,
                         rails.block.filled + ring * RailShape::kMostSlots + slot, consumed + 1);
  return __shfl_sync(0xffffffff, here, 0) ? next_item(rails, item, lane, peer) : nullptr;
}

/// By a lane, as put_out().
__device__ __noinline__ inline void put_credit(std::uint64_t* word, int rank) {
  fence_acq_rel_sys();
  nvshmemx_signal_op(word, 1, NVSHMEM_SIGNAL_ADD, rank);
}

/// By the same warp: the item has been read. Credits that are put are added, not set: so they need
/// no order among themselves.
__device__ inline void release_item(const Rails& rails, int lane, int peer) {
  RailState::Ring& state = rails.state.rings[rails.ring(lane, peer)];
  const std::int64_t there = rails.ring(
      lane, RailShape::peer_index(rails.node, RailShape::node_of_peer(peer, rails.node)));
  const int rank = rails.rank_of_peer(peer);
  std::uint64_t* word = mapped(rails, rails.block.credits + there, rank);
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    const std::uint64_t consumed = state.consumed + 1;
    state.consumed = consumed;
    if (word != nullptr) {
      // release: the lanes' reads come before the credit.
      protocol::store_release(word, consumed);
    } else {
      put_credit(rails.block.credits + there, rank);
    }
  }
  __syncwarp();
}

/// By a warp that has a role: turn(ring's lane, peer) for each of its rings, over and over, until
/// all are done and `rest()`, work that waits for nobody, has no more to do: it is done while no
/// ring moves. missing(ring) gives what one that has not moved waits for. False if it left for a
/// fault.
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
    if (moved) {
      patience.moved();
      continue;
    }
    if (rest()) continue;
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
template <std::uint64_t RailState::Ring::*kBegin, std::uint64_t RailState::Ring::*kItems>
__device__ void begin_rings(const Rails& rails, const Role& role) {
  if (threadIdx.x % 32 == 0) {
    for (std::int64_t ring = role.number; ring < rails.shape.num_rings(); ring += role.count)
      rails.state.rings[ring].*kBegin = rails.state.rings[ring].*kItems;
  }
  __syncwarp();
}

/// Items of the call that this end has dealt with.
__device__ inline std::int64_t items_out(const RailState::Ring& ring) {
  return static_cast<std::int64_t>(ring.sent - ring.out_begin);
}
__device__ inline std::int64_t items_in(const RailState::Ring& ring) {
  return static_cast<std::int64_t>(ring.consumed - ring.in_begin);
}

}  // namespace deep_ep::cuda::internode
