#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/rail.cuh"

namespace deep_ep::cuda::internode {

// See notify.cu.
__global__ void tell(const __grid_constant__ TellArgs args) {
  tell_fault(args.comm, args.rails);
  if (!args.leaves || threadIdx.x != 0) return;
  const Rails& rails = args.rails;
  // Low latency ends before what it has put is there: that comes before the word that this rank has
  // left. With a fault nobody waits for it, and who has died over a network would be waited for.
  const bool whole = *rails.state.told_fault == 0;
  if (whole) nvshmem_quiet();
  for (int i = 0; i < rails.shape.topology.num_ranks; ++i) {
    if (rails.shape.topology.node_of(i) != rails.node)
      nvshmemx_signal_op(rails.block.left + rails.rank(), 1, NVSHMEM_SIGNAL_SET, i);
  }
  // Its memory serves others when it is gone.
  if (whole) nvshmem_quiet();
}

cudaError_t load_tell() { return load<tell>(); }

cudaError_t launch_tell(const TellArgs& args, cudaStream_t stream) {
  tell<<<1, 32, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::internode
