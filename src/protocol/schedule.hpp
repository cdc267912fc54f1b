#pragma once

#include <cstdint>

#include "base/portable.hpp"

// Where a test's scheduler may take the processor away: before each publication, at each turn of a
// wait, and between the rows of a copy. Empty in device code; on the host one load of a null
// pointer.
namespace deep_ep::protocol {

enum class Point { kPublish, kWait, kCopy };

class Scheduler {
 public:
  virtual ~Scheduler() = default;
  /// Called by the thread that reached `point`; may block it, delay it, or throw to stop its rank.
  virtual void reach(Point point) = 0;
  /// What host waits take for the time, so that a run and its timeouts can be repeated.
  virtual std::int64_t now_ns() = 0;
};

/// Set while no rank runs; null outside tests. Host only.
inline Scheduler* scheduler = nullptr;

DEEP_EP_HD inline void schedule_point([[maybe_unused]] Point point) {
#if !defined(__CUDA_ARCH__)
  if (scheduler != nullptr) [[unlikely]]
    scheduler->reach(point);
#endif
}

}  // namespace deep_ep::protocol
