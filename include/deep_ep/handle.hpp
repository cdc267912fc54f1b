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
