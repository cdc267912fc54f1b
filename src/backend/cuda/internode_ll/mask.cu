#include "backend/cuda/device/launch.cuh"
#include "backend/cuda/device/ptx.cuh"
#include "backend/cuda/internode_ll/steps.hpp"

namespace deep_ep::cuda::internode_ll {

namespace {

__global__ void set_mask(std::int32_t* masks, int num_ranks, int rank, std::int32_t value) {
  wait_for_kernel_before();
  for (int i = threadIdx.x; i < num_ranks; i += blockDim.x) {
    if (rank < 0 || i == rank) masks[i] = value;
  }
}

}  // namespace

cudaError_t launch_set_mask(std::int32_t* masks, int num_ranks, int rank, std::int32_t value,
                            cudaStream_t stream) {
  return launch_kernel(set_mask, 1, 32, 0, stream, masks, num_ranks, rank, value);
}

cudaError_t load_mask() { return load<set_mask>(); }

}  // namespace deep_ep::cuda::internode_ll
