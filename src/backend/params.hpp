#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "deep_ep/tensor.hpp"
#include "fabric/heap.hpp"
#include "plan/groups.hpp"
#include "plan/internode.hpp"
#include "plan/layout.hpp"
#include "plan/low_latency.hpp"
#include "plan/recv_arrays.hpp"
#include "plan/wire.hpp"
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
  plan::Topology topology;
  std::int32_t* num_tokens_per_rdma_rank = nullptr;  // [nodes]; null while there is one
};

}  // namespace internode

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

/// What a dispatch moves, of whatever mode, and where this rank's results lie.
struct DispatchStep {
  Call call;
  bool cached = false;  // the routing is a handle's: no notify_dispatch of this call came before
  DispatchSource source;
  plan::RowFormat format;
  int num_channels = 1;
  fabric::Block block;                 // this rank's results
  std::int64_t block_rows = 0;         // rows it was carved for
  fabric::Block x_block;               // rows of x, if not there; segment -1: there
  DispatchOutputs outputs;             // filled when all rows are here
  std::int64_t* wait_stats = nullptr;  // += [R], ns, or null
};

/// The sums of a combine, of whatever mode.
struct CombineStep {
  Call call;
  DType dtype = DType::kBfloat16;
  const std::byte* x = nullptr;                   // [num_rows, H]
  std::int64_t num_rows = 0;                      // rows of x; the handle may know fewer
  std::int64_t handle_rows = 0;                   // received rows that the handle has room for
  const float* topk_weights = nullptr;            // [Nr, K] or null
  const std::byte* bias[2] = {nullptr, nullptr};  // [N, H] or null
  int chunk_rows = 1;                             // rows written before the receiver is told
  int window_rows = 1;                            // rows in flight at most
  std::byte* combined_x = nullptr;                // out [N, H]
  float* combined_topk_weights = nullptr;         // out [N, K] or null
  std::int64_t* wait_stats = nullptr;             // += [R], ns, or null
};

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
  std::int64_t max_rows = 0;           // more received rows are Error(kCapacity); 0: none
  std::int64_t* wait_stats = nullptr;  // on hosts: += [R], ns, or null
  // Out, host, known behind await_counts(). Null: nobody waits for counts.
  std::int64_t* num_recv_rows = nullptr;
  std::int64_t* recv_tokens_per_expert = nullptr;  // [L]; untouched without counts
};

struct DispatchParams : DispatchStep {
  // Queued before the host knows how many rows come: if they are more than block_rows the step does
  // nothing, and is no epoch.
  bool tentative = false;
  const std::int32_t* rank_prefix_matrix = nullptr;    // [R, R]
  const std::int32_t* send_head = nullptr;             // [N, R]
  fabric::Block handle_block;                          // plan::HandleArrays, if to be filled
  std::int32_t* recv_src_idx = nullptr;                // there, out [block_rows], or null
  std::int32_t* recv_channel_prefix_matrix = nullptr;  // there, out [R, C], or null
};

/// Local: received rows to where their experts' groups are. All arrays are this rank's; see
/// RowGroups.
struct GroupParams {
  Call call;
  plan::GroupShape shape;
  const std::int32_t* num_received_rows = nullptr;  // one number: the handle's
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
  const float* weights = nullptr;                   // [num_grouped_rows] or null
  const std::int32_t* num_received_rows = nullptr;  // one number: the handle's
  const std::int32_t* grouped_rows = nullptr;       // [num_rows, K]
  std::int64_t num_rows = 0;
  std::int64_t num_topk = 0;
  std::byte* reduced = nullptr;  // out [num_rows, H]
};

struct CombineParams : CombineStep {
  const std::int32_t* rank_prefix_matrix = nullptr;  // [R, R]
  const std::int32_t* recv_src_idx = nullptr;        // [Nr]
  const std::int32_t* send_head = nullptr;           // [N, R]
};

}  // namespace intranode

namespace internode {

struct BarrierParams {
  Call call;
};

/// What of a handle says where this rank's tokens go, and what comes; see InternodeHandle, in whose
/// words M is the last element of recv_rdma_rank_prefix_sum.
struct Routing {
  int num_channels = 1;
  const bool* is_token_in_rank = nullptr;                   // [N, R]
  std::int32_t* rdma_channel_prefix_matrix = nullptr;       // [nodes, C]
  std::int32_t* gbl_channel_prefix_matrix = nullptr;        // [R, C]
  std::int32_t* recv_rdma_channel_prefix_matrix = nullptr;  // [nodes, C]
  std::int32_t* recv_rdma_rank_prefix_sum = nullptr;        // [nodes]
  std::int32_t* recv_gbl_channel_prefix_matrix = nullptr;   // [R, C]
  std::int32_t* recv_gbl_rank_prefix_sum = nullptr;         // [R]
  plan::SourceMeta* recv_src_meta = nullptr;                // [Nr]
  std::int32_t* send_rdma_head = nullptr;                   // [N, nodes]
  std::int32_t* send_nvl_head = nullptr;                    // [M, ranks of a node]
  std::int64_t nvl_head_rows = 0;                           // rows that there are of it
};

struct NotifyDispatchParams {
  Call call;
  const std::int32_t* num_tokens_per_rank = nullptr;    // [R]
  const std::int32_t* num_tokens_per_expert = nullptr;  // [E] or null
  TensorView topk_idx;                                  // [N, K] or undefined: checked
  Routing routing;            // out, but for is_token_in_rank and what comes with the rows
  std::int64_t max_rows = 0;  // more received rows or records are Error(kCapacity); 0: none
  std::int64_t* wait_stats = nullptr;  // += [R], ns or cycles, or null
  // Out, host; the step returns when they are known. Null: nobody waits for counts.
  std::int64_t* num_recv_rows = nullptr;
  std::int64_t* num_recv_records = nullptr;        // M
  std::int64_t* recv_tokens_per_expert = nullptr;  // [L]; untouched without counts
};

struct DispatchParams : DispatchStep {
  Routing routing;
  /// What of the handle comes with the rows is to be filled: recv_src_meta, send_nvl_head,
  /// recv_rdma_channel_prefix_matrix, recv_gbl_channel_prefix_matrix. Else it is compared.
  bool fill_handle = false;
  int chunk_rows = 1;   // records put before the receiver is told
  int window_rows = 1;  // records in flight to a rail peer at most, in a lane
};

/// chunk_rows and window_rows count between nodes.
struct CombineParams : CombineStep {
  Routing routing;
  int nvl_window_rows = 1;  // rows in flight between two ranks of a node
};

}  // namespace internode
namespace internode_ll {

/// What of a call a step does.
enum class Phases : std::uint8_t { kSend = 1, kReceive = 2, kBoth = 3 };
constexpr bool has(Phases phases, Phases one) {
  return (static_cast<int>(phases) & static_cast<int>(one)) != 0;
}

/// How rows are changed on their way.
enum class Quantization : std::uint8_t {
  kNone,
  kFp8,            // float32 scales
  kFp8PowerOfTwo,  // the same, powers of two
  kFp8Ue8m0,       // their exponent bytes
};

/// Both steps of a call get the same params, with other phases.
struct Step {
  Call call;  // epoch: counts the calls of this kind on the host; record: what ranks compare
  Phases phases = Phases::kBoth;
  Stream stream{};  // what the step runs on
  plan::LowLatencyShape shape;
  bool rank_major = false;
  TensorView topk_idx;  // [N, K]
  // A word of the call's own, which sending writes and receiving reads: which ticket it has. Null:
  // one step does both.
  std::uint64_t* ticket = nullptr;
  std::int64_t* wait_stats = nullptr;  // += [R], or null
};

struct DispatchParams : Step {
  Quantization quantization = Quantization::kNone;
  const std::byte* x = nullptr;              // [N, H]
  std::int64_t hidden = 0;                   // H
  TensorView x_scales;                       // [N, S], if they are given
  const float* topk_weights = nullptr;       // [N, K] or null
  std::int64_t x_bytes = 0;                  // of a received row; scales follow it on the way
  int num_scales = 0;                        // 4-byte words of a received row's scales
  std::byte* recv_x = nullptr;               // out [L, R * M, x_bytes] or [R, M, x_bytes]
  TensorView recv_x_scales;                  // out, strided
  std::int32_t* recv_count = nullptr;        // out [L] or [R]
  TensorView recv_topk_idx;                  // out [R, M, K], rank-major
  float* recv_topk_weights = nullptr;        // out [R, M, K], rank-major, or null
  std::int32_t* src_info = nullptr;          // out
  std::int64_t* layout_range = nullptr;      // out
  std::int32_t* cumulative_stats = nullptr;  // += [L], or null
};

struct CombineParams : Step {
  plan::WireFormat wire = plan::WireFormat::kBfloat16;  // of rows on their way home
  const std::byte* x = nullptr;                         // [L, R * M, H] or [R, M, H] bfloat16
  std::int64_t hidden = 0;                              // H
  const float* topk_weights = nullptr;                  // [N, K]; null if rank-major
  const std::int32_t* src_info = nullptr;               // as dispatch wrote them
  const std::int64_t* layout_range = nullptr;
  std::byte* combined_x = nullptr;  // out [N, H]
};

}  // namespace internode_ll
}  // namespace deep_ep
