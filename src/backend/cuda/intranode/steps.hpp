#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "backend/cuda/arrays.hpp"
#include "backend/cuda/comm.hpp"
#include "plan/groups.hpp"
#include "plan/recv_arrays.hpp"

// The kernels of the intranode mode, one function each that launches it. Every pointer is memory of
// this rank's GPU unless it says otherwise. Their names are what profilers show: see
// ARCHITECTURE.md.
namespace deep_ep::cuda::intranode {

struct LayoutArgs {
  Comm comm;
  Ids topk_idx;
  std::int64_t num_tokens = 0;
  int num_topk = 0;
  int num_experts = 0;
  int num_ranks = 0;  // of all nodes
  int ranks_per_node = 0;
  std::int32_t* sums = nullptr;                   // [R + E + nodes] zeros, and again afterwards
  std::int32_t* num_tokens_per_rank = nullptr;    // out [R]
  std::int32_t* num_tokens_per_expert = nullptr;  // out [E]
  bool* is_token_in_rank = nullptr;               // out [N, R]
  std::int32_t* num_tokens_per_node = nullptr;    // out [nodes]; null while there is one
};
cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream);

struct BarrierArgs {
  Comm comm;
};
cudaError_t launch_barrier(const BarrierArgs& args, cudaStream_t stream);

struct NotifyArgs {
  Comm comm;
  const std::int32_t* num_tokens_per_rank = nullptr;    // [R]
  const std::int32_t* num_tokens_per_expert = nullptr;  // [E] or null
  const bool* is_token_in_rank = nullptr;               // [N, R]
  Ids topk_idx;                                         // checked, if there
  int num_channels = 1;
  std::int32_t* rank_prefix_matrix = nullptr;     // out [R, R]
  std::int32_t* channel_prefix_matrix = nullptr;  // out [R, C]
  std::int32_t* send_head = nullptr;              // out [N, R]
  // Through which warps tell each other their counts: [ceil(N / kTokensPerCount), R] of earlier
  // kernels, tagged with their epoch.
  std::uint64_t* counts = nullptr;
  std::int64_t max_rows = 0;  // of this rank; 0: any number
  std::uint64_t ticket = 0;   // for the host, which waits for it; 0: it does not
};
cudaError_t launch_notify(const NotifyArgs& args, int num_sms, cudaStream_t stream);

struct DispatchArgs : DispatchStepArgs {
  Comm comm;
  bool cached = false;                               // the routing is that of an earlier call
  bool tentative = false;                            // as in DispatchParams
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  const std::int32_t* send_head = nullptr;           // [N, R]
  // This rank's handle, plan::HandleArrays, which the senders fill if they are to.
  bool fills_handle = true;
  int num_channels = 1;
  int handle_segment = 0;
  std::int64_t handle_offset = 0;
  std::int32_t* recv_src_idx = nullptr;  // in it
};
cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream);

/// Received rows to the groups of their experts. The two steps that find the groups need
/// group_count_bytes() of memory.
struct GroupArgs {
  Comm comm;
  plan::GroupShape shape;
  const std::int32_t* num_received_rows = nullptr;  // one number
  Ids recv_topk_idx;                                // [num_rows, K]
  const float* recv_topk_weights = nullptr;         // [num_rows, K] or null
  std::int32_t* counts = nullptr;                   // what the steps tell each other
  plan::RowGroupArrays groups;
  std::int64_t x_bytes = 0;
  std::int64_t scale_words = 0;
  const std::byte* x = nullptr;             // [num_rows, x_bytes]
  const std::uint32_t* scales = nullptr;    // [num_rows, scale_words]
  std::byte* grouped_x = nullptr;           // out [num_grouped_rows, x_bytes]
  std::uint32_t* grouped_scales = nullptr;  // out [num_grouped_rows, scale_words]
};
std::int64_t group_count_bytes(const plan::GroupShape& shape);
/// Finds groups.
cudaError_t launch_index(const GroupArgs& args, int num_sms, cudaStream_t stream);
/// Copies rows to them.
cudaError_t launch_expand(const GroupArgs& args, int num_sms, cudaStream_t stream);

enum class SumType { kBfloat16, kFloat16, kFloat32 };

/// A row for each received one: the sum of its grouped rows in ascending order, weighted or not.
struct ReduceArgs {
  Comm comm;
  const std::byte* x = nullptr;  // [num_grouped_rows, x_bytes]
  std::int64_t x_bytes = 0;
  std::int64_t num_grouped_rows = 0;
  const float* weights = nullptr;                   // [num_grouped_rows] or null
  const std::int32_t* num_received_rows = nullptr;  // one number
  const std::int32_t* grouped_rows = nullptr;       // [num_rows, K]
  std::int64_t num_rows = 0;
  std::int64_t num_topk = 0;
  std::byte* reduced = nullptr;  // out [num_rows, x_bytes]
};
cudaError_t launch_reduce(const ReduceArgs& args, SumType type, int num_sms, cudaStream_t stream);

/// Every rank pushes the rows of each source into that source's inbox, in pieces of
/// chunk_rows(count) rows, and tells each piece; the source sums a token's rows when their pieces
/// are here. Its own rows it takes from x. In the inbox the rows of rank 0 come first, then those
/// of rank 1, ..., without the source's own.
struct CombineArgs {
  Comm comm;
  const std::byte* x = nullptr;                      // [num_rows, x_bytes]
  const float* topk_weights = nullptr;               // [num_rows, K] or null
  const std::byte* bias[2] = {nullptr, nullptr};     // [N, x_bytes] or null
  plan::RowFormat format;                            // x and weights
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  const std::int32_t* send_head = nullptr;           // [N, R]
  std::int64_t num_rows = 0;
  int inbox_segment = 0;
  std::int64_t inbox_offset = 0;
  std::int64_t inbox_rows = 0;
  std::byte* combined_x = nullptr;         // out [N, x_bytes]
  float* combined_topk_weights = nullptr;  // out [N, K] or null
  std::int64_t* wait_stats = nullptr;      // += [R] or null
};
cudaError_t launch_combine(const CombineArgs& args, SumType type, int num_sms, cudaStream_t stream);

// Each loads its kernels on the current device, which CUDA otherwise does at their first launch.
cudaError_t load_layout();
cudaError_t load_notify();
cudaError_t load_dispatch();
cudaError_t load_combine();
cudaError_t load_index();
cudaError_t load_expand();
cudaError_t load_reduce();
cudaError_t load_barrier_and_fault();
inline cudaError_t load_kernels() {
  for (const auto load : {load_layout, load_notify, load_dispatch, load_combine, load_index,
                          load_expand, load_reduce, load_barrier_and_fault}) {
    const cudaError_t status = load();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

/// Claims and fills every rank's fault record that has none, with the text of an Error of the host.
struct FaultArgs {
  Comm comm;
  protocol::FaultRecord record;
};
cudaError_t launch_fault(const FaultArgs& args, cudaStream_t stream);

}  // namespace deep_ep::cuda::intranode
