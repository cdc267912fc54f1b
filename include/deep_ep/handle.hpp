#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "deep_ep/event.hpp"
#include "deep_ep/tensor.hpp"

namespace deep_ep {

// R ranks, E experts, L = E / R local experts, N tokens of this rank, K experts a token, H values a
// row, C channels (contiguous equal shares of a source's tokens), Nr rows received. All arrays are
// contiguous.

/// What Buffer::get_dispatch_layout found. Counts are per distinct rank: a token with two experts
/// on one rank counts once.
struct DispatchLayout {
  Tensor num_tokens_per_rank;       ///< int32 [R]
  Tensor num_tokens_per_rdma_rank;  ///< int32 [nodes], undefined while all ranks are of one node
  Tensor num_tokens_per_expert;     ///< int32 [E]: entries of topk_idx that name the expert
  Tensor is_token_in_rank;          ///< bool [N, R]
  EventHandle event;                ///< of the end of the call
};

/// All that a cached dispatch and a combine need, as data: copies and clones work as well as the
/// original, with any Config, any number of times. No call changes a handle.
struct IntranodeHandle {
  /// int32 [R, R]: element [i][j] = tokens that ranks 0..i send to rank j. Column `me` bounds the
  /// rows of each source.
  Tensor rank_prefix_matrix;
  /// int32 [R, C]: element [j][c] = tokens of this rank's channels 0..c that go to rank j.
  Tensor channel_prefix_matrix;
  /// int32 [R, C]: element [i][c] = rows received from rank i's channels before c.
  Tensor recv_channel_prefix_matrix;
  /// int32 [Nr or num_worst_tokens]: token index at the source of each received row; -1 behind the
  /// last row.
  Tensor recv_src_idx;
  /// bool [N, R]
  Tensor is_token_in_rank;
  /// int32 [N, R]: the token's position among the rows that this rank sends to that rank; -1 if it
  /// is not sent there.
  Tensor send_head;
};

/// The handle of a dispatch over several nodes, with DeepEP's tensors: `nodes` nodes of G ranks,
/// rank = node * G + index. A token crosses the network once for each node, as a record, from its
/// rank to the one of the same index there, which passes it on inside the node; records of a rank
/// for a node are numbered in ascending token. Records for a rank's own node count like others,
/// though they cross nothing. M = records that this rank passes on, its own for its node included.
/// As data like IntranodeHandle: clones work as well, with any Config, any number of times, and no
/// call changes a handle.
struct InternodeHandle {
  /// bool [N, R]
  Tensor is_token_in_rank;
  /// int32 [nodes, C]: element [n][c] = records of this rank's channels 0..c for node n.
  Tensor rdma_channel_prefix_matrix;
  /// int32 [R, C]: element [j][c] = tokens of this rank's channels 0..c that go to rank j.
  Tensor gbl_channel_prefix_matrix;
  /// int32 [nodes, C]: element [n][c] = records from node n (from its rank of this rank's index)
  /// before channel c.
  Tensor recv_rdma_channel_prefix_matrix;
  /// int32 [nodes]: element [n] = records from nodes 0..n; the last one is M.
  Tensor recv_rdma_rank_prefix_sum;
  /// int32 [R, C]: element [i][c] = rows received from rank i's channels before c.
  Tensor recv_gbl_channel_prefix_matrix;
  /// int32 [R]: element [i] = rows received from ranks 0..i.
  Tensor recv_gbl_rank_prefix_sum;
  /// uint8 [Nr or num_worst_tokens, 16], from a multiple of 8 bytes on: of each received row int32
  /// node of its source, int32 token index there, uint64 mask of the ranks of this node, by index,
  /// that have a row of the token; all bits set behind the last row.
  Tensor recv_src_meta;
  /// int32 [N, nodes]: number of the token's record for that node; -1 if there is none.
  Tensor send_rdma_head;
  /// int32 [M or num_worst_tokens, G]: of each record that this rank passes on, by source node and
  /// number, the position of its row among those that its source sends to each rank of this node;
  /// -1 if it has none there, and behind the last record.
  Tensor send_nvl_head;
};

/// How received rows are grouped by local expert, as data like a handle: for every (received row,
/// local expert that it names) one grouped row, those of an expert next to each other in ascending
/// received row. G grouped rows in all, padding included.
struct RowGroups {
  /// int32 [L + 1]: local expert e has the grouped rows from element [e] to [e + 1]: one for each
  /// entry of recv_topk_idx that names it (as in num_recv_tokens_per_expert_list), rounded up to
  /// expert_alignment. Those behind its last row (an expert twice in a token's top-k makes one row)
  /// are padding, which is zero. Rows from element [L] on belong to nobody and are undefined.
  Tensor group_offsets;
  /// int32 [Nr, K]: the grouped row of entry k of a received row, -1 where recv_topk_idx is -1.
  /// Entries of a row that name the same expert have the same grouped row.
  Tensor grouped_rows;
  Tensor recv_rows;  ///< int32 [G]: the received row of each grouped row, -1 for padding
  /// float32 [G]: the sum, in ascending k from +0, of the weights of its entries; 0 for padding.
  /// Undefined without topk_weights.
  Tensor weights;
};

/// What Buffer::prepare_dispatch found out about a coming dispatch, as data: of use any number of
/// times, as long as the routing is this one.
struct PreparedDispatch {
  /// Without recv_src_idx and recv_channel_prefix_matrix, which come with the rows: the handle in
  /// the dispatch's result has them.
  IntranodeHandle handle;
  std::int64_t num_recv_tokens = 0;
  /// As in DispatchResult; empty without counts.
  std::vector<std::int32_t> num_recv_tokens_per_expert_list;
  int num_experts = 0;       ///< 0 without counts
  int expert_alignment = 1;  ///< to which the list is rounded up, and groups are
  /// With several nodes, in place of handle: without recv_rdma_channel_prefix_matrix,
  /// recv_gbl_channel_prefix_matrix, recv_src_meta and send_nvl_head.
  InternodeHandle internode_handle;
  /// With several nodes: M of InternodeHandle.
  std::int64_t num_rdma_recv_tokens = 0;
};

/// What every communication call has in common.
struct CallOptions {
  /// The caller's compute stream. On the host: the calling thread.
  Stream stream{};
  /// The communication stream waits for this event; without it, for the caller's stream.
  std::optional<EventHandle> previous_event{};
  /// True: return when the work is queued; inputs must stay valid and unchanged until the result's
  /// event has happened, and results must not be read before. False: the caller's stream waits for
  /// the work.
  bool async_finish = false;
  /// Accepted for callers of DeepEP; requires previous_event and async_finish. Results are safe on
  /// both streams anyway.
  bool allocate_on_comm_stream = false;
};

}  // namespace deep_ep
