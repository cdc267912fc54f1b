#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <set>
#include <stdexcept>
#include <vector>

#include "baton_scheduler.hpp"
#include "protocol/host_waiter.hpp"
#include "protocol/wait.hpp"
#include "seeds.hpp"

namespace deep_ep::sim {
namespace {

using protocol::Point;
using protocol::schedule_point;

std::vector<std::function<void()>> same_for_all(int num_ranks, std::function<void(int)> body) {
  std::vector<std::function<void()>> ranks;
  for (int rank = 0; rank < num_ranks; ++rank) ranks.push_back([body, rank] { body(rank); });
  return ranks;
}

// Which rank took each of its steps when.
std::vector<int> order_of_steps(std::uint64_t seed) {
  std::vector<int> order;
  BatonScheduler scheduler(seed);
  scheduler.run(same_for_all(4, [&](int rank) {
    for (int step = 0; step < 50; ++step) {
      order.push_back(rank);
      schedule_point(Point::kCopy);
    }
  }));
  return order;
}

TEST(Scheduler, SameSeedSameOrderOtherSeedOtherOrder) {
  std::set<std::vector<int>> orders;
  for_each_seed(20, [&](std::uint64_t seed) {
    const std::vector<int> order = order_of_steps(seed);
    EXPECT_EQ(order, order_of_steps(seed));
    EXPECT_EQ(order.size(), 200u);
    EXPECT_TRUE(orders.insert(order).second) << "two seeds gave one order";
  });
}

TEST(Scheduler, StoppedRankGoesNoFurtherAndUnwindsLast) {
  for_each_seed(20, [](std::uint64_t seed) {
    constexpr int kStopped = 2;
    BatonScheduler scheduler(seed, {.stop_rank = kStopped, .stop_at_point = 10});
    std::vector<int> steps(4);
    std::vector<int> ended;
    struct AtEnd {
      std::vector<int>& ended;
      int rank;
      ~AtEnd() { ended.push_back(rank); }
    };
    scheduler.run(same_for_all(4, [&](int rank) {
      const AtEnd at_end{ended, rank};
      for (int step = 0; step < 30; ++step) {
        ++steps[rank];
        schedule_point(Point::kPublish);
      }
    }));
    EXPECT_EQ(steps, (std::vector<int>{30, 30, 10, 30}));
    ASSERT_EQ(ended.size(), 4u);
    EXPECT_EQ(ended.back(), kStopped);
    EXPECT_TRUE(scheduler.stopped(kStopped));
    EXPECT_FALSE(scheduler.stopped(0));
  });
}

TEST(Scheduler, HeldRankIsPassedByTheOthersForManyTurns) {
  int longest = 0;
  BatonScheduler scheduler(7, {.delay_per_mille = 20, .delay_turns_max = 400});
  std::vector<int> since(3);
  scheduler.run(same_for_all(3, [&](int rank) {
    for (int step = 0; step < 2000; ++step) {
      for (int& turns : since) longest = std::max(longest, ++turns);
      since[rank] = 0;
      schedule_point(Point::kCopy);
    }
  }));
  EXPECT_GT(longest, 200);
}

TEST(Scheduler, WaitsExpireInTurnsNotInTime) {
  BatonScheduler scheduler(1);
  protocol::Doorbell doorbell{};
  protocol::FaultRecord fault{};
  scheduler.run({[&] {
    protocol::HostWaiter waiter(doorbell, fault, std::chrono::milliseconds(5), true);
    EXPECT_EQ(protocol::wait_until(waiter, [] { return false; }), protocol::WaitResult::kExpired);
  }});
  EXPECT_GE(scheduler.turns() * BatonScheduler::kTurnNs, 5'000'000u);
}

TEST(Scheduler, ExceptionOfARankComesOut) {
  BatonScheduler scheduler(1);
  EXPECT_THROW(scheduler.run({[] { throw std::runtime_error("rank 0"); },
                              [] { schedule_point(Point::kWait); }}),
               std::runtime_error);
  EXPECT_EQ(protocol::scheduler, nullptr);
}

}  // namespace
}  // namespace deep_ep::sim
