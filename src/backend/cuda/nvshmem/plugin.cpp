#include "backend/cuda/nvshmem/plugin.hpp"

#include "backend/cuda/nvshmem/world.hpp"

namespace deep_ep::cuda::nvshmem {

namespace {

class Parts final : public NvshmemParts {
 public:
  std::unique_ptr<Heap> allocate(Bootstrap& bootstrap, int device, std::int64_t bytes) override {
    return World::instance().allocate(bootstrap, device, bytes);
  }
};

}  // namespace

}  // namespace deep_ep::cuda::nvshmem

/// What the CUDA backend looks up.
extern "C" __attribute__((visibility("default"))) deep_ep::cuda::nvshmem::NvshmemParts*
deep_ep_nvshmem() {
  static deep_ep::cuda::nvshmem::Parts parts;
  return &parts;
}
