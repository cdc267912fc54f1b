#pragma once

#include <cstdint>
#include <optional>

#include "base/portable.hpp"

namespace deep_ep::plan {

/// The shape of a routing table: N tokens, each with K expert ids in [-1, E), over R ranks that own
/// E / R experts each.
struct RoutingShape {
  std::int64_t num_tokens = 0;
  int num_topk = 0;
  int num_experts = 0;
  int num_ranks = 0;

  int num_local_experts() const { return num_experts / num_ranks; }
};

/// Throws Error(kInvalidArgument): R >= 1, E a positive multiple of R, K >= 1, N >= 0, N * K below
/// 2^31 (all entries may name one expert, and counts are int32).
void validate(const RoutingShape& shape);

/// An id outside [-1, E).
struct BadExpert {
  std::int64_t token;
  int k;
  std::int64_t id;
};

/// Fills num_tokens_per_rank [R], num_tokens_per_expert [E] and is_token_in_rank [N, R]. A token
/// counts once per rank and once per entry that names an expert. Id is int32_t or int64_t. Returns
/// the first bad id; the outputs are then undefined.
template <class Id>
std::optional<BadExpert> get_dispatch_layout(const RoutingShape& shape, const Id* topk_idx,
                                             std::int32_t* num_tokens_per_rank,
                                             std::int32_t* num_tokens_per_expert,
                                             bool* is_token_in_rank);

/// First token of channel `c` of `num_channels`: channels are contiguous and differ by one token at
/// most.
DEEP_EP_HD constexpr std::int64_t channel_begin(std::int64_t num_tokens, int c, int num_channels) {
  return num_tokens / num_channels * c + num_tokens % num_channels * c / num_channels;
}

/// From is_token_in_rank [N, R]: send_head [N, R] (position among the rows for that rank, or -1)
/// and channel_prefix_matrix [R, C] (inclusive over channels). The last column equals
/// num_tokens_per_rank.
void build_send_slots(const bool* is_token_in_rank, std::int64_t num_tokens, int num_ranks,
                      int num_channels, std::int32_t* send_head,
                      std::int32_t* channel_prefix_matrix);

/// In place, [R, R]: counts[i][j] = tokens i sends to j  ->  prefix[i][j] = tokens that ranks 0..i
/// send to j. Returns false if a count is negative or a sum exceeds 2^31 - 1; the matrix is then
/// undefined.
bool build_rank_prefix_matrix(std::int32_t* matrix, int num_ranks);

/// From ascending token indices of one source: rows [C] before each channel.
void count_before_channels(const std::int32_t* begin, const std::int32_t* end,
                           std::int64_t num_tokens, int num_channels, std::int32_t* rows);

/// From recv_src_idx (rows by source, ascending) and each source's number of tokens: [R, C] rows of
/// source i before channel c.
void build_recv_channel_prefix_matrix(const std::int32_t* rank_prefix_matrix, int rank,
                                      int num_ranks, const std::int32_t* recv_src_idx,
                                      const std::int64_t* num_tokens_of_source, int num_channels,
                                      std::int32_t* recv_channel_prefix_matrix);

/// `count` rounded up to a multiple of `alignment`; throws Error(kInvalidArgument) beyond 2^31 - 1.
std::int32_t aligned_expert_count(std::int64_t count, int expert_alignment);

/// Rows from `source` in this rank's received rows: [begin, end).
struct RowRange {
  std::int64_t begin;
  std::int64_t end;
};
DEEP_EP_HD constexpr RowRange rows_from(const std::int32_t* rank_prefix_matrix, int source,
                                        int rank, int num_ranks) {
  const std::int32_t* end = rank_prefix_matrix + std::int64_t{source} * num_ranks + rank;
  return {source == 0 ? 0 : end[-num_ranks], *end};
}
/// Rows that `rank` receives from all sources.
DEEP_EP_HD constexpr std::int64_t received_rows(const std::int32_t* rank_prefix_matrix, int rank,
                                                int num_ranks) {
  return rows_from(rank_prefix_matrix, num_ranks - 1, rank, num_ranks).end;
}

}  // namespace deep_ep::plan
