#include "backend/cuda/internode_ll/plain_rows.cuh"
#include "backend/cuda/internode_ll_nodes/far.cuh"

namespace deep_ep::cuda::internode_ll {

cudaError_t launch_combine(const NodesCombineArgs& given, int num_sms, cudaStream_t stream) {
  NodesCombineArgs args = given;
  args.shared = plan_combine(args);
  if (args.wire != plan::WireFormat::kBfloat16) return launch_wire_combine(args, num_sms, stream);
  return launch_plain_combine_kernel(args, num_sms, stream);
}

cudaError_t load_nodes_combine() { return load_plain_combine_kernels<NodesCombineArgs>(); }

}  // namespace deep_ep::cuda::internode_ll
