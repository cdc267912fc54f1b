#pragma once

#include "backend/cuda/device/telling.cuh"
#include "backend/cuda/internode/rail.cuh"

// Rings between rail peers, each served by one warp at either end, item by item in order. The words
// of a ring outlive calls; at the end of a call it is empty (I18).
namespace deep_ep::cuda::internode {

/// What a warp could do for one of its rings.
enum class Turn { kMoved, kStuck, kDone };

/// A warp among those of the grid that have its role. Neighbours in number are of different blocks.
struct Role {
  int number;
  int count;
  /// `warp` is its number among those of the block that have the role.
  __device__ explicit Role(int warp)
      : number(warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)),
        count(static_cast<int>(gridDim.x) * kRoleWarps) {}
};

/// A word of a peer's memory that is mapped here, and what it becomes.
struct PeerWord {
  std::uint64_t* word;
  std::uint64_t value;
};
using UntoldWords = Untold<PeerWord, 8>;

/// What the warps of a block have in common, in shared memory.
struct RailShared {
  MappedPeers peers;
  UntoldWords untold[kRailWarps];

  /// By all threads of a block, ahead of a barrier.
  __device__ void begin(const Rails& rails) {
    peers.find(rails);
    if (threadIdx.x < kRailWarps) untold[threadIdx.x] = {};
  }
};

/// By a warp that moves no rows: tells what the others have done.
__device__ inline void tell_peers(RailShared& rails) {
  tell_all<true>(rails.untold,
                 [](const PeerWord& out) { protocol::store_relaxed(out.word, out.value); });
}

/// By a warp that moves rows: what it has done for peers whose memory is mapped. An item's bytes
/// are on their way while it turns to the next.
class Teller {
 public:
  __device__ explicit Teller(UntoldWords& untold) : untold_(untold) {}

  /// By lane 0, behind a barrier of the warp: the word will be told behind all that the warp did.
  __device__ void tell(std::uint64_t* word, std::uint64_t value) {
    untold_.put(count_++, {word, value});
  }
  /// By the warp: the word, as soon as the bulk copies are complete that lane 0 has begun.
  __device__ void tell_later(std::uint64_t* word, std::uint64_t value) { later_ = {word, value}; }
  /// By the warp: tells what was for later, if there is anything. Lane 0's last kPending groups of
  /// bulk copies are of a later item.
  template <int kPending = 0>
  __device__ void tell_now() {
    if (later_.word == nullptr) return;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      bulk_wait_group<kPending>();
      tell(later_.word, later_.value);
    }
    later_.word = nullptr;
  }
  /// By the warp, when it has no more to tell.
  __device__ void end() {
    tell_now();
    __syncwarp();
    if (threadIdx.x % 32 == 0) untold_.end();
  }

 private:
  UntoldWords& untold_;
  std::uint32_t count_ = 0;
  PeerWord later_{};
};

enum class End { kOut, kIn };

/// One end of a ring while a warp serves it. What outlives that is in RailState::Ring.
template <End kEnd>
struct RingEnd {
  int lane;
  int peer;
  std::uint64_t items;  // over all calls: that have been put, or read
  std::int32_t left;    // items of this call
  std::int32_t record;  // of the next item, among those of the node
  int piece;            // of it
  int slot;             // its
  int room = 0;         // slots that are known to be free, of the end that puts

  __device__ RingEnd(const Rails& rails, const ItemShape& item, const std::int32_t* lanes,
                     int of_lane, int of_peer)
      : lane(of_lane), peer(of_peer) {
    const std::int32_t* first =
        lanes + std::int64_t{node(rails)} * (rails.shape.num_lanes + 1) + lane;
    const RailState::Ring& state = rails.state.rings[ring(rails)];
    items = kEnd == End::kOut ? state.sent : state.consumed;
    const auto done =
        static_cast<std::int32_t>(items - (kEnd == End::kOut ? state.out_begin : state.in_begin));
    left = (first[1] - first[0]) * item.pieces - done;
    record = first[0] + (item.pieces == 1 ? done : done / item.pieces);
    piece = item.pieces == 1 ? 0 : done % item.pieces;
    slot = static_cast<int>(items % static_cast<std::uint32_t>(item.slots));
  }
  __device__ std::int64_t ring(const Rails& rails) const { return rails.ring(lane, peer); }
  /// Of the peer.
  __device__ int node(const Rails& rails) const {
    return RailShape::node_of_peer(peer, rails.node);
  }
  /// By the warp.
  __device__ void advance(const ItemShape& item) {
    ++items;
    --left;
    --room;
    if (++piece == item.pieces) {
      piece = 0;
      ++record;
    }
    if (++slot == item.slots) slot = 0;
  }
  /// By the warp: so that another turn, or call, begins here.
  __device__ void keep(const Rails& rails) const {
    RailState::Ring& state = rails.state.rings[ring(rails)];
    __syncwarp();
    if (threadIdx.x % 32 == 0) (kEnd == End::kOut ? state.sent : state.consumed) = items;
    __syncwarp();
  }
};
using RingOut = RingEnd<End::kOut>;
using RingIn = RingEnd<End::kIn>;

/// The ring's number at its other end.
__device__ inline std::int64_t ring_at_peer(const Rails& rails, int lane, int peer) {
  return rails.ring(lane,
                    RailShape::peer_index(rails.node, RailShape::node_of_peer(peer, rails.node)));
}

/// By the warp: of `items` items that have been put to a peer, those that it has not read. Not
/// inlined, since it takes registers that loops need.
__device__ __noinline__ inline int unread(const MappedPeers& peers, int peer,
                                          std::uint64_t* credits, std::uint64_t items) {
  std::uint64_t read = 0;
  if (threadIdx.x % 32 == 0) read = peers.fetch_from(peer, credits);
  return static_cast<int>(items - __shfl_sync(0xffffffff, read, 0));
}

/// By the warp: false, and what is untold is told, if nothing can be put now. `turn` says why.
__device__ inline bool may_put(const Rails& rails, const MappedPeers& peers, const ItemShape& item,
                               Teller& teller, RingOut& end, Turn& turn) {
  turn = Turn::kMoved;
  if (end.left > 0 && end.room > 0) return true;
  end.room = item.slots - unread(peers, end.peer, rails.block.credits + end.ring(rails), end.items);
  if (end.left > 0 && end.room > 0) return true;
  teller.tell_now();
  turn = end.left == 0 && end.room == item.slots ? Turn::kDone : Turn::kStuck;
  return false;
}

/// A ring's next item on its way out.
struct OutItem {
  std::uint64_t number;  // from 1
  std::uint64_t* word;   // the slot's, in this rank's heap
  std::byte* in_ring;    // the slot, in this rank's heap
  bool direct;           // `to` is the slot itself, at the peer; else its mirror here
  std::byte* to;         // where it is composed

  __device__ OutItem(const Rails& rails, const MappedPeers& peers, const ItemShape& item,
                     const RingOut& end) {
    const std::int64_t at_peer = ring_at_peer(rails, end.lane, end.peer);
    const std::int64_t in_slots = end.slot * item.slot_bytes;
    number = end.items + 1;
    word = rails.block.filled + at_peer * RailShape::kMostSlots + end.slot;
    in_ring = rails.block.slots + at_peer * RailShape::kRingBytes + in_slots;
    direct = peers.maps(end.peer);
    to = direct ? peers.in_piece(end.peer, in_ring)
                : rails.block.out_slots + end.ring(rails) * RailShape::kRingBytes + in_slots;
  }
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
__device__ inline void send_out(const Rails& rails, const MappedPeers& peers, const ItemShape& item,
                                const OutItem& out, Teller& teller, RingOut& end,
                                std::int64_t bytes) {
  if (out.direct) {
    teller.tell_later(peers.in_piece(end.peer, out.word), out.number);
  } else {
    put_out(out, bytes, rails.rank_of_peer(end.peer));
  }
  end.advance(item);
}

/// By the warp that serves the ring's receiving end: the item behind `items` others, which is to be
/// in `slot`, or null while it is not here.
__device__ inline const std::byte* next_item(const Rails& rails, const MappedPeers& peers,
                                             const ItemShape& item, std::int64_t ring, int peer,
                                             std::uint64_t items, int slot) {
  bool here = false;
  if (threadIdx.x % 32 == 0)
    here = peers.reached_from(peer, rails.block.filled + ring * RailShape::kMostSlots + slot,
                              items + 1);
  here = __shfl_sync(0xffffffff, here, 0);
  if (!here) return nullptr;
  __syncwarp();  // what lane 0 acquired is visible to all
  return rails.block.slots + ring * RailShape::kRingBytes + slot * item.slot_bytes;
}

/// By a lane, as put_out().
__device__ __noinline__ inline void put_credit(std::uint64_t* word, int rank) {
  fence_acq_rel_sys();
  nvshmemx_signal_op(word, 1, NVSHMEM_SIGNAL_ADD, rank);
}

/// By the same warp: `items` items of the ring have been read, one more than before. Credits that
/// are put are added, not set: so they need no order among themselves.
__device__ inline void release_item(const Rails& rails, const MappedPeers& peers, Teller& teller,
                                    int lane, int peer, std::uint64_t items) {
  std::uint64_t* credit = rails.block.credits + ring_at_peer(rails, lane, peer);
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  if (peers.maps(peer)) {
    teller.tell(peers.in_piece(peer, credit), items);
  } else {
    put_credit(credit, rails.rank_of_peer(peer));
  }
}

/// Items that a warp moves for a ring before it turns to another.
constexpr int kItemsATurn = 4;

/// By a warp that has a role: turn(end) for each of its rings, over and over, until all are done
/// and `rest()`, work that waits for nobody, has no more to do: it is done while no ring moves.
/// missing(ring) gives what one that has not moved waits for. False if it left for a fault.
template <class Ring, class TakeTurn, class Rest, class Missing>
__device__ bool serve_rings(const Comm& comm, const Rails& rails, const ItemShape& item,
                            const std::int32_t* lanes, const Role& role, TakeTurn&& turn,
                            Rest&& rest, Missing&& missing) {
  const int peers = rails.shape.num_peers();
  const int rings = rails.shape.num_rings();
  Patience patience(comm, rails);
  unsigned idle = 0;       // turns
  std::uint32_t over = 0;  // bit i: the i-th of the rings is done
  while (true) {
    bool moved = false;
    int stuck = -1;
    std::uint32_t bit = 1;  // 0 behind the 32nd, which is looked at each time
    for (int ring = role.number; ring < rings; ring += role.count, bit <<= 1) {
      if ((over & bit) != 0) continue;
      Ring end(rails, item, lanes, ring / peers, ring % peers);
      Turn done = Turn::kMoved;
      int items = 0;
      while (items < kItemsATurn && (done = turn(end)) == Turn::kMoved) ++items;
      if (items > 0) {
        end.keep(rails);
        moved = true;
      }
      if (done == Turn::kStuck) stuck = ring;
      if (done == Turn::kDone) over |= bit;
    }
    if (moved) {
      patience.moved();
      continue;
    }
    if (rest()) continue;
    if (stuck < 0) return true;
    if (++idle % RailWaiter::kLooks != 0) {
      __nanosleep(20);
      continue;
    }
    bool go_on = false;
    if (threadIdx.x % 32 == 0)
      go_on = patience.wait(rails.rank_of_peer(stuck % peers), [&] { return missing(stuck); });
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
    for (int ring = role.number; ring < rails.shape.num_rings(); ring += role.count)
      rails.state.rings[ring].*kBegin = rails.state.rings[ring].*kItems;
  }
  __syncwarp();
}

}  // namespace deep_ep::cuda::internode
