#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "protocol/doorbell.hpp"
#include "protocol/fault.hpp"
#include "protocol/schedule.hpp"

namespace deep_ep::protocol {

/// Tells the core that this is a spin loop. Other architectures do without: it is only kinder.
inline void relax_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

/// The Waiter of a host thread: spins, then offers its core to others, then sleeps on its rank's
/// doorbell. One object serves any number of waits, one at a time, each with the whole timeout.
/// Under a test's scheduler time is the scheduler's and nothing sleeps.
class HostWaiter {
 public:
  // One barrier of processes on two cores (virtual AMD EPYC), medians. Two ranks: 0.1 us spinning,
  // 0.6 us yielding, 8 us sleeping. Four / eight ranks: 3 / 7 us yielding, 25 / 40 us sleeping;
  // spinning before the yield only adds its own length.
  static constexpr std::int64_t kSpinNs = 2'000;
  // A wake-up costs the sleeper 7 us and the ringer a system call; seven times that is where
  // waiting on without sleep stops to pay for work that others could do on this core.
  static constexpr std::int64_t kYieldNs = 50'000;
  // A condition that nobody rings for is seen this late at most.
  static constexpr std::int64_t kSleepNs = 50'000'000;
  // Whoever claims a fault record publishes it some microseconds later, or has died in between:
  // then the wait ends as if its deadline had passed, and its caller names the missing ranks.
  static constexpr std::int64_t kClaimGraceNs = 1'000'000'000;

  /// `crowded`: more ranks than cores, so that spinning keeps the awaited rank from running.
  HostWaiter(Doorbell& own, const FaultRecord& own_fault, std::chrono::nanoseconds timeout,
             bool crowded)
      : doorbell_(own), fault_(own_fault), timeout_(timeout.count()), crowded_(crowded) {}

  void begin() {
    now_ = begin_ = now();
    deadline_ = begin_ + timeout_;
    claim_seen_ = false;
  }

  /// True once the record's fields may be read.
  bool faulted() const { return fault_.load() == FaultRecord::kWritten; }

  bool expired() {
    now_ = now();
    if (!claim_seen_ && fault_.load() == FaultRecord::kClaimed) {
      claim_seen_ = true;
      deadline_ = std::min(deadline_, now_ + kClaimGraceNs);
    }
    return now_ >= deadline_;
  }

  template <class Ready>
  bool pause(Ready&& ready) {
    if (scheduler != nullptr) return false;
    const std::int64_t waited = now_ - begin_;
    if (waited < kSpinNs && !crowded_) return spin(ready);
    if (waited < kYieldNs) {
      sched_yield();
      return false;
    }
    return doorbell_.sleep(std::min(kSleepNs, deadline_ - now_), ready);
  }

  /// How long the present wait has lasted, as of its last turn.
  std::chrono::nanoseconds waited() const { return std::chrono::nanoseconds(now_ - begin_); }

  /// In ns: the scheduler's, if there is one.
  static std::int64_t now() {
    if (scheduler != nullptr) [[unlikely]]
      return scheduler->now_ns();
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
  }

 private:
  // Several looks for each reading of the clock, which costs as much as some of them.
  template <class Ready>
  static bool spin(Ready&& ready) {
    for (int look = 0; look < 8; ++look) {
      relax_cpu();
      if (ready()) return true;
    }
    return false;
  }

  Doorbell& doorbell_;
  const FaultRecord& fault_;
  std::int64_t timeout_;
  bool crowded_;
  std::int64_t begin_ = 0;
  std::int64_t now_ = 0;
  std::int64_t deadline_ = 0;
  bool claim_seen_ = false;
};

}  // namespace deep_ep::protocol
