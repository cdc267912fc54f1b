#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/put_rate.hpp"
#include "base/event_state.hpp"

namespace deep_ep {

/// Calls of a rank as a CUDA graph, to be measured. Goes before what the calls use.
class CapturedCalls {
 public:
  virtual ~CapturedCalls() = default;
  /// Runs them twice, waits, and gives what the second run took on the GPU: by then no rank waits
  /// for another one to begin.
  virtual double time_us() = 0;
};

/// What libdeep_ep_cuda.so does for the rest, which links no CUDA.
class CudaParts {
 public:
  virtual ~CudaParts() = default;
  virtual std::unique_ptr<Backend> make_backend(const BackendOptions& options) = 0;
  /// Memory of a GPU, uninitialised; back at once with its last owner.
  virtual std::shared_ptr<void> allocate(int device, std::int64_t bytes) = 0;
  /// Between any memory of the host and of GPUs; returns when it is done, behind the work that
  /// `stream` has.
  virtual void copy(void* to, const void* from, std::int64_t bytes, Stream stream) = 0;
  virtual std::shared_ptr<EventState> record(Stream stream) = 0;
  /// What `calls` queue on `stream`. They have run before, since what is allocated at the first
  /// time cannot be captured.
  virtual std::unique_ptr<CapturedCalls> capture(Stream stream,
                                                 const std::function<void()>& calls) = 0;
  virtual int num_devices() = 0;
  /// The name of a GPU and, behind spaces, of those that this process sees whose memory it cannot
  /// map, as plan::split_hosts() takes them. Empty if there is no such GPU, which make_backend()
  /// says.
  virtual std::string reach(int device) = 0;
  /// Why GPUs of several nodes cannot be used; empty if they can. Loads NVSHMEM.
  virtual std::string why_no_nvshmem() = 0;
  /// Collective: what puts of NVSHMEM reach between the ranks of a Buffer over several nodes, whose
  /// GPU is `device`. What came is compared with what was put. Nothing else may run there.
  virtual PutRate measure_puts(Bootstrap& bootstrap, int device, const PutPlan& plan) = 0;
  /// A line for each GPU and for each pair of them.
  virtual std::vector<std::string> describe() = 0;
};

/// Loads the library at the first call. Throws Error(kUnsupported) saying what is missing.
CudaParts& cuda_parts();

/// As CudaParts, and where these are missing themselves.
std::string why_no_nvshmem();

}  // namespace deep_ep
