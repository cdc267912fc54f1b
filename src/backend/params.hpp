#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "deep_ep/tensor.hpp"
#include "fabric/heap.hpp"
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

struct DispatchParams {
  Call call;
  bool cached = false;  // no notify_dispatch came before
  DispatchSource source;
  plan::RowFormat format;
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  const std::int32_t* send_head = nullptr;           // [N, R]
  int num_channels = 1;
  fabric::Block block;                                 // this rank's results
  std::int64_t block_rows = 0;                         // rows it was carved for
  fabric::Block handle_block;                          // plan::HandleArrays, if not cached
  std::int32_t* recv_src_idx = nullptr;                // there, out [block_rows], null if cached
  std::int32_t* recv_channel_prefix_matrix = nullptr;  // there, out [R, C], null if cached
  std::int64_t* wait_stats = nullptr;                  // += [R], ns, or null
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
