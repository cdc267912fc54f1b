#pragma once

#include <cstddef>
#include <cstdint>

#include "base/portable.hpp"
#include "plan/layout.hpp"
#include "plan/recv_arrays.hpp"
#include "plan/topology.hpp"

// Routing over two levels. A token crosses the network once for each node that has one of its
// experts, as a record, to the rank there with the source's index, which forwards it to the ranks
// of its node. Tokens for the source's own node are its records for that node too, which cross
// nothing. Records of a source for a node are numbered in ascending token.
namespace deep_ep::plan {

/// Where a received row comes from and where else on this node its token went.
struct SourceMeta {
  std::int32_t node;    // of the source; its index is not said, since recv_gbl_rank_prefix_sum says
                        // it
  std::int32_t token;   // at the source
  std::uint64_t ranks;  // bit i: the rank of index i of this node has a row of the token
};
static_assert(sizeof(SourceMeta) == 16);

/// The beginning of a record, behind which is the position of its row among those that the source
/// sends to each rank of the receiving node, or -1: int32 [ranks_per_node].
struct RecordHead {
  SourceMeta meta;
  std::int32_t record;  // its number among those of its source for this node
  std::int32_t unused;
};

constexpr std::int64_t align_up(std::int64_t bytes, std::int64_t to) {
  return (bytes + to - 1) / to * to;
}

/// A record on the wire: head and positions, topk_idx (experts of all ranks), topk_weights, scales,
/// x. Parts begin at multiples of 16 bytes, records are multiples of kAlignment.
struct RecordFormat {
  static constexpr std::int64_t kAlignment = 64;
  std::int64_t topk_idx;  // offsets
  std::int64_t topk_weights;
  std::int64_t scales;
  std::int64_t x;
  std::int64_t bytes;

  RecordFormat(const RowFormat& row, int ranks_per_node) {
    topk_idx = align_up(static_cast<std::int64_t>(sizeof(RecordHead)) + 4 * ranks_per_node, 16);
    topk_weights = align_up(topk_idx + row.topk_idx_bytes, 16);
    scales = align_up(topk_weights + row.topk_weights_bytes, 16);
    x = align_up(scales + row.scale_bytes, 16);
    bytes = align_up(x + row.x_bytes, kAlignment);
  }
};

/// On its way back: a node's sum of a token. Weights, x; aligned as records are.
struct SumFormat {
  std::int64_t x;  // offset
  std::int64_t bytes;

  SumFormat(std::int64_t weights_bytes, std::int64_t x_bytes)
      : x(align_up(weights_bytes, 16)), bytes(align_up(x + x_bytes, RecordFormat::kAlignment)) {}
};

/// From is_token_in_rank [N, R]: send_rdma_head [N, nodes] (number of the token's record for that
/// node, or -1) and rdma_channel_prefix_matrix [nodes, C] (inclusive over channels).
void build_record_numbers(const bool* is_token_in_rank, std::int64_t num_tokens,
                          const Topology& topology, int num_channels, std::int32_t* send_rdma_head,
                          std::int32_t* rdma_channel_prefix_matrix);

/// Tokens for each node, from is_token_in_rank [N, R].
void count_tokens_per_node(const bool* is_token_in_rank, std::int64_t num_tokens,
                           const Topology& topology, std::int32_t* num_tokens_per_rdma_rank);

/// Number of the first record of `node` whose token is not before `token`: what parts the records
/// of a source as tokens are parted. `send_rdma_head` [N, nodes].
std::int32_t first_record(const std::int32_t* send_rdma_head, std::int64_t num_tokens,
                          std::int64_t token, const Topology& topology, int node);

/// From counts [R] in place: inclusive prefix sums. False if one is negative or the sum exceeds
/// 2^31 - 1.
bool build_prefix_sum(std::int32_t* counts, int num_counts);

/// [begin, end) of part `i` of inclusive prefix sums.
DEEP_EP_HD constexpr RowRange part_of(const std::int32_t* prefix_sum, int i) {
  return {i == 0 ? 0 : prefix_sum[i - 1], prefix_sum[i]};
}

}  // namespace deep_ep::plan
