#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "backend/cuda/context.hpp"

namespace deep_ep::cuda {

/// How the calls of a Buffer, which run on its communication stream, follow what their callers'
/// streams have, and the other way round. Calls come one at a time.
///
/// In a capture a wait for an event adds to what a stream's next kernel depends on, and takes
/// nothing away: behind n calls the next would depend on n kernels, and one that depends on more
/// than one begins 1.4 us later (docs/performance.md). So a stream that is behind all that another
/// one has, which is behind all that it has itself, gets that one's dependencies instead.
class StreamOrder {
 public:
  explicit StreamOrder(Context& context) : context_(context) {}

  /// What `second` does from now on comes behind what `first` has, unless one of the two alone is
  /// captured: that cannot have an edge to the other.
  void order(cudaStream_t first, cudaStream_t second);

  /// A call begins on the communication stream behind what `caller` has.
  void begin(cudaStream_t caller);
  /// The caller's stream goes on behind a call, which began behind all that it had if
  /// `behind_caller`.
  void end(cudaStream_t caller, bool behind_caller);

 private:
  void follow(cudaStream_t first, cudaStream_t second);

  Context& context_;
  std::shared_ptr<CUevent_st> between_;
  // Of the last call in a capture: its last kernel, which `caller_` is behind.
  cudaStream_t caller_ = nullptr;
  unsigned long long capture_ = 0;  // as CUDA numbers them
  cudaGraphNode_t last_ = nullptr;
};

}  // namespace deep_ep::cuda
