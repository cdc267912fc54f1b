#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "deep_ep/tensor.hpp"
#include "fabric/heap.hpp"
#include "plan/groups.hpp"
#include "plan/layout.hpp"
#include "plan/recv_arrays.hpp"
#include "protocol/control.hpp"

// One params struct per function of the modes; plain data that a backend reads and fills. R, N, K,
// E, C, L as in deep_ep/handle.hpp. Pointers are memory of the backend's device unless they say
// host.
namespace deep_ep {

/// What a collective call tells the step that it takes.
struct Call {
  const char* operation = "";  // public name, for errors
  std::uint64_t epoch = 0;     // counts the collective calls of a Buffer; the same on all ranks
  std::chrono::milliseconds timeout{0};
  protocol::CallRecord record{};  // what this rank called with
  int num_threads = 1;            // at most so many (host) or SMs (CUDA)
};

namespace internode {

struct LayoutParams {
  plan::RoutingShape shape;
  TensorView topk_idx;
  std::int32_t* num_tokens_per_rank = nullptr;    // [R]
  std::int32_t* num_tokens_per_expert = nullptr;  // [E]
  bool* is_token_in_rank = nullptr;               // [N, R]
};

}  // namespace internode

namespace intranode {

struct BarrierParams {
  Call call;
};

struct NotifyDispatchParams {
  Call call;
  const std::int32_t* num_tokens_per_rank = nullptr;    // [R]
  const std::int32_t* num_tokens_per_expert = nullptr;  // [E] or null
  const bool* is_token_in_rank = nullptr;               // [N, R]
  TensorView topk_idx;                                  // [N, K] or undefined: checked
  int num_channels = 1;
  std::int32_t* rank_prefix_matrix = nullptr;     // out [R, R]
  std::int32_t* channel_prefix_matrix = nullptr;  // out [R, C]
  std::int32_t* send_head = nullptr;              // out [N, R]
  std::int64_t max_rows = 0;  // more received rows are Error(kCapacity); 0: none
  // Out, host; the step returns when they are known. Null: nobody waits for counts.
  std::int64_t* num_recv_rows = nullptr;
  std::int64_t* recv_tokens_per_expert = nullptr;  // [L]; untouched without counts
};

/// The payload of the source: arrays of N rows.
struct DispatchSource {
  const std::byte* x = nullptr;
  TensorView scales;
  TensorView topk_idx;
  const float* topk_weights = nullptr;
};

/// Where the caller wants results copied to, row by row; null: they stay in the block.
struct DispatchOutputs {
  std::byte* x = nullptr;
  std::byte* scales = nullptr;
  std::byte* topk_idx = nullptr;
  std::byte* topk_weights = nullptr;
};

struct DispatchParams {
  Call call;
  bool cached = false;  // the routing is a handle's: no notify_dispatch of this call came before
  DispatchSource source;
  plan::RowFormat format;
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  const std::int32_t* send_head = nullptr;           // [N, R]
  int num_channels = 1;
  fabric::Block block;                                 // this rank's results
  std::int64_t block_rows = 0;                         // rows it was carved for
  fabric::Block x_block;                               // rows of x, if not there; segment -1: there
  DispatchOutputs outputs;                             // filled when all rows are here
  fabric::Block handle_block;                          // plan::HandleArrays, if to be filled
  std::int32_t* recv_src_idx = nullptr;                // there, out [block_rows], or null
  std::int32_t* recv_channel_prefix_matrix = nullptr;  // there, out [R, C], or null
  std::int64_t* wait_stats = nullptr;                  // += [R], ns, or null
};

/// Local: received rows to where their experts' groups are. All arrays are this rank's; see
/// RowGroups.
struct GroupParams {
  Call call;
  plan::GroupShape shape;
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  bool known = false;        // the groups are the caller's, else they are found here
  TensorView recv_topk_idx;  // [rows, K], unless known
  const float* recv_topk_weights = nullptr;  // [rows, K] or null
  plan::RowGroupArrays groups;
  std::int64_t x_bytes = 0;
  std::int64_t scale_bytes = 0;
  const std::byte* x = nullptr;           // [rows, x_bytes]
  const std::byte* scales = nullptr;      // [rows, scale_bytes]
  std::byte* grouped_x = nullptr;         // out [G, x_bytes]
  std::byte* grouped_x_scales = nullptr;  // out [G, scale_bytes]
};

/// Local: one row for each received row, the sum of its experts'.
struct ReduceParams {
  Call call;
  DType dtype = DType::kBfloat16;
  std::int64_t hidden = 0;
  const std::byte* x = nullptr;  // [num_grouped_rows, H]
  std::int64_t num_grouped_rows = 0;
  const float* weights = nullptr;                    // [num_grouped_rows] or null
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  const std::int32_t* grouped_rows = nullptr;        // [num_rows, K]
  std::int64_t num_rows = 0;
  std::int64_t num_topk = 0;
  std::byte* reduced = nullptr;  // out [num_rows, H]
};

struct CombineParams {
  Call call;
  DType dtype = DType::kBfloat16;
  const std::byte* x = nullptr;                      // [num_rows, H]
  std::int64_t num_rows = 0;                         // rows of x; the handle may know fewer
  std::int64_t handle_rows = 0;                      // length of recv_src_idx
  const float* topk_weights = nullptr;               // [Nr, K] or null
  const std::byte* bias[2] = {nullptr, nullptr};     // [N, H] or null
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  const std::int32_t* recv_src_idx = nullptr;        // [Nr]
  const std::int32_t* send_head = nullptr;           // [N, R]
  int chunk_rows = 1;                                // rows written before the receiver is told
  int window_rows = 1;                               // rows in flight at most
  std::byte* combined_x = nullptr;                   // out [N, H]
  float* combined_topk_weights = nullptr;            // out [N, K] or null
  std::int64_t* wait_stats = nullptr;                // += [R], ns, or null
};

}  // namespace intranode
}  // namespace deep_ep
