#include "backend/cuda/internode_ll/dispatch.cuh"

namespace deep_ep::cuda::internode_ll {

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
  return launch_dispatch_kernel(args, num_sms, stream);
}

cudaError_t load_dispatch() { return load_dispatch_kernels<DispatchArgs>(); }

}  // namespace deep_ep::cuda::internode_ll
