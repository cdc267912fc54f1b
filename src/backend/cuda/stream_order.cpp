#include "backend/cuda/stream_order.hpp"

#include <vector>

#include "backend/cuda/check.hpp"

namespace deep_ep::cuda {

namespace {

/// What the next kernel of a captured stream depends on.
struct Dependencies {
  unsigned long long capture = 0;  // 0: the stream is not captured
  std::vector<cudaGraphNode_t> nodes;
  std::vector<cudaGraphEdgeData> edges;  // of each node, or none: all are ordinary
};

Dependencies dependencies_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  Dependencies found;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  std::size_t count = 0;
  check(cudaStreamGetCaptureInfo(stream, &status, &found.capture, nullptr, &nodes, &edges, &count),
        "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) return {};
  if (count > 0) found.nodes.assign(nodes, nodes + count);
  if (count > 0 && edges != nullptr) found.edges.assign(edges, edges + count);
  return found;
}

void set_dependencies(cudaStream_t stream, Dependencies& wanted) {
  check(cudaStreamUpdateCaptureDependencies(stream, wanted.nodes.data(),
                                            wanted.edges.empty() ? nullptr : wanted.edges.data(),
                                            wanted.nodes.size(), cudaStreamSetCaptureDependencies),
        "cudaStreamUpdateCaptureDependencies");
}

}  // namespace

void StreamOrder::follow(cudaStream_t first, cudaStream_t second) {
  // A queued wait is for what its event was recorded for, so one event does.
  if (!between_) between_ = context_.events()->take();
  check(cudaEventRecord(between_.get(), first), "cudaEventRecord");
  check(cudaStreamWaitEvent(second, between_.get(), 0), "cudaStreamWaitEvent");
}

void StreamOrder::order(cudaStream_t first, cudaStream_t second) {
  if (first != second && is_capturing(first) == is_capturing(second)) follow(first, second);
}

void StreamOrder::begin(cudaStream_t caller) {
  cudaStream_t comm = context_.comm_stream();
  if (caller == comm) return;
  if (!is_capturing(caller)) return follow(caller, comm);
  // The caller's stream is behind the last call's kernel, so that is all that this one must follow.
  const Dependencies of_comm = dependencies_of(comm);
  Dependencies of_caller = dependencies_of(caller);
  const bool behind_last = caller == caller_ && of_caller.capture == capture_ &&
                           of_comm.capture == capture_ && of_comm.nodes.size() == 1 &&
                           of_comm.nodes[0] == last_;
  follow(caller, comm);
  if (behind_last) set_dependencies(comm, of_caller);
}

void StreamOrder::end(cudaStream_t caller, bool behind_caller) {
  cudaStream_t comm = context_.comm_stream();
  if (caller == comm) return;
  follow(comm, caller);
  if (!behind_caller || !is_capturing(caller)) return;
  Dependencies of_comm = dependencies_of(comm);
  set_dependencies(caller, of_comm);
  caller_ = caller;
  capture_ = of_comm.capture;
  last_ = of_comm.nodes.size() == 1 ? of_comm.nodes[0] : nullptr;
}

}  // namespace deep_ep::cuda
