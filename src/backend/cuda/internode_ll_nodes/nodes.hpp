#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/cuda/internode/rails.hpp"
#include "backend/cuda/internode_ll/steps.hpp"
#include "plan/far_messages.hpp"

// Low latency over several nodes. Ranks that map each other's part of the symmetric heap, those of
// a node at least, write to it as they do on one node: plan::LowLatencyLayout lies there. To others
// messages are put, from a mirror of where they come to (plan/far_messages.hpp). Compiled by g++
// and nvcc.
namespace deep_ep::cuda::internode_ll {

using plan::FarArea;
using plan::FarLayout;
using plan::FarShape;

/// A rank's memory for low latency in the symmetric heap, `bytes` being what one node would have.
struct NodesLayout {
  std::byte* near_base = nullptr;
  plan::LowLatencyLayout near;
  FarLayout far;

  static NodesLayout carve(Carver& carver, std::int64_t bytes, int num_ranks) {
    NodesLayout layout;
    layout.near_base = carver.take<std::byte>(bytes);
    layout.near = plan::LowLatencyLayout::carve(layout.near_base, bytes, num_ranks);
    layout.far = FarLayout::carve(carver, layout.near);
    return layout;
  }
  static std::int64_t bytes(std::int64_t bytes, int num_ranks) {
    Carver carver(nullptr);
    (void)carve(carver, bytes, num_ranks);
    return carver.used();
  }
};

/// What a kernel knows beside a step's arguments. In these ranks are counted over all nodes, and
/// Comm::bases are where others' parts of the symmetric heap are mapped here, null for far ranks.
struct Nodes {
  /// With the ranks of this node as Comm, in whose memory faults are told.
  StepArgs node;
  internode::Rails rails;
  FarLayout far;
  FarShape shape;
  std::uint64_t* told = nullptr;  // [kParts, R] ticket that a far rank knows to be received here
};

/// The arguments of a step over several nodes.
template <class Args>
struct OverNodes : Args {
  static constexpr bool kPuts = true;

  Nodes nodes;
};

using NodesDispatchArgs = OverNodes<DispatchArgs>;
using NodesCombineArgs = OverNodes<CombineArgs>;

// As in internode_ll/steps.hpp; in libdeep_ep_nvshmem.so.
cudaError_t launch_dispatch(const NodesDispatchArgs& args, int num_sms, cudaStream_t stream);
cudaError_t launch_combine(const NodesCombineArgs& args, int num_sms, cudaStream_t stream);
cudaError_t launch_wire_combine(const NodesCombineArgs& args, int num_sms, cudaStream_t stream);
cudaError_t load_nodes_dispatch();
cudaError_t load_nodes_combine();
cudaError_t load_nodes_wire_combine();

}  // namespace deep_ep::cuda::internode_ll
