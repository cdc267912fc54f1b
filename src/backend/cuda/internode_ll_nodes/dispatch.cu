#include "backend/cuda/internode_ll/dispatch.cuh"
#include "backend/cuda/internode_ll_nodes/far.cuh"

namespace deep_ep::cuda::internode_ll {

cudaError_t launch_dispatch(const NodesDispatchArgs& args, int num_sms, cudaStream_t stream) {
  return launch_dispatch_kernel(args, num_sms, stream);
}

cudaError_t load_nodes_dispatch() { return load_dispatch_kernels<NodesDispatchArgs>(); }

}  // namespace deep_ep::cuda::internode_ll
