#pragma once

#include <cstddef>
#include <cstdint>

#include "base/carver.hpp"
#include "plan/low_latency.hpp"
#include "protocol/control.hpp"

// What a kernel knows of its rank and the others. Compiled by g++ and nvcc.
namespace deep_ep::cuda {

/// Ranks of one node that a kernel can serve: an NVL72 rack.
constexpr int kMaxRanks = 72;
/// Pieces in which a combine brings the rows of one rank home: see CombineArgs.
constexpr int kMaxChunks = 1024;
/// Tokens for which one warp counts; the words through which warps tell each other their counts.
constexpr int kTokensPerCount = 256;

/// Where a rank's rows go: its segment, and the rows that the block was carved for.
struct Place {
  std::int32_t segment;
  std::int32_t num_channels = 0;  // of the handle to be filled, 0: none
  std::int64_t offset;
  std::int64_t rows;
  std::int32_t handle_segment = 0;
  std::int32_t x_segment = -1;  // of rows of x that do not go to the block
  std::int64_t handle_offset = 0;
  std::int64_t x_offset = 0;
};
/// What ranks tell each other at the beginning of a kernel that moves rows: the place, and what
/// they called with, as far as it must agree.
struct PlaceMessage {
  static constexpr int kPlaceWords = sizeof(Place) / 4;
  static constexpr int kRecordWords = offsetof(protocol::CallRecord, num_tokens) / 4;
  static constexpr int kPackets = (kPlaceWords + kRecordWords + 2) / 3;
};

/// The beginning of every rank's segment 0.
struct DeviceControl {
  protocol::ControlBlock block;  // without rings
  // [2, R, kPackets] by parity of the epoch and receiver of this rank's rows: a late block of a
  // kernel may look while the receiver is in its next kernel already (I3, as for the mailboxes).
  plan::Packet* places;
  std::uint64_t* chunks;  // [R, kMaxChunks] epoch of the combine whose rows are here

  /// `num_ranks` of a node. Over several nodes a rank tells, for itself and its rail peers, rows
  /// for each rank of the node and tokens.
  DEEP_EP_HD static DeviceControl carve(Carver& carver, int num_ranks, int num_nodes = 1) {
    DeviceControl control;
    control.block = protocol::ControlBlock::carve(
        carver, {num_ranks, 0, 0, num_nodes > 1 ? num_nodes * (num_ranks + 1) : 0});
    control.places =
        carver.take<plan::Packet>(std::int64_t{2} * num_ranks * PlaceMessage::kPackets);
    control.chunks = carver.take<std::uint64_t>(std::int64_t{num_ranks} * kMaxChunks);
    return control;
  }
  DEEP_EP_HD plan::Packet* place(std::uint64_t epoch, int rank, int num_ranks) const {
    return places +
           (static_cast<std::int64_t>(epoch % 2) * num_ranks + rank) * PlaceMessage::kPackets;
  }
  static std::int64_t bytes(int num_ranks, int num_nodes) {
    Carver carver(nullptr);
    (void)carve(carver, num_ranks, num_nodes);
    return carver.used();
  }
};

/// What low latency remembers from kernel to kernel; parts as in plan::LowLatencyLayout.
struct LowLatencyState {
  static constexpr int kParts = plan::LowLatencyLayout::kParts;
  static constexpr int kMaxBlocks = 1024;

  /// The same in all blocks, which need not wait for each other so: each counts by itself, block 0
  /// also for those that a kernel is launched without.
  struct alignas(16) Block {
    std::uint64_t sent[2];       // last ticket of each kind
    std::uint32_t live[kParts];  // 1: sent, not received
  };
  std::uint64_t consumed[kParts];  // last ticket received
  std::uint64_t told[kParts];      // the same, as the sources know it; a kernel behind
  // [kParts, R] LowLatencyLayout::consumed, a kernel behind
  std::uint64_t freed[kParts * kMaxRanks];
  Block blocks[kMaxBlocks];
};

/// Words of this rank alone, in its GPU's memory. Kernels of a Buffer run one after the other.
struct LocalState {
  std::uint64_t epoch;        // collective kernels that have ended; the same on all ranks
  std::uint32_t blocks_done;  // of the kernel that runs
  // The longest wait of the kernel that runs for each rank, in SM clock cycles.
  unsigned long long waited[kMaxRanks];
  LowLatencyState low_latency;
};

/// Words that kernels and the host share, in host memory that the GPU maps.
struct HostStatus {
  std::uint32_t faulted;  // 1: `fault` is complete
  protocol::FaultRecord fault;
  std::uint32_t gone[kMaxRanks];  // by the host: kGoneOrderly, kGoneDead
  // The last notify that the host waits for: its ticket, then what it counted.
  std::uint64_t ticket;
  std::int64_t num_recv_rows;
  std::int64_t num_recv_records;  // over several nodes
  std::int64_t tokens_per_expert[protocol::ControlBlock::kMaxLocalExperts];
};
constexpr std::uint32_t kGoneOrderly = 1;
constexpr std::uint32_t kGoneDead = 2;

/// Passed to every kernel by value. Ranks are those of this rank's node, numbered from 0.
struct Comm {
  int rank = 0;
  int num_ranks = 1;
  std::byte* bases[kMaxRanks] = {};  // of every rank's segment 0, as mapped here
  // [R, num_segments] bases as mapped here, null while not mapped: host memory, which the host
  // writes; and what kernels have read of it, in GPU memory
  std::byte* const* mapped_segments = nullptr;
  std::byte** known_segments = nullptr;
  int num_segments = 0;
  LocalState* local = nullptr;
  HostStatus* status = nullptr;
  std::int64_t timeout_ns = 0;
  int num_nodes = 1;
  int first_rank = 0;             // of the node, counted over all nodes, as in what faults name
  protocol::CallRecord record{};  // of the call that the kernel is part of

  DEEP_EP_HD int global_rank(int i) const { return first_rank + i; }

  /// Arithmetic alone: a table in memory would have to be waited for.
  DEEP_EP_HD DeviceControl control(int i) const {
    Carver carver(bases[i]);
    return DeviceControl::carve(carver, num_ranks, num_nodes);
  }
};

}  // namespace deep_ep::cuda
