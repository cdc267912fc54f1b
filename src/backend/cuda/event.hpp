#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/event_state.hpp"
#include "deep_ep/error.hpp"

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

/// A point in a CUDA stream. `failure`, if given, is asked once it is reached.
class CudaEvent final : public EventState {
 public:
  using Failure = std::function<std::optional<Error>()>;
  CudaEvent(std::shared_ptr<CUevent_st> event, int device, Failure failure)
      : event_(std::move(event)), device_(device), failure_(std::move(failure)) {}

  void stream_wait(Stream stream) override;
  void host_wait() override;
  bool query() override;
  cudaEvent_t get() const { return event_.get(); }

 private:
  void throw_failure() const;

  std::shared_ptr<CUevent_st> event_;
  int device_;
  Failure failure_;
};

}  // namespace deep_ep::cuda
