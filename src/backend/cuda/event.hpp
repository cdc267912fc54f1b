#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "backend/cuda/faults.hpp"
#include "base/event_state.hpp"

namespace deep_ep::cuda {

/// Events of one device that are used again and again, since making one costs more than recording
/// it. Thread-safe; outlives what it handed out.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  explicit EventPool(int device) : device_(device) {}
  ~EventPool();
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  /// Goes back to the pool with its last owner.
  std::shared_ptr<CUevent_st> take();

 private:
  int device_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;
};

/// A point in a CUDA stream; `faults`, if given, are asked once it is reached.
class CudaEvent final : public EventState {
 public:
  CudaEvent(std::shared_ptr<CUevent_st> event, int device, std::shared_ptr<Faults> faults)
      : event_(std::move(event)), device_(device), faults_(std::move(faults)) {}

  void stream_wait(Stream stream) override;
  void host_wait() override;
  bool query() override;

 private:
  std::shared_ptr<CUevent_st> event_;
  int device_;
  std::shared_ptr<Faults> faults_;
};

/// The end that `stream` has when somebody asks, for calls whose event hardly anybody does:
/// recording one takes longer than all else that the host does beside the launch. `stream` is never
/// destroyed.
class StreamEnd final : public EventState {
 public:
  StreamEnd(cudaStream_t stream, std::shared_ptr<EventPool> events, int device,
            std::shared_ptr<Faults> faults)
      : stream_(stream), events_(std::move(events)), device_(device), faults_(std::move(faults)) {}

  void stream_wait(Stream stream) override { recorded().stream_wait(stream); }
  void host_wait() override { recorded().host_wait(); }
  bool query() override { return recorded().query(); }

 private:
  CudaEvent& recorded();

  cudaStream_t stream_;
  std::shared_ptr<EventPool> events_;
  int device_;
  std::shared_ptr<Faults> faults_;
  std::once_flag once_;
  std::optional<CudaEvent> event_;
};

}  // namespace deep_ep::cuda
