#include "backend/cuda/captured_calls.hpp"

#include "backend/cuda/check.hpp"
#include "backend/cuda/stopwatch.hpp"

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
  }
  ~Graph() override {
    const DeviceGuard guard(device_, std::nothrow);
    if (graph_ != nullptr) (void)cudaGraphExecDestroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  double time_us() override {
    const DeviceGuard guard(device_);
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    watch_.start();
    check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    watch_.stop();
    return 1000.0 * watch_.milliseconds();
  }

 private:
  int device_;
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
  Stopwatch watch_{stream_};
};

}  // namespace

std::unique_ptr<CapturedCalls> capture(Stream stream, const std::function<void()>& calls) {
  const DeviceGuard guard(stream.device.index);
  return std::make_unique<Graph>(stream, calls);
}

}  // namespace deep_ep::cuda
