#pragma once

#include <memory>

#include "deep_ep/export.hpp"
#include "deep_ep/types.hpp"

namespace deep_ep {

class EventState;  // internal

/// A point in a stream of work. On the host the caller's stream is the calling thread, whose work
/// is done when it returns, and a Buffer's communication stream is its worker thread. Copies refer
/// to the same point. Thread-safe once recorded.
class DEEP_EP_API EventHandle {
 public:
  /// Complete.
  EventHandle();
  /// Recorded on `stream`, whose `device` must be set if it is a CUDA stream; on the host, where
  /// the stream is the calling thread, complete at once.
  explicit EventHandle(Stream stream);
  explicit EventHandle(std::shared_ptr<EventState> state);

  /// Moves this handle to the present end of `stream`.
  void record(Stream stream = {});
  /// Work queued on `stream` from now on waits for the event. On the host this blocks the calling
  /// thread, and throws the Error of the call that the event stands for, if that failed.
  void current_stream_wait(Stream stream = {}) const;
  /// Blocks the calling thread until the event has happened. Throws the Error of the call that it
  /// stands for, on GPUs any fault of its Buffer that is known by then.
  void host_wait() const;
  /// True once the event has happened, failed calls included. Never blocks.
  bool query() const;

  const std::shared_ptr<EventState>& state() const { return state_; }

 private:
  std::shared_ptr<EventState> state_;
};

}  // namespace deep_ep
