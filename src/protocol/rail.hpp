#pragma once

#include <cstddef>
#include <cstdint>

#include "base/carver.hpp"
#include "protocol/control.hpp"
#include "protocol/epoch.hpp"
#include "protocol/fault.hpp"

namespace deep_ep::protocol {

/// What a rank tells a rail peer of a call, before anything else of it: a RailMessage, and behind
/// it the source's entries for each expert of the peer's node, int32 [num_experts].
struct RailMessage {
  static constexpr int kMaxLanes = 64;
  static constexpr int kMaxRanksPerNode = 64;

  CallRecord record;
  std::int32_t num_records;                  // that cross to the peer
  std::int32_t num_experts;                  // of the peer's node; 0 without counts
  std::int32_t rows[kMaxRanksPerNode];       // of them for each rank of its node
  std::int32_t lane_records[kMaxLanes + 1];  // number of the first record of each lane
};

struct RailShape {
  int num_ranks = 1;
  int ranks_per_node = 1;
  int num_lanes = 1;
  std::int64_t ring_bytes = 0;  // of one lane, one direction, one pair of rail peers

  DEEP_EP_HD int num_peers() const { return num_ranks / ranks_per_node - 1; }
  DEEP_EP_HD std::int64_t message_bytes() const {
    const std::int64_t bytes = static_cast<std::int64_t>(sizeof(RailMessage)) +
                               std::int64_t{4} * ranks_per_node * ControlBlock::kMaxLocalExperts;
    return (bytes + 127) / 128 * 128;
  }
};

/// Every rank's part of the symmetric heap. What others write: arrays by the writing rank, or by
/// rail peer: the other nodes in order. The out_ parts mirror what this rank writes to others;
/// nobody else touches them.
struct RailBlock {
  struct Mailbox {        // two alternate by parity of the epoch, as in ControlBlock (I3)
    EpochFlag* posted;    // [peers] the message is complete
    std::byte* messages;  // [peers, message_bytes]
    std::byte* out_messages;
  };

  EpochFlag* faulted;        // [R] 1: that rank's fault record is complete
  FaultRecord* faults;       // [R]
  FaultRecord* out_fault;    // [1]
  std::uint64_t* wait_mark;  // [R] as in ControlBlock, of that rank
  Mailbox mailbox[2];
  EpochFlag* ring_tail;  // [lanes, peers]
  EpochFlag* ring_head;  // [lanes, peers] credits of the rings that this rank writes
  std::byte* ring_data;  // [lanes, peers, ring_bytes]
  std::byte* out_ring_data;

  DEEP_EP_HD static RailBlock carve(Carver& carver, const RailShape& shape) {
    const std::int64_t ranks = shape.num_ranks;
    const std::int64_t peers = shape.num_peers();
    const std::int64_t rings = peers * shape.num_lanes;
    RailBlock block;
    block.faulted = carver.take<EpochFlag>(ranks);
    block.faults = carver.take<FaultRecord>(ranks);
    block.out_fault = carver.take<FaultRecord>(1);
    block.wait_mark = carver.take<std::uint64_t>(ranks);
    for (Mailbox& mailbox : block.mailbox) {
      mailbox.posted = carver.take<EpochFlag>(peers);
      mailbox.messages = carver.take<std::byte>(peers * shape.message_bytes());
      mailbox.out_messages = carver.take<std::byte>(peers * shape.message_bytes());
    }
    block.ring_tail = carver.take<EpochFlag>(rings);
    block.ring_head = carver.take<EpochFlag>(rings);
    block.ring_data = carver.take<std::byte>(rings * shape.ring_bytes);
    block.out_ring_data = carver.take<std::byte>(rings * shape.ring_bytes);
    return block;
  }

  DEEP_EP_HD static std::int64_t bytes(const RailShape& shape) {
    Carver carver(nullptr);
    (void)carve(carver, shape);
    return carver.used();
  }

  /// Lanes, at most `most_lanes`, and rings that fill `bytes` bytes.
  static RailShape fit(RailShape shape, int most_lanes, std::int64_t bytes) {
    for (shape.num_lanes = most_lanes;; --shape.num_lanes) {
      shape.ring_bytes = 0;
      const std::int64_t rings = std::int64_t{2} * shape.num_lanes * shape.num_peers();
      shape.ring_bytes = (bytes - RailBlock::bytes(shape)) / rings / 128 * 128;
      if (shape.ring_bytes >= kMinRingBytes || shape.num_lanes == 1) return shape;
    }
  }
  /// Less holds too few records for both sides to work at the same time.
  static constexpr std::int64_t kMinRingBytes = 256 << 10;
  /// Of the one lane of a Buffer that was given no memory for this.
  static constexpr std::int64_t kLeastRingBytes = 1 << 20;
};

}  // namespace deep_ep::protocol
