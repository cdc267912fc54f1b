#include <algorithm>

#include "backend/host/internode/steps.hpp"
#include "backend/host/intranode/checks.hpp"
#include "base/error.hpp"
#include "plan/internode.hpp"
#include "plan/layout.hpp"

namespace deep_ep::host::internode {

using deep_ep::internode::BarrierParams;
using deep_ep::internode::NotifyDispatchParams;

namespace {

// Counts that do not fit is_token_in_rank would send rows to where other rows go.
void build_own_slots(State& state, const NotifyDispatchParams& params) {
  const plan::Topology& topology = state.topology();
  const deep_ep::internode::Routing& routing = params.routing;
  const std::int64_t tokens = params.call.record.num_tokens;
  std::vector<std::int32_t> send_head(tokens * topology.num_ranks);
  plan::build_send_slots(routing.is_token_in_rank, tokens, topology.num_ranks, routing.num_channels,
                         send_head.data(), routing.gbl_channel_prefix_matrix);
  plan::build_record_numbers(routing.is_token_in_rank, tokens, topology, routing.num_channels,
                             routing.send_rdma_head, routing.rdma_channel_prefix_matrix);
  for (int i = 0; i < topology.num_ranks; ++i) {
    const std::int32_t counted =
        routing.gbl_channel_prefix_matrix[std::int64_t{i + 1} * routing.num_channels - 1];
    require(params.num_tokens_per_rank[i] == counted,
            "num_tokens_per_rank[{}] is {}, but column {} of is_token_in_rank has {} tokens", i,
            params.num_tokens_per_rank[i], i, counted);
  }
}

void read_counts(State& state, const NotifyDispatchParams& params) {
  const plan::Topology& topology = state.topology();
  const int local = state.context().rank();
  std::copy_n(state.prefix_sum(local), topology.num_ranks, params.routing.recv_gbl_rank_prefix_sum);
  std::int64_t records = 0;
  for (int node = 0; node < topology.num_nodes(); ++node) {
    records += state.num_records(node);
    require(records <= INT32_MAX, "more than 2^31 - 1 tokens come over rank {}", state.rank());
    params.routing.recv_rdma_rank_prefix_sum[node] = static_cast<std::int32_t>(records);
  }
  const std::int64_t rows = state.received_rows(local);
  if (params.max_rows > 0 && std::max(rows, records) > params.max_rows) {
    throw Error(ErrorCode::kCapacity,
                fmt::format("internode_dispatch: rank {} receives {} rows and passes {} tokens on, "
                            "num_worst_tokens is {}",
                            state.rank(), rows, records, params.max_rows),
                {state.rank()});
  }
  if (params.num_recv_rows == nullptr) return;
  *params.num_recv_rows = rows;
  *params.num_recv_records = records;
  if (params.num_tokens_per_expert == nullptr) return;
  for (int e = 0; e < params.call.record.num_experts / topology.num_ranks; ++e)
    params.recv_tokens_per_expert[e] = state.tokens_of_expert(params.call, e);
}

}  // namespace

void barrier(State& state, const BarrierParams& params) {
  state.announce(params.call, {.rows = std::vector<std::int32_t>(state.topology().num_ranks, 0)});
  state.wait_announced(params.call);
}

void notify_dispatch(State& state, const NotifyDispatchParams& params) {
  const int num_ranks = state.topology().num_ranks;
  constexpr int kMaxLocalExperts = protocol::ControlBlock::kMaxLocalExperts;
  require(params.call.record.num_experts / num_ranks <= kMaxLocalExperts,
          "num_experts is {}, more than {} for each of {} ranks", params.call.record.num_experts,
          kMaxLocalExperts, num_ranks);
  intranode::check_routing(
      {params.call, params.topk_idx, params.routing.is_token_in_rank, params.num_tokens_per_expert},
      num_ranks);
  build_own_slots(state, params);
  state.announce(params.call,
                 {std::vector<std::int32_t>(params.num_tokens_per_rank,
                                            params.num_tokens_per_rank + num_ranks),
                  params.num_tokens_per_expert, params.routing.send_rdma_head},
                 params.wait_stats);
  state.wait_announced(params.call, params.wait_stats);
  read_counts(state, params);
}

}  // namespace deep_ep::host::internode
