#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "deep_ep/event.hpp"

namespace deep_ep::host {

/// A Buffer's communication stream on the host: work in the order of enqueue, on a thread that
/// starts with the first work.
class CommStream {
 public:
  CommStream() = default;
  ~CommStream();
  CommStream(const CommStream&) = delete;
  CommStream& operator=(const CommStream&) = delete;

  /// The event carries the exception that `work` threw. Does not block.
  EventHandle enqueue(std::function<void()> work);
  /// Returns when everything enqueued so far is done.
  void drain();

 private:
  class Done;
  struct Item {
    std::function<void()> work;
    std::shared_ptr<Done> done;
  };
  void serve();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  bool busy_ = false;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace deep_ep::host
