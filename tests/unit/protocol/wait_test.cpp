#include "protocol/wait.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "protocol/epoch.hpp"
#include "protocol/host_waiter.hpp"

namespace deep_ep::protocol {
namespace {

using std::chrono::milliseconds;

struct CountingWaiter {
  int turns_to_expiry = 1000;
  bool fault = false;
  int begun = 0;
  int paused = 0;

  void begin() { ++begun; }
  bool faulted() const { return fault; }
  bool expired() { return paused >= turns_to_expiry; }
  template <class Ready>
  bool pause(Ready&&) {
    ++paused;
    return false;
  }
};

TEST(Wait, ReadyAtOnceNeverAsksTheWaiter) {
  CountingWaiter waiter{.turns_to_expiry = 0, .fault = true};
  EXPECT_EQ(wait_until(waiter, [] { return true; }), WaitResult::kReady);
  EXPECT_EQ(waiter.begun, 0);
}

TEST(Wait, LooksOnceMoreAfterExpiry) {
  CountingWaiter waiter{.turns_to_expiry = 3};
  int looks = 0;
  // One look before, one behind each of three pauses, and the one behind the expiry finds it.
  EXPECT_EQ(wait_until(waiter, [&] { return ++looks == 5; }), WaitResult::kReady);
  EXPECT_EQ(looks, 5);
  EXPECT_EQ(waiter.begun, 1);
}

TEST(Wait, ExpiresWhenTheLastLookFails) {
  CountingWaiter waiter{.turns_to_expiry = 3};
  int looks = 0;
  EXPECT_EQ(wait_until(waiter, [&] { return ++looks > 5; }), WaitResult::kExpired);
  EXPECT_EQ(looks, 5);
}

TEST(Wait, FaultEndsItInTheSameTurn) {
  CountingWaiter waiter{.fault = true};
  EXPECT_EQ(wait_until(waiter, [] { return false; }), WaitResult::kFaulted);
  EXPECT_EQ(waiter.paused, 0);
}

struct Place {
  Doorbell doorbell{};
  FaultRecord fault{};
  HostWaiter waiter(milliseconds timeout, bool crowded = false) {
    return HostWaiter(doorbell, fault, timeout, crowded);
  }
};

TEST(HostWaiter, ExpiresAfterItsTimeoutAndGivesEachWaitTheWhole) {
  Place place;
  HostWaiter waiter = place.waiter(milliseconds(60));
  for (int wait = 0; wait < 2; ++wait) {
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_EQ(wait_until(waiter, [] { return false; }), WaitResult::kExpired);
    EXPECT_GE(std::chrono::steady_clock::now() - begin, milliseconds(60));
    EXPECT_GE(waiter.waited(), milliseconds(60));
  }
}

TEST(HostWaiter, PublishedFaultEndsALongWait) {
  for (const bool crowded : {false, true}) {
    Place place;
    std::thread peer([&] {
      std::this_thread::sleep_for(milliseconds(5));
      ASSERT_TRUE(place.fault.claim());
      place.fault.origin = 2;
      place.fault.publish();
      place.doorbell.ring();
    });
    HostWaiter waiter = place.waiter(std::chrono::minutes(10), crowded);
    EXPECT_EQ(wait_until(waiter, [] { return false; }), WaitResult::kFaulted);
    EXPECT_EQ(place.fault.origin, 2);
    peer.join();
  }
}

TEST(HostWaiter, AClaimThatIsNeverPublishedEndsALongWait) {
  Place place;
  ASSERT_TRUE(place.fault.claim());
  HostWaiter waiter = place.waiter(std::chrono::minutes(10));
  EXPECT_EQ(wait_until(waiter, [] { return false; }), WaitResult::kExpired);
  EXPECT_GE(waiter.waited(), std::chrono::nanoseconds(HostWaiter::kClaimGraceNs));
}

TEST(HostWaiter, SeesAFlagForWhichNobodyRang) {
  Place place;
  EpochFlag flag{};
  std::thread peer([&] {
    std::this_thread::sleep_for(milliseconds(5));
    flag.publish(1);
  });
  HostWaiter waiter = place.waiter(std::chrono::minutes(10));
  EXPECT_EQ(wait_until(waiter, [&] { return flag.reached(1); }), WaitResult::kReady);
  peer.join();
}

TEST(HostWaiter, AThrowingConditionLeavesNoSleeperBehind) {
  Place place;
  HostWaiter waiter = place.waiter(std::chrono::minutes(10), true);
  const auto throw_when_asleep = [&]() -> bool {
    if (load_relaxed(&place.doorbell.sleepers) != 0) throw std::runtime_error("stop");
    return false;
  };
  EXPECT_THROW(wait_until(waiter, throw_when_asleep), std::runtime_error);
  EXPECT_EQ(place.doorbell.sleepers, 0u);
}

}  // namespace
}  // namespace deep_ep::protocol
