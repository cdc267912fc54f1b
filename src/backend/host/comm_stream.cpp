#include "backend/host/comm_stream.hpp"

#include <exception>

#include "base/event_state.hpp"
#include "base/library_thread.hpp"

namespace deep_ep::host {

class CommStream::Done final : public EventState {
 public:
  void stream_wait(Stream) override { host_wait(); }

  void host_wait() override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
    if (error_) std::rethrow_exception(error_);
  }

  bool query() override {
    const std::lock_guard lock(mutex_);
    return done_;
  }

  void finish(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    done_ = true;
    error_ = std::move(error);
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::exception_ptr error_;
};

CommStream::~CommStream() {
  drain();
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

EventHandle CommStream::enqueue(std::function<void()> work) {
  auto done = std::make_shared<Done>();
  {
    const std::lock_guard lock(mutex_);
    if (!thread_.joinable()) thread_ = start_library_thread([this] { serve(); });
    queue_.push_back({std::move(work), done});
  }
  changed_.notify_all();
  return EventHandle(std::move(done));
}

void CommStream::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
}

void CommStream::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Item item = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    std::exception_ptr error;
    try {
      item.work();
    } catch (...) {
      error = std::current_exception();
    }
    item.work = nullptr;  // what it held goes before its event says so
    item.done->finish(std::move(error));
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace deep_ep::host
