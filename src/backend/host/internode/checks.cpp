#include "backend/host/internode/checks.hpp"

#include "backend/host/intranode/checks.hpp"
#include "base/error.hpp"
#include "plan/internode.hpp"

namespace deep_ep::host::internode {

using deep_ep::internode::CombineParams;
using deep_ep::internode::Routing;

std::vector<std::int32_t> rows_of(const Routing& routing, int num_ranks) {
  std::vector<std::int32_t> rows;
  for (int rank = 0; rank < num_ranks; ++rank)
    rows.push_back(
        routing.gbl_channel_prefix_matrix[std::int64_t{rank + 1} * routing.num_channels - 1]);
  return rows;
}

void check_sends(const Routing& routing, std::int64_t num_tokens, const plan::Topology& topology) {
  const int nodes = topology.num_nodes();
  std::vector<std::int32_t> rows(topology.num_ranks, 0);
  std::vector<std::int32_t> records(nodes, 0);
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    for (int node = 0; node < nodes; ++node) {
      bool sent = false;
      for (int i = 0; i < topology.ranks_per_node; ++i) {
        const int rank = topology.rank_of(node, i);
        const bool in = routing.is_token_in_rank[token * topology.num_ranks + rank];
        rows[rank] += in ? 1 : 0;
        sent = sent || in;
      }
      const std::int32_t head = routing.send_rdma_head[token * nodes + node];
      const std::int32_t wanted = sent ? records[node]++ : -1;
      require(head == wanted,
              "internode_handle.send_rdma_head[{}, {}] is {}, must be {} by is_token_in_rank",
              token, node, head, wanted);
    }
  }
  const std::vector<std::int32_t> told = rows_of(routing, topology.num_ranks);
  for (int rank = 0; rank < topology.num_ranks; ++rank) {
    require(rows[rank] == told[rank],
            "internode_handle.gbl_channel_prefix_matrix sends {} tokens to rank {}, "
            "is_token_in_rank {}",
            told[rank], rank, rows[rank]);
  }
}

void check_cached(const deep_ep::internode::DispatchParams& params,
                  const plan::Topology& topology) {
  check_sends(params.routing, params.call.record.num_tokens, topology);
  intranode::check_prepared_routing(
      params.call, params.source.topk_idx, topology.num_ranks, "internode_handle.is_token_in_rank",
      "false", [&](std::int64_t token, std::int64_t rank) {
        return params.routing.is_token_in_rank[token * topology.num_ranks + rank];
      });
}

void check_receives(State& state, const Routing& routing, std::int64_t room) {
  const plan::Topology& topology = state.topology();
  const int local = state.context().rank();
  const auto refuse = [&](const char* tensor, int i, std::int64_t mine, std::int64_t theirs,
                          int source) {
    if (mine == theirs) return;
    throw Error(ErrorCode::kDisagreement,
                fmt::format("internode_handle.{}[{}] on rank {} says {}, what the ranks send gives "
                            "{}: is the handle of rank {} of the same dispatch?",
                            tensor, i, state.rank(), mine, theirs, source),
                {source});
  };
  for (int source = 0; source < topology.num_ranks; ++source) {
    refuse("recv_gbl_rank_prefix_sum", source, routing.recv_gbl_rank_prefix_sum[source],
           state.prefix_sum(local)[source], source);
  }
  std::int64_t records = 0;
  for (int node = 0; node < topology.num_nodes(); ++node) {
    records += state.num_records(node);
    refuse("recv_rdma_rank_prefix_sum", node, routing.recv_rdma_rank_prefix_sum[node], records,
           topology.rank_of(node, topology.index_of(state.rank())));
  }
  require(state.received_rows(local) <= room,
          "internode_handle.recv_src_meta has {} rows, but {} were received by "
          "recv_gbl_rank_prefix_sum",
          room, state.received_rows(local));
  require(records <= routing.nvl_head_rows,
          "internode_handle.send_nvl_head has {} rows, but {} were received by "
          "recv_rdma_rank_prefix_sum",
          routing.nvl_head_rows, records);
}

namespace {

/// Positions of each source's rows at each rank of this node, in ascending order and all there.
void check_nvl_heads(State& state, const Routing& routing) {
  const plan::Topology& topology = state.topology();
  const int width = topology.ranks_per_node;
  for (int node = 0; node < topology.num_nodes(); ++node) {
    const auto records = plan::part_of(routing.recv_rdma_rank_prefix_sum, node);
    const int source = topology.rank_of(node, topology.index_of(state.rank()));
    std::vector<std::int32_t> next(width, 0);
    for (std::int64_t record = records.begin; record < records.end; ++record) {
      for (int i = 0; i < width; ++i) {
        const std::int32_t head = routing.send_nvl_head[record * width + i];
        require(head == -1 || head == next[i],
                "internode_handle.send_nvl_head[{}, {}] is {}, allowed are -1 and {}, the next "
                "position",
                record, i, head, next[i]);
        if (head >= 0) ++next[i];
      }
    }
    for (int i = 0; i < width; ++i) {
      const auto rows = state.rows(source, i);
      require(next[i] == rows.end - rows.begin,
              "internode_handle.send_nvl_head has {} rows of rank {} for rank {}, which has {}",
              next[i], source, topology.rank_of(state.node(), i), rows.end - rows.begin);
    }
  }
}

}  // namespace

void check_rows(State& state, const CombineParams& params) {
  const plan::Topology& topology = state.topology();
  const int local = state.context().rank();
  const std::int64_t received = state.received_rows(local);
  require(params.num_rows >= received,
          "x has {} rows, but {} were received by internode_handle.recv_gbl_rank_prefix_sum",
          params.num_rows, received);
  for (int source = 0; source < topology.num_ranks; ++source) {
    const auto rows = state.rows(source, local);
    std::int64_t least = 0;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const plan::SourceMeta& meta = params.routing.recv_src_meta[row];
      require(meta.node == topology.node_of(source) && meta.token >= least,
              "internode_handle.recv_src_meta[{}] is of token {} of node {}, must be of token {} "
              "or later of node {}: rows of a source ascend",
              row, meta.token, meta.node, least, topology.node_of(source));
      least = std::int64_t{meta.token} + 1;
    }
  }
  check_nvl_heads(state, params.routing);
}

}  // namespace deep_ep::host::internode
