#include "plan/layout.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "base/error.hpp"

namespace deep_ep::plan {
namespace {

constexpr std::int64_t kMaxCount = std::numeric_limits<std::int32_t>::max();

}  // namespace

void validate(const RoutingShape& shape) {
  require(shape.num_ranks >= 1, "num_ranks is {}; it must be at least 1", shape.num_ranks);
  require(shape.num_experts >= 1 && shape.num_experts % shape.num_ranks == 0,
          "num_experts is {}; it must be a positive multiple of the number of ranks, {}",
          shape.num_experts, shape.num_ranks);
  require(shape.num_topk >= 1, "topk_idx has {} entries a token; it must have at least 1",
          shape.num_topk);
  require(shape.num_tokens >= 0 && shape.num_tokens <= kMaxCount / shape.num_topk,
          "topk_idx is [{}, {}]; it may have {} entries at most, since counts are int32",
          shape.num_tokens, shape.num_topk, kMaxCount);
}

template <class Id>
std::optional<BadExpert> get_dispatch_layout(const RoutingShape& shape, const Id* topk_idx,
                                             std::int32_t* num_tokens_per_rank,
                                             std::int32_t* num_tokens_per_expert,
                                             bool* is_token_in_rank) {
  const auto num_experts = static_cast<std::uint32_t>(shape.num_experts);
  const auto num_local_experts = static_cast<std::uint32_t>(shape.num_local_experts());
  std::fill_n(num_tokens_per_rank, shape.num_ranks, 0);
  std::fill_n(num_tokens_per_expert, shape.num_experts, 0);
  std::fill_n(is_token_in_rank, shape.num_tokens * shape.num_ranks, false);

  for (std::int64_t token = 0; token < shape.num_tokens; ++token) {
    const Id* ids = topk_idx + token * shape.num_topk;
    bool* in_rank = is_token_in_rank + token * shape.num_ranks;
    for (int k = 0; k < shape.num_topk; ++k) {
      const std::int64_t id = ids[k];
      if (id == -1) continue;
      if (id < 0 || id >= num_experts) return BadExpert{token, k, id};
      ++num_tokens_per_expert[id];
      // 32 bits: the wider division costs more than the rest of this loop.
      const std::uint32_t rank = static_cast<std::uint32_t>(id) / num_local_experts;
      num_tokens_per_rank[rank] += in_rank[rank] ? 0 : 1;
      in_rank[rank] = true;
    }
  }
  return std::nullopt;
}

template std::optional<BadExpert> get_dispatch_layout(const RoutingShape&, const std::int32_t*,
                                                      std::int32_t*, std::int32_t*, bool*);
template std::optional<BadExpert> get_dispatch_layout(const RoutingShape&, const std::int64_t*,
                                                      std::int32_t*, std::int32_t*, bool*);

void build_send_slots(const bool* is_token_in_rank, std::int64_t num_tokens, int num_ranks,
                      int num_channels, std::int32_t* send_head,
                      std::int32_t* channel_prefix_matrix) {
  std::vector<std::int32_t> sent(num_ranks, 0);
  for (int channel = 0; channel < num_channels; ++channel) {
    const std::int64_t end = channel_begin(num_tokens, channel + 1, num_channels);
    for (std::int64_t token = channel_begin(num_tokens, channel, num_channels); token < end;
         ++token) {
      const bool* in_rank = is_token_in_rank + token * num_ranks;
      std::int32_t* head = send_head + token * num_ranks;
      for (int rank = 0; rank < num_ranks; ++rank) {
        head[rank] = in_rank[rank] ? sent[rank]++ : -1;
      }
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      channel_prefix_matrix[std::int64_t{rank} * num_channels + channel] = sent[rank];
    }
  }
}

bool build_rank_prefix_matrix(std::int32_t* matrix, int num_ranks) {
  for (int destination = 0; destination < num_ranks; ++destination) {
    std::int64_t sum = 0;
    for (int source = 0; source < num_ranks; ++source) {
      std::int32_t& element = matrix[std::int64_t{source} * num_ranks + destination];
      sum += element;
      if (element < 0 || sum > kMaxCount) return false;
      element = static_cast<std::int32_t>(sum);
    }
  }
  return true;
}

void count_before_channels(const std::int32_t* begin, const std::int32_t* end,
                           std::int64_t num_tokens, int num_channels, std::int32_t* rows) {
  const std::int32_t* row = begin;
  for (int channel = 0; channel < num_channels; ++channel) {
    // Tokens ascend, and so do channels.
    row = std::lower_bound(row, end, channel_begin(num_tokens, channel, num_channels));
    rows[channel] = static_cast<std::int32_t>(row - begin);
  }
}

void build_recv_channel_prefix_matrix(const std::int32_t* rank_prefix_matrix, int rank,
                                      int num_ranks, const std::int32_t* recv_src_idx,
                                      const std::int64_t* num_tokens_of_source, int num_channels,
                                      std::int32_t* recv_channel_prefix_matrix) {
  for (int source = 0; source < num_ranks; ++source) {
    const RowRange rows = rows_from(rank_prefix_matrix, source, rank, num_ranks);
    count_before_channels(recv_src_idx + rows.begin, recv_src_idx + rows.end,
                          num_tokens_of_source[source], num_channels,
                          recv_channel_prefix_matrix + std::int64_t{source} * num_channels);
  }
}

std::int32_t aligned_expert_count(std::int64_t count, int expert_alignment) {
  require(expert_alignment >= 1, "expert_alignment is {}; it must be at least 1", expert_alignment);
  const std::int64_t aligned =
      (count + expert_alignment - 1) / expert_alignment * std::int64_t{expert_alignment};
  require(aligned <= kMaxCount,
          "an expert receives {} rows, {} when rounded up to expert_alignment {}; {} are allowed",
          count, aligned, expert_alignment, kMaxCount);
  return static_cast<std::int32_t>(aligned);
}

}  // namespace deep_ep::plan
