#pragma once

#include <cstddef>
#include <cstdint>

#include "base/carver.hpp"
#include "protocol/doorbell.hpp"
#include "protocol/epoch.hpp"
#include "protocol/fault.hpp"
#include "protocol/ring.hpp"

namespace deep_ep::protocol {

enum class OpKind : std::uint32_t {
  kNone,
  kBarrier,
  kReserve,
  kDispatch,
  kCachedDispatch,
  kCombine,
  kPrepareDispatch,
  kPreparedDispatch,
  kLowLatencyDispatch,
  kLowLatencyCombine
};

/// What a rank's call looks like to the others. Fields marked * must be equal on all ranks.
struct CallRecord {
  OpKind kind;                    // *
  std::int32_t x_dtype;           // * DType
  std::int64_t hidden;            // * values a row
  std::int32_t scale_dtype;       // * DType, -1 without scales
  std::int32_t num_scales;        // *
  std::int32_t num_topk;          // * 0 without topk
  std::int32_t topk_dtype;        // * DType, -1 without topk
  std::int32_t has_topk_weights;  // *
  std::int32_t num_experts;       // * 0 if unknown
  std::uint64_t routing_hash;     // * of the handle's rank_prefix_matrix, 0 without a handle
  std::int64_t max_tokens;        // * low latency: tokens of any rank at most
  std::int32_t rank_major;        // * low latency: LowLatencyFormat
  std::int32_t wire_format;       // * low latency: plan::WireFormat of a combine
  std::int64_t num_tokens;        // tokens of the source

  static constexpr int kNumAgreed = 13;
  /// The fields marked *, in the order above.
  DEEP_EP_HD std::int64_t agreed(int i) const {
    switch (i) {
      case 0:
        return static_cast<std::int64_t>(kind);
      case 1:
        return x_dtype;
      case 2:
        return hidden;
      case 3:
        return scale_dtype;
      case 4:
        return num_scales;
      case 5:
        return num_topk;
      case 6:
        return topk_dtype;
      case 7:
        return has_topk_weights;
      case 8:
        return num_experts;
      case 9:
        return static_cast<std::int64_t>(routing_hash);
      case 10:
        return max_tokens;
      case 11:
        return rank_major;
      default:
        return wire_format;
    }
  }
};

/// Where the sender of rows finds the results' block of a receiver.
struct InboxPlace {
  EpochFlag ready;  // published by the receiver when the block may be written
  std::int32_t segment;
  std::int64_t offset;  // bytes from the beginning of the segment
  std::int64_t rows;    // rows that the block was carved for
  // What senders fill of the receiver's handle: plan::HandleArrays of so many channels; 0: nothing.
  std::int32_t num_channels;
  std::int32_t handle_segment;
  std::int64_t handle_offset;
  // Where rows of x go if they do not lie in the block; segment -1: they do.
  std::int32_t x_segment;
  std::int64_t x_offset;
};

/// Where an expert's rank has the rows of a combine, for ranks that read them there.
struct OutputsPlace {
  struct Array {
    const std::byte* address;  // in its own address space
    std::int32_t segment;      // of the rank, if the array lies in one, else -1
    std::int64_t offset;       // bytes from the beginning of the segment
  };
  Array x;
  Array topk_weights;
  bool staged;  // they were copied to its rings, which nobody uses then
};

/// One rank's words of a call, at one peer. Two of them alternate by epoch: see invariant I3 in
/// ARCHITECTURE.md.
struct Mailbox {
  EpochFlag* posted;              // [R] one a source: record and counts of that source are complete
  CallRecord* record;             // [R]
  OutputsPlace* outputs;          // [R]
  std::int32_t* tokens_per_rank;  // [R, num_counts] row of each source
  std::int32_t* tokens_per_expert;  // [R, kMaxLocalExperts] row of each source: this rank's experts
};

struct ControlShape {
  int num_ranks = 0;
  int num_lanes = 0;            // rings between each pair of ranks
  std::int64_t ring_bytes = 0;  // bytes of one ring
  // Counts that a rank tells each of the others; 0: how many tokens it sends to each rank.
  int counts_per_source = 0;

  DEEP_EP_HD std::int64_t num_counts() const {
    return counts_per_source > 0 ? counts_per_source : num_ranks;
  }
};

/// That a rank has been waiting for a while now, for whom, and that it lives: `beat` is another at
/// each turn of its wait. 0: it does not wait.
constexpr std::uint64_t wait_mark(int rank, std::uint32_t beat) {
  return std::uint64_t{beat} << 32 | static_cast<std::uint32_t>(rank + 1);
}
/// -1: nobody.
constexpr int awaited_rank(std::uint64_t mark) {
  return static_cast<int>(static_cast<std::uint32_t>(mark)) - 1;
}

/// The beginning of every rank's segment 0: what its peers write to it. Sources index the arrays.
struct ControlBlock {
  static constexpr int kMaxLocalExperts = 4096;

  Doorbell* doorbell;
  FaultRecord* fault;
  std::uint64_t* wait_mark;  // a hint, so relaxed
  Mailbox mailbox[2];        // by parity of the epoch
  InboxPlace* inbox;         // [R] by receiver of this rank's rows
  EpochFlag* landed;         // [R] all rows of the source are in this rank's results
  EpochFlag* pulled;         // [R] the source has read all that it needs of this rank's outputs
  EpochFlag* ring_tail;      // [lanes, R]
  EpochFlag* ring_head;      // [lanes, R] credits for the rings that this rank writes
  std::byte* ring_data;      // [lanes, R, ring_bytes]

  /// The mailbox of a call: two alternate (I3). Not by index, which would put a copy of a
  /// ControlBlock on a GPU thread's stack.
  DEEP_EP_HD Mailbox mailbox_of(std::uint64_t epoch) const {
    return epoch % 2 == 0 ? mailbox[0] : mailbox[1];
  }

  DEEP_EP_HD static ControlBlock carve(Carver& carver, const ControlShape& shape) {
    const std::int64_t ranks = shape.num_ranks;
    const std::int64_t rings = ranks * shape.num_lanes;
    ControlBlock block;
    block.doorbell = carver.take<Doorbell>(1);
    block.fault = carver.take<FaultRecord>(1);
    block.wait_mark = carver.take<std::uint64_t>(1);
    for (Mailbox& mailbox : block.mailbox) {
      mailbox.posted = carver.take<EpochFlag>(ranks);
      mailbox.record = carver.take<CallRecord>(ranks);
      mailbox.outputs = carver.take<OutputsPlace>(ranks);
      mailbox.tokens_per_rank = carver.take<std::int32_t>(ranks * shape.num_counts());
      mailbox.tokens_per_expert = carver.take<std::int32_t>(ranks * kMaxLocalExperts);
    }
    block.inbox = carver.take<InboxPlace>(ranks);
    block.landed = carver.take<EpochFlag>(ranks);
    block.pulled = carver.take<EpochFlag>(ranks);
    block.ring_tail = carver.take<EpochFlag>(rings);
    block.ring_head = carver.take<EpochFlag>(rings);
    block.ring_data = carver.take<std::byte>(rings * shape.ring_bytes);
    return block;
  }

  DEEP_EP_HD static std::int64_t bytes(const ControlShape& shape) {
    Carver carver(nullptr);
    (void)carve(carver, shape);
    return carver.used();
  }
};

}  // namespace deep_ep::protocol
