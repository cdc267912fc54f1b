#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/ptx.cuh"
#include "backend/cuda/internode/steps.hpp"

// What of a handle is counted when all rows are here. Local: no epoch.
namespace deep_ep::cuda::internode {

namespace {

constexpr int kThreads = 256;

/// Of `count` ascending tokens, as token(i) gives them, how many are below `bound`.
template <class Token>
__device__ std::int32_t count_below(std::int64_t count, std::int64_t bound, Token&& token) {
  std::int64_t low = 0;
  std::int64_t high = count;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (token(middle) < bound) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<std::int32_t>(low);
}

/// Behind a fault counts may be of another call.
__device__ plan::RowRange within(plan::RowRange rows, std::int64_t room) {
  return {rows.begin < room ? rows.begin : room, rows.end < room ? rows.end : room};
}

}  // namespace

// See notify.cu.
__global__ void __launch_bounds__(kThreads) fill_handle(const __grid_constant__ HandleArgs args) {
  wait_for_kernel_before();
  const Rails& rails = args.rails;
  const plan::Topology& topology = rails.shape.topology;
  const RoutingArrays& routing = args.routing;
  const std::int64_t begin = blockIdx.x * std::int64_t{kThreads} + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  const auto* from = reinterpret_cast<const std::uint64_t*>(args.metas);
  auto* to = reinterpret_cast<std::uint64_t*>(routing.recv_src_meta);
  for (std::int64_t i = begin; i < args.rows * 2; i += step) to[i] = from[i];
  const int channels = routing.num_channels;
  const std::int32_t* prefix =
      rails.state.prefix + std::int64_t{args.comm.rank} * topology.num_ranks;
  for (std::int64_t i = begin; i < std::int64_t{topology.num_ranks} * channels; i += step) {
    const auto source = static_cast<int>(i / channels);
    const auto rows = within(plan::part_of(prefix, source), args.rows);
    const std::int64_t bound = plan::channel_begin(rails.state.num_tokens[source],
                                                   static_cast<int>(i % channels), channels);
    routing.recv_gbl_channel_prefix_matrix[i] =
        count_below(rows.end - rows.begin, bound,
                    [&](std::int64_t row) { return args.metas[rows.begin + row].token; });
  }
  for (std::int64_t i = begin; i < std::int64_t{topology.num_nodes()} * channels; i += step) {
    const auto node = static_cast<int>(i / channels);
    const auto records = within(plan::part_of(rails.state.records, node), routing.nvl_head_rows);
    const std::int64_t bound =
        plan::channel_begin(rails.state.num_tokens[topology.rank_of(node, rails.index)],
                            static_cast<int>(i % channels), channels);
    routing.recv_rdma_channel_prefix_matrix[i] =
        count_below(records.end - records.begin, bound,
                    [&](std::int64_t row) { return args.arrived_tokens[records.begin + row]; });
  }
  const std::int64_t came = rails.state.records[topology.num_nodes() - 1];
  const std::int64_t heads = routing.nvl_head_rows * topology.ranks_per_node;
  for (std::int64_t i = came * topology.ranks_per_node + begin; i < heads; i += step)
    routing.send_nvl_head[i] = -1;
}

cudaError_t load_handle() { return load<fill_handle>(); }

cudaError_t launch_handle(const HandleArgs& args, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 32;
  const std::int64_t channels =
      std::int64_t{args.rails.shape.topology.num_ranks} * args.routing.num_channels;
  const std::int64_t most = args.rows * 2 > channels ? args.rows * 2 : channels;
  const std::int64_t wanted = most / kThreads + 1;
  return launch_kernel(fill_handle, wanted < kMostBlocks ? wanted : kMostBlocks, kThreads, 0,
                       stream, args);
}

}  // namespace deep_ep::cuda::internode
