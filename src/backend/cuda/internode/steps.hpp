#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/cuda/arrays.hpp"
#include "backend/cuda/comm.hpp"
#include "backend/cuda/internode/rails.hpp"
#include "backend/cuda/intranode/steps.hpp"
#include "plan/internode.hpp"
#include "plan/recv_arrays.hpp"

// The kernels of the internode mode, one function each that launches it, as in intranode/steps.hpp.
// They are in libdeep_ep_nvshmem.so. R counts all ranks.
namespace deep_ep::cuda::internode {

// Bytes of a row in an item, at most: a row of 7168 BF16 values.
constexpr std::int64_t kMostPart = 14336;

/// What of a handle says where rows go; as deep_ep::internode::Routing.
struct RoutingArrays {
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
  std::int64_t nvl_head_rows = 0;
};

/// Words of this rank's GPU that notify leaves for the kernel behind it.
struct Workspace {
  std::int32_t* send_head = nullptr;       // [N, R] position among the rows for that rank, or -1
  std::int32_t* record_tokens = nullptr;   // [nodes, N] token of each record for that node
  std::int32_t* arrived_tokens = nullptr;  // [nvl_head_rows] token of each record that came

  static Workspace carve(Carver& carver, std::int64_t tokens, const plan::Topology& topology) {
    Workspace work;
    work.send_head = carver.take<std::int32_t>(tokens * topology.num_ranks);
    work.record_tokens = carver.take<std::int32_t>(tokens * topology.num_nodes());
    return work;
  }
  static std::int64_t bytes(std::int64_t tokens, const plan::Topology& topology) {
    Carver carver(nullptr);
    (void)carve(carver, tokens, topology);
    return carver.used();
  }
};

/// All that ranks tell each other ahead of a dispatch or a combine, or in a barrier. Without a
/// handle it fills those parts of the routing that do not come with the rows; with one it compares.
struct NotifyArgs {
  Comm comm;
  Rails rails;
  bool cached = false;                                  // the routing is a handle's
  const std::int32_t* num_tokens_per_rank = nullptr;    // [R], unless cached
  const std::int32_t* num_tokens_per_expert = nullptr;  // [E] or null
  Ids topk_idx;                                         // checked, if there
  RoutingArrays routing;
  Workspace work;
  std::uint64_t* counts = nullptr;  // [ceil(N / kTokensPerCount), R + nodes], as in intranode
  std::int64_t max_rows = 0;        // received or passed on by this rank; 0: any number
  std::int64_t handle_rows = 0;     // cached: received rows that the handle has room for
  std::uint64_t ticket = 0;         // for the host, which waits for it; 0: it does not
  // Number of RailState::go that lets the kernel behind begin to write to rings: when tokens are
  // placed or, `go_at_once`, when the kernels before have ended. 0: that waits for all of notify.
  std::uint64_t go = 0;
  bool go_at_once = false;
  std::int64_t* wait_stats = nullptr;  // += [R] or null: who comes late to a call is awaited here
};

struct DispatchArgs : DispatchStepArgs {
  Comm comm;
  Rails rails;
  bool fill_handle = false;  // what of it comes with the rows; else it is compared
  plan::RecordFormat record_format{{}, 1};
  ItemShape item;
  RoutingArrays routing;
  Workspace work;
  std::uint64_t go = 0;  // as in NotifyArgs
};

/// Every rank reads the rows of its node's ranks where these have them, in blocks that they map: a
/// rail peer's tokens it sums and sends home, its own it adds to what has come.
struct CombineArgs {
  Comm comm;
  Rails rails;
  const std::byte* bias[2] = {nullptr, nullptr};  // [N, x_bytes] or null
  plan::RowFormat format;                         // x and weights
  ItemShape item;                                 // weights, then x
  const std::int32_t* send_rdma_head = nullptr;   // [N, nodes]
  const std::int32_t* send_nvl_head = nullptr;    // [M, ranks of a node]
  int block_segment = 0;  // where this rank has its rows and weights: plan::RecvArrays
  std::int64_t block_offset = 0;
  std::int64_t block_rows = 0;
  int x_segment = -1;  // of rows that are not in the block
  std::int64_t x_offset = 0;
  // Of a rank that has its node for itself, so that nobody else reads them: where rows and weights
  // are in place of the block.
  const std::byte* x = nullptr;
  const float* topk_weights = nullptr;
  // Such a rank begins to send ahead of notify's end, by what its handle says.
  std::uint64_t go = 0;                       // as in NotifyArgs
  const std::int32_t* record_sums = nullptr;  // recv_rdma_rank_prefix_sum
  const std::int32_t* row_sums = nullptr;     // recv_gbl_rank_prefix_sum
  std::int64_t num_records = 0;               // M
  std::byte* combined_x = nullptr;            // out [N, x_bytes]
  float* combined_topk_weights = nullptr;     // out [N, K] or null
  std::int64_t* wait_stats = nullptr;         // += [R] or null
};

/// What of a handle is counted when all rows are here.
struct HandleArgs {
  Comm comm;
  Rails rails;
  RoutingArrays routing;
  const std::int32_t* arrived_tokens = nullptr;  // [nvl_head_rows]
  const plan::SourceMeta* metas = nullptr;       // [rows] in the block
  std::int64_t rows = 0;
};

/// Tells the ranks of other nodes what this rank's fault record says, or that it leaves.
struct TellArgs {
  Comm comm;
  Rails rails;
  bool leaves = false;
};

cudaError_t launch_notify(const NotifyArgs& args, int num_sms, cudaStream_t stream);
cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, intranode::SumType type, int num_sms,
                           cudaStream_t stream);
cudaError_t launch_handle(const HandleArgs& args, cudaStream_t stream);
cudaError_t launch_tell(const TellArgs& args, cudaStream_t stream);

cudaError_t load_notify();
cudaError_t load_dispatch();
cudaError_t load_combine();
cudaError_t load_handle();
cudaError_t load_tell();

}  // namespace deep_ep::cuda::internode
