#include "backend/cuda/nvshmem/plugin.hpp"

#include "backend/cuda/nvshmem/puts.hpp"
#include "backend/cuda/nvshmem/world.hpp"

namespace deep_ep::cuda::nvshmem {

namespace {

class Parts final : public NvshmemParts {
 public:
  std::unique_ptr<Heap> allocate(Bootstrap& bootstrap, int device, std::int64_t bytes) override {
    device_ = device;  // the world's, which has one
    return World::instance().allocate(bootstrap, device, bytes);
  }
  PutRate measure_puts(Bootstrap& bootstrap, int device, const PutPlan& plan) override {
    return nvshmem::measure_puts(bootstrap, device, plan);
  }
  cudaError_t load_kernels() override {
    use_device();
    for (const auto load :
         {internode::load_notify, internode::load_dispatch, internode::load_combine,
          internode::load_handle, internode::load_tell, internode_ll::load_nodes_dispatch,
          internode_ll::load_nodes_combine, internode_ll::load_nodes_wire_combine}) {
      const cudaError_t status = load();
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }
  cudaError_t launch(const internode::NotifyArgs& args, int num_sms, cudaStream_t stream) override {
    use_device();
    return internode::launch_notify(args, num_sms, stream);
  }
  cudaError_t launch(const internode::DispatchArgs& args, int num_sms,
                     cudaStream_t stream) override {
    use_device();
    return internode::launch_dispatch(args, num_sms, stream);
  }
  cudaError_t launch(const internode::CombineArgs& args, intranode::SumType type, int num_sms,
                     cudaStream_t stream) override {
    use_device();
    return internode::launch_combine(args, type, num_sms, stream);
  }
  cudaError_t launch(const internode::HandleArgs& args, cudaStream_t stream) override {
    use_device();
    return internode::launch_handle(args, stream);
  }
  cudaError_t launch(const internode::TellArgs& args, cudaStream_t stream) override {
    use_device();
    return internode::launch_tell(args, stream);
  }
  cudaError_t launch(const internode_ll::NodesDispatchArgs& args, int num_sms,
                     cudaStream_t stream) override {
    use_device();
    return internode_ll::launch_dispatch(args, num_sms, stream);
  }
  cudaError_t launch(const internode_ll::NodesCombineArgs& args, int num_sms,
                     cudaStream_t stream) override {
    use_device();
    return internode_ll::launch_combine(args, num_sms, stream);
  }

 private:
  // The CUDA runtime of this library has a current device of its own for each thread.
  void use_device() const { (void)cudaSetDevice(device_); }

  int device_ = 0;
};

}  // namespace

}  // namespace deep_ep::cuda::nvshmem

/// What the CUDA backend looks up.
extern "C" __attribute__((visibility("default"))) deep_ep::cuda::nvshmem::NvshmemParts*
deep_ep_nvshmem() {
  static deep_ep::cuda::nvshmem::Parts parts;
  return &parts;
}
