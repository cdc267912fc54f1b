#include "backend/cuda/event.hpp"

#include "backend/cuda/check.hpp"

namespace deep_ep::cuda {

EventPool::~EventPool() {
  for (cudaEvent_t event : free_) (void)cudaEventDestroy(event);
}

std::shared_ptr<CUevent_st> EventPool::take() {
  cudaEvent_t event = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      event = free_.back();
      free_.pop_back();
    }
  }
  if (event == nullptr) {
    const DeviceGuard guard(device_);
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  return {event, [pool = shared_from_this()](cudaEvent_t used) {
            const std::lock_guard lock(pool->mutex_);
            pool->free_.push_back(used);
          }};
}

void CudaEvent::stream_wait(Stream stream) {
  const DeviceGuard guard(device_);
  check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.native), event_.get(), 0),
        "cudaStreamWaitEvent");
}

void CudaEvent::host_wait() {
  const RelaxedCapture relaxed;
  check(cudaEventSynchronize(event_.get()), "cudaEventSynchronize");
  if (!faults_) return;
  if (std::optional<Error> error = faults_->error("a queued call")) throw Error(*error);
}

CudaEvent& StreamEnd::recorded() {
  std::call_once(once_, [this] {
    const DeviceGuard guard(device_);
    std::shared_ptr<CUevent_st> event = events_->take();
    check(cudaEventRecord(event.get(), stream_), "cudaEventRecord");
    event_.emplace(std::move(event), device_, faults_);
  });
  return *event_;
}

bool CudaEvent::query() {
  const RelaxedCapture relaxed;
  const cudaError_t status = cudaEventQuery(event_.get());
  if (status == cudaErrorNotReady) return false;
  check(status, "cudaEventQuery");
  return true;
}

}  // namespace deep_ep::cuda
