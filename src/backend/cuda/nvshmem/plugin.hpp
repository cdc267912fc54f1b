#pragma once

#include <cstdint>
#include <memory>

#include "backend/cuda/internode/steps.hpp"
#include "backend/cuda/internode_ll_nodes/nodes.hpp"
#include "backend/cuda/nvshmem/heap.hpp"
#include "backend/put_rate.hpp"
#include "deep_ep/bootstrap.hpp"

namespace deep_ep::cuda::nvshmem {

/// What libdeep_ep_nvshmem.so does for the CUDA backend, which does not link NVSHMEM.
class NvshmemParts {
 public:
  virtual ~NvshmemParts() = default;
  /// Collective; see World::allocate().
  virtual std::unique_ptr<Heap> allocate(Bootstrap& bootstrap, int device, std::int64_t bytes) = 0;

  /// Collective; see CudaParts::measure_puts().
  virtual PutRate measure_puts(Bootstrap& bootstrap, int device, const PutPlan& plan) = 0;

  /// On the current device, behind allocate().
  virtual cudaError_t load_kernels() = 0;
  virtual cudaError_t launch(const internode::NotifyArgs& args, int num_sms,
                             cudaStream_t stream) = 0;
  virtual cudaError_t launch(const internode::DispatchArgs& args, int num_sms,
                             cudaStream_t stream) = 0;
  virtual cudaError_t launch(const internode::CombineArgs& args, intranode::SumType type,
                             int num_sms, cudaStream_t stream) = 0;
  virtual cudaError_t launch(const internode::HandleArgs& args, cudaStream_t stream) = 0;
  virtual cudaError_t launch(const internode::TellArgs& args, cudaStream_t stream) = 0;
  virtual cudaError_t launch(const internode_ll::NodesDispatchArgs& args, int num_sms,
                             cudaStream_t stream) = 0;
  virtual cudaError_t launch(const internode_ll::NodesCombineArgs& args, int num_sms,
                             cudaStream_t stream) = 0;
};

}  // namespace deep_ep::cuda::nvshmem
