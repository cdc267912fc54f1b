#pragma once

#include "backend/cuda/device/telling.cuh"
#include "backend/cuda/internode/rail.cuh"

// Rings between rail peers, each written by one warp, item by item in order. The words of a ring
// outlive calls; at the end of a call it is empty (I18).
namespace deep_ep::cuda::internode {

/// A warp among those of the grid that have its role; count = 0: it has none.
struct Role {
  int number = 0;
  int count = 0;
};

/// Of a warp that writes to rings, or does not, and is `warp` among `warps` of such in a block.
/// Neighbours in number are of different blocks.
__device__ __forceinline__ Role role_of(bool sends, int warp, int warps) {
  const auto all = static_cast<int>(gridDim.x);
  const int apart = send_blocks(all);
  const int blocks = sends && apart > 0 ? apart : all - apart;
  const int block = static_cast<int>(blockIdx.x) - (sends ? 0 : apart);
  if (block < 0 || block >= blocks) return {};
  return {warp * blocks + block, warps * blocks};
}

/// What a warp could do for one of its rings.
enum class Turn { kReady, kStuck, kDone };

/// A word of a peer's memory that is mapped here, and what it becomes.
struct PeerWord {
  std::uint64_t* word;
  std::uint64_t value;
};
using UntoldWords = Untold<PeerWord, 8>;

/// What the warps of a block have in common, in shared memory.
template <int kWarps>
struct RailShared {
  MappedPeers peers;
  UntoldWords untold[kWarps];

  /// By all threads of a block, ahead of a barrier.
  __device__ __forceinline__ void begin(const Rails& rails) {
    peers.find(rails);
    if (threadIdx.x < kWarps) untold[threadIdx.x] = {};
  }
  /// By a warp that moves no rows: tells what the others have done. A word is told again only
  /// behind an answer, so their order does not matter.
  __device__ __forceinline__ void tell() {
    tell_all<false>(untold,
                    [](const PeerWord& out) { protocol::store_relaxed(out.word, out.value); });
  }
  /// By a warp, when it has done its part, well or not. After a fault nothing that was put is
  /// written again, and who has died over a network would be waited for.
  template <class Args>
  __device__ __forceinline__ void end(const Args& args, bool good) const {
    if (!good || threadIdx.x % 32 != 0 || peers.maps_all(args.rails)) return;
    if (may_start(args.comm)) nvshmem_quiet();
  }
};

/// By a warp that moves rows: what it has done for peers.
class Teller {
 public:
  __device__ explicit Teller(UntoldWords& untold) : untold_(untold) {}

  /// By lane 0, behind a barrier of the warp: the word will be told behind all that the warp did.
  __device__ __forceinline__ void tell(std::uint64_t* word, std::uint64_t value) {
    untold_.put(count_++, {word, value}, told_);
  }
  /// By the warp, when it has no more to tell.
  __device__ __forceinline__ void end() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) untold_.end();
  }

 private:
  UntoldWords& untold_;
  std::uint32_t count_ = 0;
  std::uint32_t told_ = 0;
};

/// Warps that take turns at the items of a ring, if there are more warps than rings; rows of
/// several items have one.
struct Team {
  int member = 0;
  int size = 1;
};

/// The ring's number at its other end.
__device__ __forceinline__ std::int64_t ring_at_peer(const Rails& rails, int lane, int peer) {
  return rails.ring(lane,
                    RailShape::peer_index(rails.node, RailShape::node_of_peer(peer, rails.node)));
}

/// The records that go one way between this node and others. A combine's come back as sums.
struct Flow {
  const std::int32_t* records;  // [nodes] of each, or, if `sums`, up to each one
  bool sums;
  const std::int32_t* lanes;  // [nodes] that the records of a node are dealt to; null: Rails::lanes

  __device__ __forceinline__ std::int32_t of(int node) const {
    return records[node] - (sums && node > 0 ? records[node - 1] : 0);
  }
  __device__ __forceinline__ std::int32_t lanes_of(const Rails& rails, int node) const {
    return lanes == nullptr ? rails.lanes : lanes[node];
  }
  /// Each lanes_of()-th, from the lane's number on.
  __device__ __forceinline__ std::int32_t of_lane(const Rails& rails, int node, int lane) const {
    const std::int32_t all = of(node);
    const std::int32_t step = lanes_of(rails, node);
    return lane < step && lane < all ? (all - lane - 1) / step + 1 : 0;
  }
};

enum class End { kOut, kIn };

/// One end of a ring while a warp serves it. What outlives that is in RailState::Ring.
template <End kEnd>
struct RingEnd {
  int lane;
  int peer;
  std::uint64_t begin;  // items ahead of this call
  std::uint64_t items;  // over all calls: that have been put, or read
  std::int32_t left;    // items of this call
  std::int32_t record;  // of the next item, among those of the node
  std::int32_t stride;  // to the record behind it
  int piece;            // of it
  int slot;             // its
  int known = 0;        // slots that are known to be free, or items to be here
  std::byte* at;        // where it is composed, or read
  std::uint64_t* word;  // the peer's that tells of it, as mapped here; null: it is put to

  /// `number` of the ring; the warp takes the items that its team leaves it.
  __device__ __forceinline__ RingEnd(const Rails& rails, const MappedPeers& peers,
                                     const ItemShape& item, const Flow& flow, int number,
                                     const Team& team)
      : lane(number / rails.shape.num_peers()), peer(number % rails.shape.num_peers()) {
    const RailState::Ring& state = rails.state.rings[number];
    const std::int32_t all = flow.of_lane(rails, node(rails), lane) * item.pieces;
    const std::int32_t lanes = flow.lanes_of(rails, node(rails));
    begin = kEnd == End::kOut ? state.out_begin : state.in_begin;
    items = kEnd == End::kOut ? state.sent : state.consumed;
    if (team.size > 1) items = begin + team.member;
    const auto done = static_cast<std::int32_t>(items - begin);
    left = all > done ? (all - done + team.size - 1) / team.size : 0;
    record = lane + (item.pieces == 1 ? done : done / item.pieces) * lanes;
    stride = lanes * team.size;
    piece = item.pieces == 1 ? 0 : done % item.pieces;
    slot = item.slot_of(items);
    const std::int64_t at_peer = ring_at_peer(rails, lane, peer);
    const std::int64_t in_slots = slot * item.slot_bytes;
    const RailBlock& block = rails.block;
    if constexpr (kEnd == End::kOut) {
      word = peers.in_piece(peer, block.filled + at_peer * RailShape::kMostSlots + slot);
      at = word == nullptr
               ? block.out_slots + number * RailShape::kRingBytes + in_slots
               : peers.in_piece(peer, block.slots + at_peer * RailShape::kRingBytes + in_slots);
    } else {
      word = peers.in_piece(peer, block.credits + at_peer * RailShape::kMostSlots + slot);
      at = block.slots + number * RailShape::kRingBytes + in_slots;
    }
  }
  __device__ __forceinline__ std::int64_t ring(const Rails& rails) const {
    return rails.ring(lane, peer);
  }
  /// Of the peer.
  __device__ __forceinline__ int node(const Rails& rails) const {
    return RailShape::node_of_peer(peer, rails.node);
  }
  /// By the warp.
  __device__ __forceinline__ void advance(const ItemShape& item, int step) {
    items += step;
    --left;
    --known;
    if (item.pieces == 1) {
      record += stride;
    } else if (++piece == item.pieces) {
      piece = 0;
      record += stride;
    }
    std::int64_t slots = step;
    slot += step;
    if (slot >= item.slots) {
      slot -= item.slots;
      slots -= item.slots;
    }
    at += slots * item.slot_bytes;
    if (word != nullptr) word += slots;
  }
  /// By the warp: so that another turn, or call, begins here.
  __device__ __forceinline__ void keep(const Rails& rails) const {
    RailState::Ring& state = rails.state.rings[ring(rails)];
    __syncwarp();
    if (threadIdx.x % 32 == 0) (kEnd == End::kOut ? state.sent : state.consumed) = items;
    __syncwarp();
  }
};
using RingOut = RingEnd<End::kOut>;
using RingIn = RingEnd<End::kIn>;

/// By the warp: slots that are free, from the next one on. Those of another call are, since a ring
/// is empty between two.
__device__ __forceinline__ int free_slots(const Rails& rails, const MappedPeers& peers,
                                          const ItemShape& item, const RingOut& end) {
  const int i = lane_id();
  bool free = false;
  if (i < item.slots) {
    const int slot = end.slot + i < item.slots ? end.slot + i : end.slot + i - item.slots;
    const std::uint64_t number = end.items + i;  // of what would be put there, from 0
    const auto slots = static_cast<std::uint32_t>(item.slots);
    std::uint64_t* credit = rails.block.credits + end.ring(rails) * RailShape::kMostSlots + slot;
    free = number < end.begin + slots || peers.fetch_from(end.peer, credit) + slots > number;
  }
  const std::uint32_t full = __ballot_sync(0xffffffff, !free);
  return full == 0 ? 32 : __ffs(static_cast<int>(full)) - 1;
}

/// By the warp, if none is known to: whether the next item can be put.
__device__ __forceinline__ Turn look_out(const Rails& rails, const MappedPeers& peers,
                                         const ItemShape& item, RingOut& end) {
  end.known = free_slots(rails, peers, item, end);
  if (end.left > 0) return end.known > 0 ? Turn::kReady : Turn::kStuck;
  return end.known == item.slots ? Turn::kDone : Turn::kStuck;
}

/// By the warp, if none is known to be: whether the next item is here.
__device__ __forceinline__ Turn look_in(const Rails& rails, const MappedPeers& peers,
                                        const ItemShape& item, int step, RingIn& end) {
  if (end.left == 0) return Turn::kDone;
  const int i = lane_id();
  bool here = false;
  if (i * step < item.slots && i < end.left) {
    const int behind = end.slot + i * step;
    const int slot = behind < item.slots ? behind : behind - item.slots;
    here = peers.reached_from(end.peer,
                              rails.block.filled + end.ring(rails) * RailShape::kMostSlots + slot,
                              end.items + i * step + 1);
  }
  // What each lane acquired is visible to all behind this.
  const std::uint32_t missing = __ballot_sync(0xffffffff, !here);
  __syncwarp();
  end.known = missing == 0 ? 32 : __ffs(static_cast<int>(missing)) - 1;
  return end.known > 0 ? Turn::kReady : Turn::kStuck;
}

/// By the last block of a kernel of which nobody has kept what it has read: all items of the call,
/// of the records that came.
template <int kThreads>
__device__ void count_consumed(const Rails& rails, const ItemShape& item, const Flow& flow) {
  for (int ring = threadIdx.x; ring < rails.shape.num_rings(); ring += kThreads) {
    const int lane = ring / rails.shape.num_peers();
    const int node = RailShape::node_of_peer(ring % rails.shape.num_peers(), rails.node);
    rails.state.rings[ring].consumed +=
        static_cast<std::uint64_t>(std::int64_t{flow.of_lane(rails, node, lane)} * item.pieces);
  }
}

/// By a lane. Not inlined, since it takes registers that loops need.
__device__ __noinline__ inline void put_credit(std::uint64_t* word, std::uint64_t number,
                                               int rank) {
  fence_acq_rel_sys();
  nvshmemx_signal_op(word, number, NVSHMEM_SIGNAL_SET, rank);
}

/// By a warp: the rings of its role, in turns of several items, for as long as one of them moves.
template <End kEnd>
class RingTurns {
 public:
  /// Of the records that go that way. With a team it serves one ring.
  __device__ __forceinline__ RingTurns(const Rails& rails, const MappedPeers& peers,
                                       const ItemShape& item, const Flow& flow, const Role& role,
                                       const Team& team = {})
      : rails_(rails),
        peers_(peers),
        item_(item),
        flow_(flow),
        role_(role),
        team_(team),
        count_(role.count > 0 && role.number < rails.shape.num_rings()
                   ? (rails.shape.num_rings() - role.number + role.count - 1) / role.count
                   : 0),
        end(begin_all(rails, role), peers, item, flow, count_ > 0 ? role.number : 0, team) {}

  /// True: the next item of the ring is ready, as is known or look(end) says. Else stuck() says
  /// whether there are rings that have not ended.
  template <class Look>
  __device__ __forceinline__ bool find(Look&& look) {
    if (turn_ == kItemsATurn) (void)next_ring();
    if (end.known > 0 && end.left > 0) {
      turn_ += count_ > 1;
      return true;
    }
    int stuck = -1;
#pragma unroll 1
    for (int looks = 0; looks < count_; ++looks) {
      if (!is_over(at_)) {
        const Turn turn = look(end);
        if (turn == Turn::kReady) {
          turn_ += count_ > 1;
          return true;
        }
        if (turn == Turn::kStuck) stuck = number(at_);
        if (turn == Turn::kDone && at_ < 32) over_ |= std::uint32_t{1} << at_;
      }
      if (!next_ring()) break;
    }
    stuck_ = stuck;
    return false;
  }
  /// By the warp, when an item has been taken.
  __device__ __forceinline__ void advance() { end.advance(item_, team_.size); }
  __device__ __forceinline__ void keep() const {
    if (count_ > 0 && team_.size == 1) end.keep(rails_);
  }
  /// A ring that waits, or -1: all have ended.
  __device__ __forceinline__ int stuck() const { return stuck_; }

 private:
  static constexpr int kItemsATurn = 8;

  __device__ __forceinline__ static const Rails& begin_all(const Rails& rails, const Role& role) {
    if (threadIdx.x % 32 == 0 && role.count > 0) {
      for (int ring = role.number; ring < rails.shape.num_rings(); ring += role.count) {
        RailState::Ring& state = rails.state.rings[ring];
        (kEnd == End::kOut ? state.out_begin : state.in_begin) =
            kEnd == End::kOut ? state.sent : state.consumed;
      }
    }
    __syncwarp();
    return rails;
  }
  __device__ __forceinline__ int number(int at) const { return role_.number + at * role_.count; }
  /// Those behind the 32nd are looked at each time.
  __device__ __forceinline__ bool is_over(int at) const {
    return at < 32 && (over_ >> at & 1) != 0;
  }
  /// Turns to the next ring that has not ended; false if there is none but this one.
  __device__ __forceinline__ bool next_ring() {
    turn_ = 0;
    int next = at_;
    do {
      if (++next >= count_) next = 0;
    } while (next != at_ && is_over(next));
    if (next == at_) return false;
    end.keep(rails_);
    at_ = next;
    end = RingEnd<kEnd>(rails_, peers_, item_, flow_, number(at_), team_);
    return true;
  }

  const Rails& rails_;
  const MappedPeers& peers_;
  const ItemShape& item_;
  Flow flow_;
  Role role_;
  Team team_;
  int count_;
  int at_ = 0;
  int turn_ = 0;
  int stuck_ = -1;
  std::uint32_t over_ = 0;

 public:
  RingEnd<kEnd> end;  // of the present ring
};

}  // namespace deep_ep::cuda::internode
