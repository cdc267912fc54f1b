#include "backend/cuda/faults.hpp"

#include <cstring>
#include <new>

#include "backend/agreement.hpp"
#include "backend/cuda/check.hpp"

namespace deep_ep::cuda {

namespace {

using protocol::FaultRecord;
using protocol::Finding;
using protocol::OpKind;

// device/waiting.cuh writes these without seeing ErrorCode.
static_assert(static_cast<int>(ErrorCode::kInvalidArgument) == 1);
static_assert(static_cast<int>(ErrorCode::kDisagreement) == 2);
static_assert(static_cast<int>(ErrorCode::kTimeout) == 3);
static_assert(static_cast<int>(ErrorCode::kPeerFailed) == 4);
static_assert(static_cast<int>(ErrorCode::kCapacity) == 6);

const char* operation_of(std::uint32_t kind, bool several_nodes) {
  switch (static_cast<OpKind>(kind)) {
    case OpKind::kBarrier:
      return "barrier";
    case OpKind::kDispatch:
    case OpKind::kCachedDispatch:
    case OpKind::kPreparedDispatch:
      return several_nodes ? "internode_dispatch" : "intranode_dispatch";
    case OpKind::kPrepareDispatch:
      return "prepare_dispatch";
    case OpKind::kCombine:
      return several_nodes ? "internode_combine" : "intranode_combine";
    case OpKind::kLowLatencyDispatch:
      return "low_latency_dispatch";
    case OpKind::kLowLatencyCombine:
      return "low_latency_combine";
    default:
      return "get_dispatch_layout";
  }
}

const char* describe(protocol::Wait wait) {
  switch (wait) {
    case protocol::Wait::kCall:
      return "the other ranks to call it";
    case protocol::Wait::kPlace:
      return "the place of its results";
    case protocol::Wait::kConsumed:
      return "it to have received the call before the last";
    case protocol::Wait::kRoom:
      return "room for rows";
    default:
      return "its rows";
  }
}

std::string missing_text(const FaultRecord& record) {
  const int rank = record.ranks[0];
  return fmt::format("waited for {}: rank {} expected {}, seen {}",
                     describe(static_cast<protocol::Wait>(record.values[0])), rank,
                     record.values[1], record.values[2]);
}

/// What a kernel found in the arguments, in words.
std::string describe_argument(const FaultRecord& record) {
  const std::int64_t* v = record.values;
  const int rank = record.ranks[0];
  switch (record.finding) {
    case Finding::kBadExpert:
      return fmt::format("topk_idx[{}, {}] is {}, allowed are -1 and 0 to {} (num_experts - 1)",
                         v[0], v[1], v[2], v[3] - 1);
    case Finding::kNotInRank:
      return fmt::format(
          "topk_idx[{0}, {1}] is {2}, an expert of rank {3}, but "
          "is_token_in_rank[{0}, {3}] is false",
          v[0], v[1], v[2], v[3]);
    case Finding::kCounts:
      return fmt::format(
          "num_tokens_per_rank[{0}] is {1}, but column {0} of is_token_in_rank has "
          "{2} tokens",
          v[0], v[1], v[2]);
    case Finding::kTooManyRows:
      return fmt::format("the ranks send more than 2^31 - 1 rows to rank {}", v[0]);
    case Finding::kCapacity:
      return fmt::format("rank {} receives {} rows, num_worst_tokens is {}", rank, v[0], v[1]);
    case Finding::kBadPosition:
      return fmt::format("handle.send_head[{}, {}] is {}, allowed are -1 and 0 to {}", v[0], v[1],
                         v[2], v[3] - 1);
    case Finding::kBadMatrix:
      return fmt::format(
          "handle.rank_prefix_matrix names {} rows of rank {}, which has room for "
          "{}",
          v[1], v[0], v[2]);
    case Finding::kGroupCapacity:
      return fmt::format("rank {} has {} grouped rows, grouped_x has room for {}", rank, v[0],
                         v[1]);
    case Finding::kBadGroup:
      return fmt::format("groups.grouped_rows[{}, {}] is {}, allowed are -1 and 0 to {}", v[0],
                         v[1], v[2], v[3] - 1);
    case Finding::kBadOffsets:
      return fmt::format(
          "groups.group_offsets[{}] is {}, must be in [0, {}], the length of groups.recv_rows",
          v[0], v[1], v[2]);
    case Finding::kOtherRouting:
      return fmt::format(
          "topk_idx of rank {} is not what its dispatch was given: its token {} names local expert "
          "{}, whose row {} is of token {}",
          rank, v[0], v[1], v[2], v[3]);
    default:
      return "an unknown finding";
  }
}

/// The same over several nodes.
std::string describe_between_nodes(const FaultRecord& record) {
  const std::int64_t* v = record.values;
  switch (record.finding) {
    case Finding::kHandleCounts:
      return fmt::format(
          "internode_handle.gbl_channel_prefix_matrix sends {} tokens to rank {}, "
          "is_token_in_rank {}",
          v[1], v[0], v[2]);
    case Finding::kBadRecord:
      return fmt::format(
          "internode_handle.send_rdma_head[{}, {}] is {}, must be {} by is_token_in_rank", v[0],
          v[1], v[2], v[3]);
    case Finding::kOtherHandle:
      return fmt::format(
          "internode_handle.{}[{}] on rank {} says {}, what the ranks send gives {}: is the "
          "handle of rank {} of the same dispatch?",
          v[0] == 0 ? "recv_gbl_rank_prefix_sum" : "recv_rdma_rank_prefix_sum", v[1], record.origin,
          v[2], v[3], record.ranks[0]);
    case Finding::kHandleRoom:
      return fmt::format("{} has {} rows, but {} were received by internode_handle.{}",
                         v[0] == 0   ? "internode_handle.recv_src_meta"
                         : v[0] == 1 ? "internode_handle.send_nvl_head"
                                     : "x",
                         v[1], v[2],
                         v[0] == 1 ? "recv_rdma_rank_prefix_sum" : "recv_gbl_rank_prefix_sum");
    case Finding::kNodeCapacity:
      return fmt::format("rank {} receives {} rows and passes {} tokens on, num_worst_tokens is {}",
                         record.ranks[0], v[0], v[1], v[2]);
    case Finding::kBadArrival:
      if (v[1] < 0) return fmt::format("record {} of rank {}, of {}", v[2], record.ranks[0], v[3]);
      return fmt::format("row {} of rank {} for rank {} of this node, of {}", v[2], record.ranks[0],
                         v[1], v[3]);
    case Finding::kOtherHeads:
      return fmt::format(
          "internode_handle.send_nvl_head[{}] is of another routing than the handle of rank {}",
          v[0], record.ranks[0]);
    case Finding::kBadNvlHead:
      return fmt::format("internode_handle.send_nvl_head[{}, {}] is {}, allowed are -1 and 0 to {}",
                         v[0], v[1], v[2], v[3] - 1);
    default:
      return describe_argument(record);
  }
}

/// What a kernel found, in words.
std::string describe(const FaultRecord& record) {
  const std::int64_t* v = record.values;
  const int rank = record.ranks[0];
  switch (record.finding) {
    case Finding::kText:
      return record.text;
    case Finding::kTimeout:
      return fmt::format("rank {} did not arrive in time; {}", rank, missing_text(record));
    case Finding::kGone:
      return fmt::format("rank {} {}; {}", rank,
                         v[3] != 0 ? "has destroyed its Buffer" : "has died", missing_text(record));
    case Finding::kDisagreement: {
      const Difference found = describe_difference(static_cast<int>(v[0]), v[1], v[2]);
      return fmt::format("ranks disagree on {}: {} on rank {}, {} on rank {}", found.field,
                         found.mine, record.origin, found.theirs, rank);
    }
    case Finding::kThirdLive:
      return fmt::format("call {} has not been received, the call after the next cannot be sent",
                         v[0]);
    default:
      return describe_between_nodes(record);
  }
}

}  // namespace

Faults::Faults(int rank, bool several_nodes) : rank_(rank), several_nodes_(several_nodes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, sizeof(HostStatus), cudaHostAllocMapped), "cudaHostAlloc");
  std::memset(memory, 0, sizeof(HostStatus));
  status_ = static_cast<HostStatus*>(memory);
}

Faults::~Faults() { (void)cudaFreeHost(status_); }

std::optional<Error> Faults::error(const char* operation) const {
  // acquire: pairs with the release in end_kernel().
  if (protocol::load_acquire(&status_->faulted) == 0) return std::nullopt;
  const FaultRecord& record = status_->fault;
  if (record.state != FaultRecord::kWritten) {
    return Error(ErrorCode::kPeerFailed,
                 fmt::format("{} on rank {}: another rank failed and died before it said why",
                             operation, rank_));
  }
  std::vector<int> ranks(record.ranks, record.ranks + record.num_ranks);
  auto code = static_cast<ErrorCode>(record.code);
  std::string text = describe(record);
  if (record.finding != Finding::kText) {
    text =
        fmt::format("{} (kernel {}) on rank {}: {}", operation_of(record.operation, several_nodes_),
                    record.epoch, record.origin, text);
  }
  if (record.origin == rank_) return Error(code, text, std::move(ranks));
  // Another rank's invalid argument is not this caller's.
  if (code == ErrorCode::kInvalidArgument) code = ErrorCode::kPeerFailed;
  if (ranks.empty()) ranks.push_back(record.origin);
  return Error(
      code,
      fmt::format("{} on rank {}: rank {} reported: {}", operation, rank_, record.origin, text),
      std::move(ranks));
}

}  // namespace deep_ep::cuda
