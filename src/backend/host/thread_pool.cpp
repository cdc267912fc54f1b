#include "backend/host/thread_pool.hpp"

#include "base/error.hpp"
#include "base/library_thread.hpp"

namespace deep_ep::host {

ThreadPool::ThreadPool(int num_threads) {
  threads_.reserve(num_threads);
  try {
    for (int i = 1; i < num_threads; ++i)
      threads_.push_back(start_library_thread([this, i] { serve(i); }));
  } catch (const Error& error) {
    const std::size_t started = threads_.size();
    stop();
    throw Error(error.code(), fmt::format("num_threads is {}, {} run: {}", num_threads, started + 1,
                                          error.what()));
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int count, const std::function<void(int)>& work) {
  if (count <= 1) return work(0);
  {
    const std::lock_guard lock(mutex_);
    work_ = &work;
    count_ = count;
    running_ = count - 1;
    error_ = nullptr;
    ++round_;
  }
  start_.notify_all();
  std::exception_ptr own_error;
  try {
    work(0);
  } catch (...) {
    own_error = std::current_exception();
  }
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return running_ == 0; });
  if (own_error) std::rethrow_exception(own_error);
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::serve(int index) {
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    start_.wait(lock, [&] { return stop_ || (round_ != seen && index < count_); });
    if (stop_) return;
    seen = round_;
    lock.unlock();
    std::exception_ptr error;
    try {
      (*work_)(index);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error && !error_) error_ = error;
    if (--running_ == 0) done_.notify_all();
  }
}

}  // namespace deep_ep::host
