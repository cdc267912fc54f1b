#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace deep_ep::host {

/// The threads of one rank that move rows together. The caller of run() is thread 0, so one thread
/// costs nothing.
class ThreadPool {
 public:
  /// Throws Error(kOutOfMemory) if the system has no more threads.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  /// Runs work(0) .. work(count - 1), each on its own thread, and returns when all are done; count
  /// <= size(). Rethrows the first exception. Everything the threads wrote is visible to the caller
  /// then.
  void run(int count, const std::function<void(int)>& work);

 private:
  void serve(int index);
  void stop();

  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::uint64_t round_ = 0;
  int count_ = 0;
  int running_ = 0;
  std::exception_ptr error_;
  bool stop_ = false;
};

}  // namespace deep_ep::host
