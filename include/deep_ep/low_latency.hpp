#pragma once

#include <cstdint>
#include <functional>

#include "deep_ep/event.hpp"
#include "deep_ep/handle.hpp"
#include "deep_ep/tensor.hpp"

namespace deep_ep {

// R ranks, E experts, L = E / R local experts, N tokens of this rank, K experts a token, H values a
// row, M = num_max_dispatch_tokens_per_rank. All arrays are contiguous unless it says otherwise.

/// How the received rows of a low-latency dispatch lie.
enum class LowLatencyFormat : std::uint8_t {
  /// [L, R * M, H]: the rows of each local expert one behind the other, in (source rank, token)
  /// order. A token with several experts here has a row at each; one that names an expert twice has
  /// one row there.
  kExpertMajor,
  /// [R, M, H]: a row for each token that came, in (source rank, token) order, with its experts.
  kRankMajor,
};

/// All that a low-latency combine needs to know of its dispatch, as data: clones work as well, any
/// number of times, in any order. No call changes a handle.
struct LowLatencyHandle {
  /// int32, expert-major [L, R * M], rank-major [R, M]: token index at the source of each received
  /// row. Defined for received rows only.
  Tensor src_info;
  /// int64, expert-major [L, R], rank-major [1, R]: where the rows of each source are: begin << 32
  /// | count.
  Tensor layout_range;
  int num_max_dispatch_tokens_per_rank = 0;
  std::int64_t hidden = 0;
  int num_experts = 0;
  LowLatencyFormat format = LowLatencyFormat::kExpertMajor;
};

/// Outputs that the caller brings, in any memory of the Buffer's device; what is undefined the call
/// allocates. Shapes as in the result of the same name.
struct LowLatencyOutputs {
  TensorView recv_x{};
  TensorView recv_x_scales{};
  TensorView recv_count{};
  TensorView recv_topk_idx{};
  TensorView recv_topk_weights{};
  TensorView src_info{};
  TensorView layout_range{};
};

struct LowLatencyDispatchArgs {
  /// [N, H], N at most M. bfloat16: sent as it is, or quantised (use_fp8). float8_e4m3 and uint8,
  /// and, without use_fp8, float16 and float32: sent as they are. H * size_of(dtype) is a multiple
  /// of 16 bytes, with use_fp8 H one of 128. On GPUs from a multiple of 16 bytes on.
  TensorView x{};
  /// Optional [N, S], float32 or int32 (packed), any strides: scales of an x that is quantised
  /// already.
  TensorView x_scales{};
  TensorView topk_idx{};  ///< [N, K] int32 or int64: expert ids, -1 for none
  /// Optional [N, K] float32, for receivers that use kRankMajor; given on all ranks or on none.
  TensorView topk_weights{};
  int num_max_dispatch_tokens_per_rank = 0;  ///< M: the most tokens of any rank
  int num_experts = 0;
  bool use_fp8 = true;       ///< quantise a bfloat16 x: docs/numerics.md, "FP8 with scales"
  bool round_scale = false;  ///< scales are powers of two
  bool use_ue8m0 = false;    ///< scales are exponent bytes, packed; needs round_scale
  LowLatencyFormat format = LowLatencyFormat::kExpertMajor;
  LowLatencyOutputs outputs{};
  /// Optional int32 [L]: += rows received for each local expert.
  TensorView cumulative_local_expert_recv_stats{};
  /// Optional int64 [R]: += the longest wait for each source, in ns (host) or SM cycles (CUDA).
  TensorView dispatch_wait_recv_cost_stats{};
  CallOptions options{};
  /// The call only sends, and returns; the result's hook receives. On GPUs both run on
  /// options.stream. Excludes async_finish and previous_event. Sending waits only until the ranks
  /// have received the dispatch before the last, and on GPUs begun another low-latency call behind
  /// that: it is what tells the others. So between such a receive and its rank's next call nothing
  /// may wait for a rank that sends.
  bool return_recv_hook = false;
};

struct LowLatencyDispatchResult {
  /// Expert-major [L, R * M, H], rank-major [R, M, H]; dtype of x, or float8_e4m3 with use_fp8.
  /// Only received rows are defined.
  Tensor recv_x;
  /// Expert-major [L, R * M, S], rank-major [R, M, S], if rows have scales; the rows of an expert
  /// or rank lie column by column (strides [.., 1, rows]), as GEMMs with TMA read them. S = H / 128
  /// float32; with use_ue8m0 ceil(H / 512) int32, four scales each, 0 behind the last; else the
  /// columns and dtype of x_scales.
  Tensor recv_x_scales;
  Tensor
      recv_count;  ///< int32, expert-major [L] rows of each expert, rank-major [R] of each source
  Tensor recv_topk_idx;      ///< rank-major: [R, M, K], dtype of topk_idx: local expert id, or -1;
                             ///< -1 in rows that were not received
  Tensor recv_topk_weights;  ///< rank-major, if given: [R, M, K] float32, 0 where the id is -1
  LowLatencyHandle handle;
  EventHandle event;  ///< of the end of the call; of nothing with a hook
  /// With return_recv_hook: receives. Once; on the thread's turn like a call of the Buffer. Results
  /// are defined for work queued on the call's stream behind it.
  std::function<void()> recv_hook;
};

struct LowLatencyCombineArgs {
  /// bfloat16. Expert-major [L, R * M, H]: the outputs of the experts, unweighted; the rank of the
  /// experts weights and sums them. Rank-major [R, M, H]: rows that the caller has weighted and
  /// summed already. On GPUs from a multiple of 16 bytes on.
  TensorView x{};
  TensorView topk_idx{};      ///< [N, K], as given to dispatch
  TensorView topk_weights{};  ///< [N, K] float32; rank-major: not used, may be undefined
  LowLatencyHandle handle{};
  /// The rows are those in the view that get_next_low_latency_combine_buffer gave for this call; x
  /// is it, or says no more than their shape.
  bool zero_copy = false;
  /// Rows come home in a 10-bit logarithmic format, in 64 % of their bytes, or as FP8 with scales,
  /// in 52 %: docs/numerics.md, "Rows on their way home", has the errors. One of them at most, the
  /// same on all ranks; H is a multiple of 128 then.
  bool use_logfmt = false;
  bool use_fp8 = false;
  TensorView out{};                           ///< optional [N, H] bfloat16: where the result goes
  TensorView combine_wait_recv_cost_stats{};  ///< as in LowLatencyDispatchArgs
  CallOptions options{};
  /// As in LowLatencyDispatchArgs. Sending waits for the weights of the ranks whose tokens it has,
  /// hence until they have called combine too.
  bool return_recv_hook = false;
};

struct LowLatencyCombineResult {
  /// [N, H] bfloat16: each rank's rows are weighted and summed in fp32 in ascending order of
  /// experts and rounded once (and then once more by use_logfmt or use_fp8), then these are summed
  /// in fp32 in ascending rank order and rounded.
  Tensor combined_x;
  EventHandle event;
  std::function<void()> recv_hook;
};

}  // namespace deep_ep
