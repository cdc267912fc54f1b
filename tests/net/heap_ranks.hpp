#pragma once

#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "../multi/in_ranks.hpp"
#include "fabric/symmetric_heap_factory.hpp"
#include "protocol/atomic.hpp"

namespace deep_ep::fabric {

using std::chrono::milliseconds;

/// Within this all ends that waits for a peer that is gone: by design within seconds, else never.
constexpr milliseconds kEnd{10000};

inline std::unique_ptr<SymmetricHeap> make_heap(Bootstrap& bootstrap, std::int64_t bytes,
                                                std::function<void()> on_signal = {}) {
  return make_symmetric_heap(
      bootstrap,
      {.bytes = bytes, .timeout = milliseconds(20000), .on_signal = std::move(on_signal)});
}

/// Waits until the word at `offset` of this rank's heap is at least `value`; pairs with the release
/// of the signal that set it.
inline std::uint64_t await_word(const SymmetricHeap& heap, std::int64_t offset, std::uint64_t value,
                                milliseconds timeout = milliseconds(30000)) {
  const auto* word = reinterpret_cast<const std::uint64_t*>(heap.base() + offset);
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    const std::uint64_t seen = protocol::load_acquire(word);
    if (seen >= value || std::chrono::steady_clock::now() > deadline) return seen;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

/// Waits until `rank` is lost.
inline bool await_loss(const SymmetricHeap& heap, int rank, milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (!heap.lost(rank)) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return true;
}

/// Processor time of all threads of this process so far.
inline double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace deep_ep::fabric
