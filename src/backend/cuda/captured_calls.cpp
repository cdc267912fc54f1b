#include "backend/cuda/captured_calls.hpp"

#include "backend/cuda/check.hpp"

namespace deep_ep::cuda {

namespace {

cudaGraph_t record(cudaStream_t stream, const std::function<void()>& calls) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  try {
    calls();
  } catch (...) {
    (void)cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  return graph;
}

class Graph final : public CapturedCalls {
 public:
  Graph(Stream stream, const std::function<void()>& calls)
      : device_(stream.device.index), stream_(static_cast<cudaStream_t>(stream.native)) {
    cudaGraph_t graph = record(stream_, calls);
    const cudaError_t status = cudaGraphInstantiate(&graph_, graph, 0);
    (void)cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
    for (cudaEvent_t& event : events_) check(cudaEventCreate(&event), "cudaEventCreate");
  }
  ~Graph() override {
    const DeviceGuard guard(device_, std::nothrow);
    for (cudaEvent_t event : events_)
      if (event != nullptr) (void)cudaEventDestroy(event);
    if (graph_ != nullptr) (void)cudaGraphExecDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  double time_us() override {
    const DeviceGuard guard(device_);
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    check(cudaEventRecord(events_[0], stream_), "cudaEventRecord");
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    check(cudaEventRecord(events_[1], stream_), "cudaEventRecord");
    check(cudaEventSynchronize(events_[1]), "cudaEventSynchronize");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, events_[0], events_[1]), "cudaEventElapsedTime");
    return 1000.0 * static_cast<double>(milliseconds);
  }

 private:
  int device_;
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
  cudaEvent_t events_[2] = {};
};

}  // namespace

std::unique_ptr<CapturedCalls> capture(Stream stream, const std::function<void()>& calls) {
  const DeviceGuard guard(stream.device.index);
  return std::make_unique<Graph>(stream, calls);
}

}  // namespace deep_ep::cuda
