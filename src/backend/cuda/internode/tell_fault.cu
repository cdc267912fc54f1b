#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/internode/rail.cuh"

namespace deep_ep::cuda::internode {

// See notify.cu.
__global__ void tell(const __grid_constant__ TellFaultArgs args) {
  tell_fault(args.comm, args.rails);
}

cudaError_t load_tell_fault() { return load<tell>(); }

cudaError_t launch_tell_fault(const TellFaultArgs& args, cudaStream_t stream) {
  tell<<<1, 32, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace deep_ep::cuda::internode
