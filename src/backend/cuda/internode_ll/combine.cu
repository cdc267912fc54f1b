#include "backend/cuda/internode_ll/plain_rows.cuh"

namespace deep_ep::cuda::internode_ll {

cudaError_t launch_combine(const CombineArgs& given, int num_sms, cudaStream_t stream) {
  CombineArgs args = given;
  args.shared = plan_combine(args);
  if (args.wire != plan::WireFormat::kBfloat16) return launch_wire_combine(args, num_sms, stream);
  return launch_plain_combine_kernel(args, num_sms, stream);
}

cudaError_t load_combine() { return load_plain_combine_kernels<CombineArgs>(); }

}  // namespace deep_ep::cuda::internode_ll
