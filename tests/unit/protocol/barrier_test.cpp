#include "protocol/barrier.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "protocol/host_waiter.hpp"

namespace deep_ep::protocol {
namespace {

constexpr int kRanks = 8;

struct World {
  Doorbell doorbell[kRanks];
  FaultRecord fault[kRanks];
  EpochFlag arrived[kRanks][kRanks];  // [at][from]
  std::uint64_t work[kRanks];         // plain: only the barrier orders it

  WaitResult barrier_of(int rank, std::uint64_t epoch, std::chrono::milliseconds timeout) {
    HostWaiter waiter(doorbell[rank], fault[rank], timeout, true);
    return barrier(
        waiter, kRanks, epoch, [&](int i) { return &arrived[i][rank]; }, arrived[rank],
        [&](int i) { doorbell[i].ring(); });
  }
};

// Eight ranks, usually on fewer cores. Two barriers an epoch: one behind the writes, one behind the
// reads.
TEST(Barrier, WorkBeforeItIsVisibleBehindItToAll) {
  constexpr std::uint64_t kEpochs = 400;
  const auto world = std::make_unique<World>();
  std::vector<int> wrong(kRanks);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.emplace_back([&, rank] {
      for (std::uint64_t epoch = 1; epoch <= 2 * kEpochs; epoch += 2) {
        world->work[rank] = epoch * (rank + 1);
        wrong[rank] +=
            world->barrier_of(rank, epoch, std::chrono::minutes(1)) != WaitResult::kReady;
        for (int i = 0; i < kRanks; ++i) wrong[rank] += world->work[i] != epoch * (i + 1);
        wrong[rank] +=
            world->barrier_of(rank, epoch + 1, std::chrono::minutes(1)) != WaitResult::kReady;
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_EQ(wrong, std::vector<int>(kRanks));
}

TEST(Barrier, ExpiresWhileARankIsMissing) {
  const auto world = std::make_unique<World>();
  for (int rank = 1; rank < kRanks; ++rank) {
    EXPECT_EQ(world->barrier_of(rank, 1, std::chrono::milliseconds(rank == 7 ? 20 : 0)),
              WaitResult::kExpired);
  }
  EXPECT_FALSE(world->arrived[7][0].reached(1));
  EXPECT_TRUE(world->arrived[7][1].reached(1));
  EXPECT_EQ(world->barrier_of(0, 1, std::chrono::milliseconds(0)), WaitResult::kReady);
}

}  // namespace
}  // namespace deep_ep::protocol
