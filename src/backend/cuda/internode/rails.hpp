#pragma once

#include <cstddef>
#include <cstdint>

#include "base/carver.hpp"
#include "plan/internode.hpp"
#include "plan/topology.hpp"
#include "protocol/control.hpp"
#include "protocol/fault.hpp"

// What lies between the nodes: rings of items from a rank to its rail peers, and what ranks tell
// each other of a call. Compiled by g++ and nvcc.
namespace deep_ep::cuda::internode {

// Warps of a block that write to rings, and how many blocks of them fill a link. Where there are
// four times as many these have nothing else to do: what an SM loads and stores waits behind its
// stores to a peer.
constexpr int kSendWarps = 2;
constexpr int kSendBlocks = 32;
/// Of a kernel of `blocks` blocks, the first ones that only write to rings; 0: all of them do.
DEEP_EP_HD constexpr int send_blocks(int blocks) {
  return blocks < 4 * kSendBlocks ? 0 : kSendBlocks;
}

/// The records for a node are dealt to lanes in turns, each with a ring to each rail peer. A warp
/// writes a ring, and as few as fill a link write at the same time: so lanes are few and their
/// rings long, since what is under way on a link is several hundred rows.
struct RailShape {
  static constexpr int kMostLanes = kSendWarps * kSendBlocks;
  static constexpr int kSharedLanes = 128;  // of all peers
  static constexpr int kMostSlots = 32;     // of a ring
  static constexpr std::int64_t kRingBytes = 256 << 10;

  plan::Topology topology;
  int num_lanes = 1;

  DEEP_EP_HD int num_peers() const { return topology.num_nodes() - 1; }
  DEEP_EP_HD int num_rings() const { return num_lanes * num_peers(); }
  /// Of a Buffer that was given no memory for more: one peer takes as many warps as there are, many
  /// peers share them.
  int fewest_lanes() const {
    const int fair = kSharedLanes / num_peers();
    return fair > kMostLanes ? kMostLanes : fair < 8 ? 8 : fair;
  }
  /// Of a rank's call on so many SMs: one for each warp that writes to rings.
  int lanes_of_call(int num_sms) const {
    const int warps = num_sms * kSendWarps;
    return warps < num_lanes ? warps : num_lanes;
  }
  /// Index of another node among all others of `at_node`, and back.
  DEEP_EP_HD static int peer_index(int node, int at_node) {
    return node < at_node ? node : node - 1;
  }
  DEEP_EP_HD static int node_of_peer(int peer, int at_node) {
    return peer < at_node ? peer : peer + 1;
  }
};

/// What a rank tells a rail peer of a call, ahead of all else; behind it the source's entries for
/// each expert of the peer's node, int32 [num_experts].
struct Announcement {
  protocol::CallRecord record;
  std::int32_t num_experts;                   // 0 without counts
  std::int32_t lanes;                         // that it deals what it sends to
  std::int32_t records;                       // for the peer's node, of which a combine brings sums
  std::int32_t rows[plan::kMaxRanksPerNode];  // for each rank of the peer's node

  DEEP_EP_HD static std::int64_t bytes(int ranks_per_node) {
    return static_cast<std::int64_t>(sizeof(Announcement)) +
           std::int64_t{4} * ranks_per_node * protocol::ControlBlock::kMaxLocalExperts;
  }
};

/// Every rank's piece of the symmetric heap. Others write by put and signal; arrays are by rail
/// peer, the other nodes in order, unless they say otherwise. The out_ parts are what this rank
/// puts from; nobody else touches them.
struct RailBlock {
  std::uint64_t* left;        // [R] 1: that rank has destroyed its Buffer
  std::uint64_t* num_faults;  // [1] ranks of other nodes that have told a fault; hint to look below
  std::uint64_t* faulted;     // [R] 1: that rank's record is complete
  protocol::FaultRecord* faults;  // [R]
  protocol::FaultRecord* out_fault;
  struct Mailbox {          // two alternate by parity of the announcement (I17)
    std::uint64_t* posted;  // [peers] number of the announcement that is here
    std::byte* messages;    // [peers, message_bytes]
    std::byte* out_messages;
  } mailbox[2];
  std::uint64_t* filled;   // [rings, kMostSlots] number of the item, from 1, that the slot holds
  std::uint64_t* credits;  // [rings, kMostSlots] of the rings that this rank writes: number of the
                           // item that has been read from the slot
  std::byte* slots;        // [rings, kRingBytes]
  std::byte* out_slots;
  std::int64_t message_bytes;

  DEEP_EP_HD static RailBlock carve(Carver& carver, const RailShape& shape) {
    const std::int64_t ranks = shape.topology.num_ranks;
    const std::int64_t peers = shape.num_peers();
    const std::int64_t rings = shape.num_rings();
    RailBlock block;
    block.message_bytes = (Announcement::bytes(shape.topology.ranks_per_node) + 127) / 128 * 128;
    block.left = carver.take<std::uint64_t>(ranks);
    block.num_faults = carver.take<std::uint64_t>(1);
    block.faulted = carver.take<std::uint64_t>(ranks);
    block.faults = carver.take<protocol::FaultRecord>(ranks);
    block.out_fault = carver.take<protocol::FaultRecord>(1);
    for (Mailbox& mailbox : block.mailbox) {
      mailbox.posted = carver.take<std::uint64_t>(peers);
      mailbox.messages = carver.take<std::byte>(peers * block.message_bytes);
      mailbox.out_messages = carver.take<std::byte>(peers * block.message_bytes);
    }
    block.filled = carver.take<std::uint64_t>(rings * RailShape::kMostSlots);
    block.credits = carver.take<std::uint64_t>(rings * RailShape::kMostSlots);
    block.slots = carver.take<std::byte>(rings * RailShape::kRingBytes);
    block.out_slots = carver.take<std::byte>(rings * RailShape::kRingBytes);
    return block;
  }

  static std::int64_t bytes(const RailShape& shape) {
    Carver carver(nullptr);
    (void)carve(carver, shape);
    return carver.used();
  }
};

/// What a rank has sent to other nodes, as NetworkCounts has it: a row, or a message, that is
/// written to mapped memory counts as put, its word as a signal.
struct SentCounts {
  unsigned long long rows;
  unsigned long long row_bytes;
  unsigned long long puts;
  unsigned long long put_bytes;
  unsigned long long signals;
};

/// What a rank knows for itself, in its GPU's memory: of the rings, and of the present call since
/// its notify.
struct RailState {
  struct Ring {
    std::uint64_t sent;      // items put
    std::uint64_t consumed;  // items read; of any warp, or of teams, counted at a kernel's end
    // Where the present kernel began.
    std::uint64_t out_begin;
    std::uint64_t in_begin;
  };
  std::uint64_t* announced;   // [1] announcements that have ended
  std::uint64_t* told_fault;  // [1] 1: the other nodes know of this rank's fault
  SentCounts* sent_counts;    // [1] of the calls that have ended
  Ring* rings;                // [rings]
  std::byte** mapped;         // [peers] RailBlock of each as mapped here; null: it is put to
  std::uint64_t* go;          // [1] NotifyArgs::go, from there on until the kernel behind ends
  std::int32_t* totals;       // [R + nodes] rows for each rank, records for each node
  std::int32_t* prefix;       // [ranks of the node, R] rows from the sources up to each one
  std::int32_t* num_tokens;   // [R] of each source
  std::int32_t* records;      // [nodes] that come, or stay, up to each node
  std::int32_t* lanes;        // [nodes] that a node deals to what it sends here

  DEEP_EP_HD static RailState carve(Carver& carver, const RailShape& shape) {
    const std::int64_t ranks = shape.topology.num_ranks;
    const std::int64_t nodes = shape.topology.num_nodes();
    RailState state;
    state.announced = carver.take<std::uint64_t>(1);
    state.told_fault = carver.take<std::uint64_t>(1);
    state.sent_counts = carver.take<SentCounts>(1);
    state.rings = carver.take<Ring>(shape.num_rings());
    state.mapped = carver.take<std::byte*>(shape.num_peers());
    state.go = carver.take<std::uint64_t>(1);
    state.totals = carver.take<std::int32_t>(ranks + nodes);
    state.prefix = carver.take<std::int32_t>(shape.topology.ranks_per_node * ranks);
    state.num_tokens = carver.take<std::int32_t>(ranks);
    state.records = carver.take<std::int32_t>(nodes);
    state.lanes = carver.take<std::int32_t>(nodes);
    return state;
  }

  static std::int64_t bytes(const RailShape& shape) {
    Carver carver(nullptr);
    (void)carve(carver, shape);
    return carver.used();
  }
};

/// Passed to every kernel by value, beside Comm.
struct Rails {
  RailShape shape;
  int node = 0;                 // of this rank
  int index = 0;                // in it
  std::int64_t timeout_ns = 0;  // of a wait for a rail peer
  int lanes = 1;                // that what this rank sends in the call is dealt to, of shape's
  RailBlock block;
  RailState state;

  DEEP_EP_HD int rank() const { return shape.topology.rank_of(node, index); }
  /// The rank that a peer's index stands for.
  DEEP_EP_HD int rank_of_peer(int peer) const {
    return shape.topology.rank_of(RailShape::node_of_peer(peer, node), index);
  }
  DEEP_EP_HD std::int64_t ring(int lane, int peer) const {
    return std::int64_t{lane} * shape.num_peers() + peer;
  }
};

/// How a row crosses: as one item or, if it is long, as several, which all carry what comes before
/// x. An item fills a slot. The same on all ranks.
struct ItemShape {
  std::int64_t head_bytes = 0;  // before x, whose lines a link takes whole
  std::int64_t x_bytes = 0;     // of the row
  std::int64_t part_bytes = 0;  // of x in an item, but for the last
  int pieces = 1;               // items of a row
  std::int64_t slot_bytes = 0;
  int slots = 1;  // of a ring

  static constexpr std::int64_t kMostHead = 16 << 10;

  /// With parts of at most `most_part` bytes, a multiple of 512. pieces = 0: the head is too long.
  static ItemShape make(std::int64_t head_bytes, std::int64_t x_bytes, std::int64_t most_part) {
    ItemShape shape;
    shape.head_bytes = head_bytes;
    shape.x_bytes = x_bytes;
    shape.pieces = 0;
    if (head_bytes > kMostHead) return shape;
    shape.head_bytes = plan::align_up(head_bytes, 128);
    shape.pieces = static_cast<int>((x_bytes + most_part - 1) / most_part);
    const std::int64_t part = (x_bytes + shape.pieces - 1) / shape.pieces;
    shape.part_bytes = shape.pieces == 1 ? x_bytes : (part + 511) / 512 * 512;
    shape.slot_bytes = plan::align_up(shape.head_bytes + shape.part_bytes, 128);
    const std::int64_t slots = RailShape::kRingBytes / shape.slot_bytes;
    shape.slots = slots < RailShape::kMostSlots ? static_cast<int>(slots) : RailShape::kMostSlots;
    return shape;
  }

  /// Of the item behind `items` others.
  DEEP_EP_HD int slot_of(std::uint64_t items) const {
    return static_cast<int>(items % static_cast<std::uint32_t>(slots));
  }
  DEEP_EP_HD std::int64_t x_begin(int piece) const { return piece * part_bytes; }
  DEEP_EP_HD std::int64_t x_size(int piece) const {
    const std::int64_t left = x_bytes - x_begin(piece);
    return left < part_bytes ? left : part_bytes;
  }
};

}  // namespace deep_ep::cuda::internode
