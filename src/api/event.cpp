#include "deep_ep/event.hpp"

#include "backend/plugin.hpp"
#include "base/event_state.hpp"

namespace deep_ep {

EventHandle::EventHandle() = default;
EventHandle::EventHandle(Stream stream) { record(stream); }
EventHandle::EventHandle(std::shared_ptr<EventState> state) : state_(std::move(state)) {}

void EventHandle::record(Stream stream) {
  // A host stream is the calling thread: all that it queued is done.
  state_ = stream.device.type == DeviceType::kHost ? nullptr : cuda_parts().record(stream);
}

void EventHandle::current_stream_wait(Stream stream) const {
  if (state_) state_->stream_wait(stream);
}

void EventHandle::host_wait() const {
  if (state_) state_->host_wait();
}

bool EventHandle::query() const { return !state_ || state_->query(); }

}  // namespace deep_ep
