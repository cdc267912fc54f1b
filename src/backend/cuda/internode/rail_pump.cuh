#pragma once

#include "backend/cuda/device/pump.cuh"
#include "backend/cuda/internode/rings.cuh"

// How a warp moves rows to and from rings: all its items pass through one pipeline.
namespace deep_ep::cuda::internode {

/// The x of an item on its way, a stage at most, for a lane: where it stores it in each of kPlaces,
/// or null.
template <int kPlaces>
struct alignas(8) RailNote {
  std::byte* to[kPlaces];
  std::uint32_t bytes;
  std::uint32_t end;  // where its ItemEnd is, of one that comes from a ring or goes to one
};
/// To a ring, by lane 0. It counts as complete a few items later, so nobody waits
/// for its stores.
using SendNote = RailNote<1>;
template <int kStages>
using SendPump = Pump<kStages, kMostPart, 1, SendNote, 2>;
/// To the ranks of this node.
using PlaceNote = RailNote<kRanksALane>;
using PlacePump = Pump<2, kMostPart, 1, PlaceNote>;

/// What a warp has to tell of an item when it has passed.
struct ItemEnd {
  std::uint64_t* word;   // RingEnd::word
  std::uint64_t number;  // from 1
  // If it is put:
  std::int32_t lane;
  std::int32_t peer;
  std::int32_t slot;
  std::uint32_t bytes;  // with the head, of one that is sent
};

/// A warp's shared memory.
template <class Pump>
struct RailStage {
  typename Pump::Storage pump;
  ItemEnd ends[Pump::kNotes];
};

/// By the warp: an item goes from the mirror. Not inlined, since it takes registers that loops
/// need.
__device__ __noinline__ inline void put_item(const Rails& rails, const ItemShape& item, int lane,
                                             int peer, int slot, std::uint64_t number,
                                             std::uint32_t bytes) {
  const std::int64_t at_peer = ring_at_peer(rails, lane, peer);
  const std::int64_t in_slots = slot * item.slot_bytes;
  // What the lanes wrote is visible to who puts it, a network's adapter too.
  fence_acq_rel_sys();
  __syncwarp();
  nvshmemx_putmem_signal_nbi_warp(
      rails.block.slots + at_peer * RailShape::kRingBytes + in_slots,
      rails.block.out_slots + rails.ring(lane, peer) * RailShape::kRingBytes + in_slots, bytes,
      rails.block.filled + at_peer * RailShape::kMostSlots + slot, number, NVSHMEM_SIGNAL_SET,
      rails.rank_of_peer(peer));
}

/// By the warp: an item is where it was composed, all of it.
__device__ __forceinline__ void send_item(const Rails& rails, const ItemShape& item, Teller& teller,
                                          const ItemEnd& end) {
  if (end.word == nullptr) {
    put_item(rails, item, end.lane, end.peer, end.slot, end.number, end.bytes);
  } else if (lane_id() == 0) {
    teller.tell(end.word, end.number);
  }
}

/// By lane 0, behind a barrier of the warp: the item has been read from its slot.
__device__ __forceinline__ void release_item(const Rails& rails, Teller& teller,
                                             const ItemEnd& end) {
  if (end.word != nullptr) {
    teller.tell(end.word, end.number);
  } else {
    put_credit(rails.block.credits +
                   ring_at_peer(rails, end.lane, end.peer) * RailShape::kMostSlots + end.slot,
               end.number, rails.rank_of_peer(end.peer));
  }
}

/// A warp's ItemEnds, as many as can be under way.
template <class Pump>
class ItemEnds {
 public:
  __device__ __forceinline__ explicit ItemEnds(ItemEnd* ends) : ends_(ends) {}

  /// By the warp: where that of the ring's next item is.
  template <class Ring>
  __device__ __forceinline__ std::uint32_t put(const Ring& end, std::uint32_t bytes = 0) {
    const std::uint32_t at = next_;
    next_ = next_ + 1 == Pump::kNotes ? 0 : next_ + 1;
    if (lane_id() == 0) {
      ItemEnd& to = ends_[at];
      to.word = end.word;
      to.number = end.items + 1;
      if (end.word == nullptr) {
        to.lane = end.lane;
        to.peer = end.peer;
        to.slot = end.slot;
        to.bytes = bytes;
      }
    }
    return at;
  }

 private:
  ItemEnd* ends_;
  std::uint32_t next_ = 0;
};

/// By a warp: moves all that next() gives, over and over, until its rings have ended. store(from,
/// note) and sent(note) as in Pump; missing(ring) gives what one that has not moved waits for,
/// `more_ns` longer than other waits. False if it left for a fault.
template <class Pump, class Next, class Turns, class Store, class Sent, class Missing>
__device__ __forceinline__ bool pump_rings(const Comm& comm, const Rails& rails, Pump& pump,
                                           Turns& turns, Next& next, Store&& store, Sent&& sent,
                                           Missing&& missing, std::int64_t more_ns = 0) {
  Patience patience(comm, rails, more_ns);
  unsigned idle = 0;  // turns
  while (true) {
    bool moved = false;
    pump.run_while(
        next,
        [&](const std::byte* from, const auto& note) {
          moved = true;
          store(from, note);
        },
        sent);
    turns.keep();
    const int stuck = turns.stuck();
    if (stuck < 0) return true;
    if (moved) {
      patience.moved();
      continue;
    }
    if (++idle % RailWaiter::kLooks != 0) {
      __nanosleep(20);
      continue;
    }
    bool go_on = false;
    if (lane_id() == 0)
      go_on = patience.wait(rails.rank_of_peer(stuck % rails.shape.num_peers()),
                            [&] { return missing(stuck); });
    if (!__shfl_sync(0xffffffff, go_on, 0)) return false;
  }
}

/// What the sending end of a ring waits for.
__device__ __forceinline__ Awaited missing_room(const Rails& rails, std::int64_t ring,
                                                const ItemShape& item) {
  const std::uint64_t sent = rails.state.rings[ring].sent;
  const auto slots = static_cast<std::uint64_t>(item.slots);
  return {Wait::kRoom, sent < slots ? 0 : sent + 1 - slots,
          nvshmem_signal_fetch(rails.block.credits + ring * RailShape::kMostSlots +
                               item.slot_of(sent))};
}

/// By a warp that writes to rings: all items that `rows` gives.
template <class Pump, class Rows>
__device__ __forceinline__ void send_items(const Comm& comm, const Rails& rails,
                                           const ItemShape& item, RailStage<Pump>& stage,
                                           UntoldWords& untold, Rows& rows) {
  Pump pump(stage.pump);
  Teller teller(untold);
  (void)pump_rings(
      comm, rails, pump, rows.turns, rows,
      [&](const std::byte* from, const SendNote& note) {
        if (lane_id() == 0) bulk_store(note.to[0], from, note.bytes);
      },
      [&](const SendNote& note) { send_item(rails, item, teller, stage.ends[note.end]); },
      [&](std::int64_t ring) { return missing_room(rails, ring, item); },
      // Of a peer that does not call notify tells, which begins to wait a little later.
      rails.timeout_ns / 16);
  teller.end();
}

}  // namespace deep_ep::cuda::internode
