#include "backend/cuda/internode_ll/wire_rows.cuh"
#include "backend/cuda/internode_ll_nodes/far.cuh"

namespace deep_ep::cuda::internode_ll {

cudaError_t launch_wire_combine(const NodesCombineArgs& args, int num_sms, cudaStream_t stream) {
  return launch_wire_combine_kernel(args, num_sms, stream);
}

cudaError_t load_nodes_wire_combine() { return load_wire_combine_kernels<NodesCombineArgs>(); }

}  // namespace deep_ep::cuda::internode_ll
