#include "deep_ep/event.hpp"

#include "base/event_state.hpp"

namespace deep_ep {

EventHandle::EventHandle() = default;
// A host stream is the calling thread: all that it queued is done.
EventHandle::EventHandle(Stream) {}
EventHandle::EventHandle(std::shared_ptr<EventState> state) : state_(std::move(state)) {}

void EventHandle::record(Stream) { state_ = nullptr; }

void EventHandle::current_stream_wait(Stream stream) const {
  if (state_) state_->stream_wait(stream);
}

void EventHandle::host_wait() const {
  if (state_) state_->host_wait();
}

bool EventHandle::query() const { return !state_ || state_->query(); }

}  // namespace deep_ep
