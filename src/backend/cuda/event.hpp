#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
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

}  // namespace deep_ep::cuda
