#pragma once

#include <cstdint>

#include "protocol/atomic.hpp"
#include "protocol/schedule.hpp"

namespace deep_ep::protocol {

/// A flag that only grows (I1), alone in its cache line: written by one rank, read by one rank.
/// There is no reset, so there is no reset to race with. 64 bits never wrap: at 1e9 publications a
/// second they last 584 years.
struct alignas(128) EpochFlag {
  std::uint64_t value;

  /// Everything the publishing thread wrote (and read) before is visible to whoever then sees
  /// reached(epoch).
  DEEP_EP_HD void publish(std::uint64_t epoch) {
    schedule_point(Point::kPublish);
#if defined(DEEP_EP_CANARY_RELAXED)
    // Wrong on purpose: the test that the race detector would notice.
    store_relaxed(&value, epoch);
#else
    store_release(&value, epoch);
#endif
  }
  /// acquire: pairs with publish().
  DEEP_EP_HD bool reached(std::uint64_t epoch) const { return load_acquire(&value) >= epoch; }
  DEEP_EP_HD std::uint64_t seen() const { return load_relaxed(&value); }
};

}  // namespace deep_ep::protocol
