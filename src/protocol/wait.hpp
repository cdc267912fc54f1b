#pragma once

#include "protocol/schedule.hpp"

namespace deep_ep::protocol {

enum class WaitResult { kReady, kFaulted, kExpired };

/// The one wait. `ready()` may do work; it is called until it returns true, the waiter sees a
/// fault, or its deadline passes, and once more after that, since a rank may have slept through its
/// own deadline while the others went on.
///
/// A Waiter has begin(), which starts its timeout, faulted(), expired() and pause(ready); pause
/// returns early when ready() became true (and says so), or when somebody rang.
template <class Waiter, class Ready>
DEEP_EP_HD WaitResult wait_until(Waiter& waiter, Ready&& ready) {
  if (ready()) return WaitResult::kReady;
  waiter.begin();
  do {
    schedule_point(Point::kWait);
    if (waiter.faulted()) return WaitResult::kFaulted;
    if (waiter.expired()) return ready() ? WaitResult::kReady : WaitResult::kExpired;
    if (waiter.pause(ready)) return WaitResult::kReady;
  } while (!ready());
  return WaitResult::kReady;
}

}  // namespace deep_ep::protocol
