#pragma once

#include <cstdint>

#include "protocol/atomic.hpp"

namespace deep_ep::protocol {

/// What a GPU found, which composes no texts; the values are numbers for the text.
enum class Finding : std::uint32_t {
  kText,           // not a GPU's: the text says all
  kTimeout,        // ranks: who; values: Wait, expected, seen
  kGone,           // the same, of a rank that has died (value 3: 0) or left in good order (1)
  kDisagreement,   // ranks: with whom; values: field of CallRecord::agreed(), mine, theirs
  kBadExpert,      // values: token, k, id, num_experts
  kNotInRank,      // values: token, k, id, rank: is_token_in_rank says otherwise
  kCounts,         // values: rank, num_tokens_per_rank, tokens of is_token_in_rank
  kTooManyRows,    // the matrix of counts overflows; value: rank
  kCapacity,       // values: rows, num_worst_tokens
  kBadPosition,    // values: token, rank, send_head, rows that go there
  kBadMatrix,      // values: rank, rows by the matrix, rows that there is room for
  kGroupCapacity,  // values: grouped rows, how many there may be
  kBadGroup,       // values: received row, k, grouped row, how many there are
  kBadOffsets,     // values: local experts, rows of all groups, how many there are
  kOtherRouting,   // values: token of a source, its expert here, row, what src_info says; rank:
                   // source
  kThirdLive,      // value: ticket that has not been received
  // Over several nodes.
  kHandleCounts,  // values: rank, rows by the handle, by is_token_in_rank
  kBadRecord,     // values: token, node, send_rdma_head, what it must be
  kOtherHandle,  // values: tensor (0: rows, 1: records), index, mine, what ranks send; rank: source
  kHandleRoom,   // values: tensor (0: recv_src_meta, 1: send_nvl_head, 2: x), rows that it has,
                 // needed
  kNodeCapacity,  // values: rows, records, num_worst_tokens
  kBadArrival,  // values: record or row, rank of the node or -1, what came, how many; rank: source
  kOtherHeads,  // value: row of send_nvl_head; rank: source
  kBadNvlHead,  // values: row, rank of the node, send_nvl_head, rows that go there
};

/// What a wait waits for.
enum class Wait : std::uint32_t { kCall, kPlace, kRows, kConsumed, kRoom };

/// Why a rank's Buffer no longer works, in that rank's control block. Anyone may write it, once:
/// the first writer wins, and everything that waits reads it at each turn (I10). claim() needs
/// memory with native atomics for all who call it: a GPU must not claim a record in host memory.
struct alignas(128) FaultRecord {
  static constexpr std::uint32_t kNone = 0;
  static constexpr std::uint32_t kClaimed = 1;  // being written; its writer may have died
  static constexpr std::uint32_t kWritten = 2;
  static constexpr int kMaxRanks = 16;
  static constexpr int kTextBytes = 640;

  std::uint32_t state;
  std::uint32_t code;             // ErrorCode
  std::int32_t origin;            // the rank that found the fault
  std::int32_t num_ranks;         // how many of `ranks` are set
  std::int32_t ranks[kMaxRanks];  // missing, dead or disagreeing
  Finding finding;
  std::uint32_t operation;  // OpKind of the call that found it, if the finding is a GPU's
  std::uint64_t epoch;      // of that call
  std::int64_t values[4];
  char text[kTextBytes];  // zero-terminated, composed by the origin

  /// True for the first caller only, who fills the fields and calls publish(). Should it die in
  /// between, nobody may fill them any more (it may only be slow): waits then end after a grace
  /// period, and each rank reports what it knows itself.
  DEEP_EP_HD bool claim() { return compare_exchange_acq_rel(&state, kNone, kClaimed); }
  DEEP_EP_HD void publish() { store_release(&state, kWritten); }
  /// acquire: pairs with publish(); after kWritten the fields may be read.
  DEEP_EP_HD std::uint32_t load() const { return load_acquire(&state); }
};

}  // namespace deep_ep::protocol
