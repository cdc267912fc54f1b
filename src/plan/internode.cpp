#include "plan/internode.hpp"

#include <algorithm>
#include <limits>
#include <vector>

namespace deep_ep::plan {

namespace {

bool goes_to_node(const bool* in_rank, const Topology& topology, int node) {
  const bool* first = in_rank + topology.rank_of(node, 0);
  return std::any_of(first, first + topology.ranks_per_node, [](bool in) { return in; });
}

}  // namespace

void build_record_numbers(const bool* is_token_in_rank, std::int64_t num_tokens,
                          const Topology& topology, int num_channels, std::int32_t* send_rdma_head,
                          std::int32_t* rdma_channel_prefix_matrix) {
  const int nodes = topology.num_nodes();
  std::vector<std::int32_t> sent(nodes, 0);
  std::int64_t token = 0;
  for (int channel = 0; channel < num_channels; ++channel) {
    const std::int64_t end = channel_begin(num_tokens, channel + 1, num_channels);
    for (; token < end; ++token) {
      const bool* in_rank = is_token_in_rank + token * topology.num_ranks;
      for (int node = 0; node < nodes; ++node) {
        send_rdma_head[token * nodes + node] =
            goes_to_node(in_rank, topology, node) ? sent[node]++ : -1;
      }
    }
    for (int node = 0; node < nodes; ++node)
      rdma_channel_prefix_matrix[std::int64_t{node} * num_channels + channel] = sent[node];
  }
}

void count_tokens_per_node(const bool* is_token_in_rank, std::int64_t num_tokens,
                           const Topology& topology, std::int32_t* num_tokens_per_rdma_rank) {
  const int nodes = topology.num_nodes();
  std::fill_n(num_tokens_per_rdma_rank, nodes, 0);
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    const bool* in_rank = is_token_in_rank + token * topology.num_ranks;
    for (int node = 0; node < nodes; ++node)
      num_tokens_per_rdma_rank[node] += goes_to_node(in_rank, topology, node) ? 1 : 0;
  }
}

std::int32_t first_record(const std::int32_t* send_rdma_head, std::int64_t num_tokens,
                          std::int64_t token, const Topology& topology, int node) {
  const int nodes = topology.num_nodes();
  // The next one from `token` on has the number; if there is none, it is one more than the last.
  for (std::int64_t t = token; t < num_tokens; ++t) {
    if (const std::int32_t head = send_rdma_head[t * nodes + node]; head >= 0) return head;
  }
  for (std::int64_t t = token - 1; t >= 0; --t) {
    if (const std::int32_t head = send_rdma_head[t * nodes + node]; head >= 0) return head + 1;
  }
  return 0;
}

bool build_prefix_sum(std::int32_t* counts, int num_counts) {
  std::int64_t sum = 0;
  for (int i = 0; i < num_counts; ++i) {
    sum += counts[i];
    if (counts[i] < 0 || sum > std::numeric_limits<std::int32_t>::max()) return false;
    counts[i] = static_cast<std::int32_t>(sum);
  }
  return true;
}

}  // namespace deep_ep::plan
