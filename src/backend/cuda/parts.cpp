#include "backend/cuda/check.hpp"
#include "backend/cuda/event.hpp"
#include "backend/cuda/make_backend.hpp"
#include "backend/plugin.hpp"

namespace deep_ep {

namespace {

class Parts final : public CudaParts {
 public:
  std::unique_ptr<Backend> make_backend(const BackendOptions& options) override {
    return cuda::make_backend(options);
  }

  // Not cudaMalloc and cudaFree: the latter waits for all kernels of the GPU, and a kernel of one
  // Buffer may wait for a call that another rank makes only when this thread has gone on.
  std::shared_ptr<void> allocate(int device, std::int64_t bytes) override {
    const cuda::DeviceGuard guard(device);
    void* memory = nullptr;
    cuda::check(cudaMallocAsync(&memory, static_cast<std::size_t>(bytes) + 1, cudaStreamPerThread),
                "cudaMallocAsync");
    cuda::check(cudaStreamSynchronize(cudaStreamPerThread), "cudaMallocAsync");
    return {memory, [device](void* data) {
              try {
                const cuda::DeviceGuard guard_of_free(device);
                (void)cudaFreeAsync(data, cudaStreamPerThread);
              } catch (const Error&) {  // the process ends, and its CUDA context is gone already
              }
            }};
  }

  void copy(void* to, const void* from, std::int64_t bytes, Stream stream) override {
    const cuda::DeviceGuard guard(stream.device.index);
    auto* native = static_cast<cudaStream_t>(stream.native);
    cuda::check(
        cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault, native),
        "cudaMemcpyAsync");
    cuda::check(cudaStreamSynchronize(native), "cudaMemcpyAsync");
  }

  std::shared_ptr<EventState> record(Stream stream) override {
    const cuda::DeviceGuard guard(stream.device.index);
    cudaEvent_t event = nullptr;
    cuda::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    std::shared_ptr<CUevent_st> owner(event, [](cudaEvent_t old) { (void)cudaEventDestroy(old); });
    cuda::check(cudaEventRecord(event, static_cast<cudaStream_t>(stream.native)),
                "cudaEventRecord");
    return std::make_shared<cuda::CudaEvent>(std::move(owner), stream.device.index, nullptr);
  }

  int num_devices() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    (void)cudaGetLastError();
    return count;
  }
};

}  // namespace

}  // namespace deep_ep

/// What src/backend/plugin.cpp looks up.
extern "C" __attribute__((visibility("default"))) deep_ep::CudaParts* deep_ep_cuda_parts() {
  static deep_ep::Parts parts;
  return &parts;
}
