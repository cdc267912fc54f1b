#include "backend/host/intranode/checks.hpp"

#include <vector>

#include "base/error.hpp"
#include "plan/layout.hpp"

namespace deep_ep::host::intranode {

namespace {

template <class Id>
void check_ids(const RoutingView& params, int num_ranks) {
  const std::int64_t topk = params.call.record.num_topk;
  const std::int64_t experts = params.call.record.num_experts;
  const std::int64_t local_experts = experts / num_ranks;
  const Id* ids = params.topk_idx.as<const Id>();
  std::vector<std::int64_t> counts(experts, 0);
  for (std::int64_t token = 0; token < params.call.record.num_tokens; ++token) {
    for (std::int64_t k = 0; k < topk; ++k) {
      const std::int64_t id = ids[token * topk + k];
      if (id == -1) continue;
      require(id >= 0 && id < experts,
              "topk_idx[{}, {}] is {}, allowed are -1 and 0 to {} (num_experts - 1)", token, k, id,
              experts - 1);
      const std::int64_t rank = id / local_experts;
      require(params.is_token_in_rank[token * num_ranks + rank],
              "topk_idx[{0}, {1}] is {2}, an expert of rank {3}, but is_token_in_rank[{0}, {3}] is "
              "false",
              token, k, id, rank);
      ++counts[id];
    }
  }
  for (std::int64_t e = 0; e < experts; ++e) {
    require(params.num_tokens_per_expert[e] == counts[e],
            "num_tokens_per_expert[{}] is {}, but topk_idx names that expert {} times", e,
            params.num_tokens_per_expert[e], counts[e]);
  }
}

}  // namespace

void check_routing(const RoutingView& params, int num_ranks) {
  if (!params.topk_idx.defined()) return;
  if (params.topk_idx.dtype == DType::kInt64) {
    check_ids<std::int64_t>(params, num_ranks);
  } else {
    check_ids<std::int32_t>(params, num_ranks);
  }
}

void check_prepared_routing(const Call& call, const TensorView& topk_idx, int num_ranks,
                            const char* tensor, const char* unsent,
                            const std::function<bool(std::int64_t, std::int64_t)>& sent) {
  if (!topk_idx.defined()) return;
  const std::int64_t topk = call.record.num_topk;
  const std::int64_t experts = call.record.num_experts;
  const bool wide = topk_idx.dtype == DType::kInt64;
  for (std::int64_t i = 0; i < call.record.num_tokens * topk; ++i) {
    const std::int64_t id =
        wide ? topk_idx.as<const std::int64_t>()[i] : topk_idx.as<const std::int32_t>()[i];
    if (id == -1) continue;
    require(id >= 0 && id < experts,
            "topk_idx[{}, {}] is {}, allowed are -1 and 0 to {} (num_experts - 1)", i / topk,
            i % topk, id, experts - 1);
    const std::int64_t rank = id / (experts / num_ranks);
    require(sent(i / topk, rank),
            "topk_idx[{0}, {1}] is {2}, an expert of rank {3}, but prepared.{4}[{0}, {3}] is {5}",
            i / topk, i % topk, id, rank, tensor, unsent);
  }
}

void check_grouped_rows(const std::int32_t* grouped_rows, std::int64_t received,
                        std::int64_t num_topk, std::int64_t num_grouped) {
  for (std::int64_t i = 0; i < received * num_topk; ++i) {
    require(grouped_rows[i] >= -1 && grouped_rows[i] < num_grouped,
            "groups.grouped_rows[{}, {}] is {}, allowed are -1 and 0 to {}", i / num_topk,
            i % num_topk, grouped_rows[i], num_grouped - 1);
  }
}

void check_handle(const HandleView& handle, int rank, int num_ranks) {
  const std::int32_t* prefix = handle.rank_prefix_matrix;
  for (int i = 0; i < num_ranks; ++i) {
    for (int j = 0; j < num_ranks; ++j) {
      const std::int32_t before = i == 0 ? 0 : prefix[(i - 1) * num_ranks + j];
      require(prefix[i * num_ranks + j] >= before,
              "handle.rank_prefix_matrix[{}, {}] is {}, must be at least {}, the sum of the ranks "
              "before",
              i, j, prefix[i * num_ranks + j], before);
    }
  }
  std::vector<std::int32_t> next(num_ranks, 0);
  for (std::int64_t token = 0; token < handle.num_tokens; ++token) {
    for (int i = 0; i < num_ranks; ++i) {
      const std::int32_t head = handle.send_head[token * num_ranks + i];
      require(head == -1 || head == next[i],
              "handle.send_head[{}, {}] is {}, allowed are -1 and {}, the next position", token, i,
              head, next[i]);
      if (head >= 0) ++next[i];
    }
  }
  for (int i = 0; i < num_ranks; ++i) {
    const auto rows = plan::rows_from(prefix, rank, i, num_ranks);
    require(next[i] == rows.end - rows.begin,
            "handle.send_head sends {} tokens to rank {}, handle.rank_prefix_matrix says {}",
            next[i], i, rows.end - rows.begin);
  }
}

void check_rows(const deep_ep::intranode::CombineParams& params, int rank, int num_ranks) {
  const std::int64_t received = plan::received_rows(params.rank_prefix_matrix, rank, num_ranks);
  require(params.num_rows >= received,
          "x has {} rows, but {} were received by handle.rank_prefix_matrix", params.num_rows,
          received);
  require(params.handle_rows >= received,
          "handle.recv_src_idx has {} elements, but {} rows were received by "
          "handle.rank_prefix_matrix",
          params.handle_rows, received);
  for (int source = 0; source < num_ranks; ++source) {
    const auto rows = plan::rows_from(params.rank_prefix_matrix, source, rank, num_ranks);
    std::int64_t least = 0;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      require(params.recv_src_idx[row] >= least,
              "handle.recv_src_idx[{}] is {}, must be at least {}: rows of a source ascend", row,
              params.recv_src_idx[row], least);
      least = std::int64_t{params.recv_src_idx[row]} + 1;
    }
  }
}

}  // namespace deep_ep::host::intranode
