#include "protocol/barrier.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "baton_scheduler.hpp"
#include "protocol/host_waiter.hpp"
#include "seeds.hpp"

namespace deep_ep::sim {
namespace {

using namespace protocol;

constexpr std::chrono::milliseconds kTimeout(20);  // 20,000 turns

// Barriers, ranks that stop, and ranks that refuse.

struct BarrierWorld {
  explicit BarrierWorld(int num_ranks)
      : ranks(num_ranks), doorbell(ranks), fault(ranks), arrived(ranks * ranks), entered(ranks) {}

  WaitResult pass(int me, std::uint64_t epoch) {
    HostWaiter waiter(doorbell[me], fault[me], kTimeout, true);
    entered[me] = epoch;
    return barrier(
        waiter, ranks, epoch, [&](int i) { return &arrived[i * ranks + me]; }, &arrived[me * ranks],
        [&](int i) { doorbell[i].ring(); });
  }
  std::vector<int> missing(int me, std::uint64_t epoch) const {
    std::vector<int> missing;
    for (int i = 0; i < ranks; ++i) {
      if (!arrived[me * ranks + i].reached(epoch)) missing.push_back(i);
    }
    return missing;
  }
  // What a rank does that refuses a call: its reason goes to everybody.
  void refuse(int me) {
    for (int peer = 0; peer < ranks; ++peer) {
      if (!fault[peer].claim()) continue;
      schedule_point(Point::kCopy);
      fault[peer].origin = me;
      const std::string text = text_of(me);
      std::snprintf(fault[peer].text, sizeof(fault[peer].text), "%s", text.c_str());
      schedule_point(Point::kCopy);
      fault[peer].publish();
      doorbell[peer].ring();
    }
  }
  static std::string text_of(int rank) { return "refused by rank " + std::to_string(rank); }

  int ranks;
  std::vector<Doorbell> doorbell;
  std::vector<FaultRecord> fault;
  std::vector<EpochFlag> arrived;
  std::vector<std::uint64_t> entered;
};

TEST(Barrier, NobodyLeavesBeforeAllHaveEntered) {
  for_each_seed(200, [](std::uint64_t seed) {
    BarrierWorld world(1 + static_cast<int>(seed % 8));
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < world.ranks; ++rank) {
      ranks.push_back([&world, rank] {
        for (std::uint64_t epoch = 1; epoch <= 15; ++epoch) {
          ASSERT_EQ(world.pass(rank, epoch), WaitResult::kReady);
          for (const std::uint64_t entered : world.entered) {
            EXPECT_GE(entered, epoch);
            EXPECT_LE(entered, epoch + 1);
          }
        }
      });
    }
    BatonScheduler scheduler(seed);
    scheduler.run(ranks);
  });
}

TEST(Barrier, OthersExpireAndSeeWhoStopped) {
  for_each_seed(30, [](std::uint64_t seed) {
    BarrierWorld world(2 + static_cast<int>(seed % 5));
    const int stopped = static_cast<int>(seed * 7 % world.ranks);
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < world.ranks; ++rank) {
      ranks.push_back([&world, rank, stopped] {
        for (std::uint64_t epoch = 1;; ++epoch) {
          const WaitResult result = world.pass(rank, epoch);
          if (result == WaitResult::kReady) continue;
          EXPECT_EQ(result, WaitResult::kExpired);
          // One that got the last flags of the stopped rank may have waited for one that did not.
          const std::vector<int> missing = world.missing(rank, epoch);
          EXPECT_FALSE(missing.empty());
          EXPECT_TRUE(missing.front() == stopped || world.entered[missing.front()] < epoch);
          return;
        }
      });
    }
    BatonScheduler scheduler(
        seed, {.stop_rank = stopped, .stop_at_point = 5 + static_cast<int>(seed * 13 % 60)});
    scheduler.run(ranks);
    EXPECT_TRUE(scheduler.stopped(stopped));
  });
}

TEST(Fault, ReasonOfARefusalReachesAllWhole) {
  for_each_seed(200, [](std::uint64_t seed) {
    BarrierWorld world(2 + static_cast<int>(seed % 5));
    // Two ranks refuse at the same epoch, when there are enough.
    const std::uint64_t refused = 1 + seed % 4;
    std::vector<std::function<void()>> ranks;
    for (int rank = 0; rank < world.ranks; ++rank) {
      ranks.push_back([&world, rank, refused] {
        // A rank may still be in the barrier before when the refusal reaches it.
        WaitResult result = WaitResult::kReady;
        for (std::uint64_t epoch = 1; epoch <= refused && result == WaitResult::kReady; ++epoch) {
          if (rank % 3 == 1 && epoch == refused) return world.refuse(rank);
          result = world.pass(rank, epoch);
        }
        EXPECT_EQ(result, WaitResult::kFaulted);
        EXPECT_EQ(world.fault[rank].origin % 3, 1);
        EXPECT_EQ(world.fault[rank].text, BarrierWorld::text_of(world.fault[rank].origin));
      });
    }
    BatonScheduler scheduler(seed);
    scheduler.run(ranks);
  });
}

}  // namespace
}  // namespace deep_ep::sim
