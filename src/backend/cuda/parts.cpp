#include "backend/cuda/captured_calls.hpp"
#include "backend/cuda/check.hpp"
#include "backend/cuda/event.hpp"
#include "backend/cuda/gpu_name.hpp"
#include "backend/cuda/internode.hpp"
#include "backend/cuda/make_backend.hpp"
#include "backend/cuda/memory/memory.hpp"
#include "backend/plugin.hpp"

namespace deep_ep {

namespace {

std::string describe_pair(int from, int to) {
  int access = 0;
  int back = 0;
  int atomics = 0;
  cuda::check(cudaDeviceCanAccessPeer(&access, from, to), "cudaDeviceCanAccessPeer");
  cuda::check(cudaDeviceCanAccessPeer(&back, to, from), "cudaDeviceCanAccessPeer");
  cuda::check(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, from, to),
              "cudaDeviceGetP2PAttribute");
  const char* verdict = access == 0 || back == 0 ? "no access to each other's memory"
                        : atomics == 0           ? "access, but no native atomics: PCIe, not NVLink"
                                                 : "access with native atomics";
  return fmt::format("GPUs {} and {}: {}", from, to, verdict);
}

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

  std::unique_ptr<CapturedCalls> capture(Stream stream,
                                         const std::function<void()>& calls) override {
    return cuda::capture(stream, calls);
  }

  std::vector<std::string> describe() override {
    const int count = num_devices();
    std::vector<std::string> lines;
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties{};
      cuda::check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
      lines.push_back(
          fmt::format("GPU {}: {}, {} SMs, {:.0f} GiB, {}{}", i, properties.name,
                      properties.multiProcessorCount,
                      static_cast<double>(properties.totalGlobalMem) / (1 << 30),
                      cuda::has_vmm(i) ? "segments by file descriptor" : "segments by CUDA IPC",
                      properties.major < 9 ? "; too old: compute capability 9.0 is needed" : ""));
    }
    for (int from = 0; from < count; ++from) {
      for (int to = from + 1; to < count; ++to) lines.push_back(describe_pair(from, to));
    }
    if (lines.empty()) lines.emplace_back("no GPU, or no driver for it");
    return lines;
  }

  std::string reach(int device) override {
    const int count = num_devices();
    if (device < 0 || device >= count) return {};
    std::string text = cuda::gpu_name(device);
    for (int other = 0; other < count; ++other) {
      int access = 0;
      if (other == device) continue;
      cuda::check(cudaDeviceCanAccessPeer(&access, device, other), "cudaDeviceCanAccessPeer");
      if (access == 0) text += " " + cuda::gpu_name(other);
    }
    return text;
  }

  std::string why_no_nvshmem() override {
    try {
      (void)cuda::nvshmem_parts();
      return {};
    } catch (const Error& error) {
      return error.what();
    }
  }

  PutRate measure_puts(Bootstrap& bootstrap, int device, const PutPlan& plan) override {
    return cuda::nvshmem_parts().measure_puts(bootstrap, device, plan);
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
