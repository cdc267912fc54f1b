#include "protocol/epoch.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <thread>

namespace deep_ep::protocol {
namespace {

TEST(Epoch, ZeroedFlagHasReachedNoEpoch) {
  EpochFlag flag{};
  EXPECT_TRUE(flag.reached(0));
  EXPECT_FALSE(flag.reached(1));
}

TEST(Epoch, LaterEpochImpliesEarlierOnes) {
  EpochFlag flag{};
  flag.publish(7);
  EXPECT_TRUE(flag.reached(6));
  EXPECT_TRUE(flag.reached(7));
  EXPECT_FALSE(flag.reached(8));
  EXPECT_EQ(flag.seen(), 7u);
}

TEST(Epoch, ComparesAsUnsignedUpToTheLastEpoch) {
  constexpr std::uint64_t kLast = std::numeric_limits<std::uint64_t>::max();
  EpochFlag flag{};
  flag.publish(std::uint64_t{1} << 63);
  EXPECT_TRUE(flag.reached(1));
  EXPECT_FALSE(flag.reached(kLast));
  flag.publish(kLast);
  EXPECT_TRUE(flag.reached(kLast));
}

TEST(Epoch, FlagsNeverShareACacheLine) {
  EpochFlag flags[2];
  EXPECT_EQ(reinterpret_cast<char*>(&flags[1].value) - reinterpret_cast<char*>(&flags[0].value),
            128);
}

// Two flags pass a plain value back and forth; a race detector sees it too.
TEST(Epoch, WhatWasWrittenBeforePublishIsReadAfterReached) {
  constexpr std::uint64_t kRounds = 20'000;
  EpochFlag filled{}, drained{};
  std::uint64_t payload[32] = {};
  std::thread writer([&] {
    for (std::uint64_t epoch = 1; epoch <= kRounds; ++epoch) {
      while (!drained.reached(epoch - 1)) std::this_thread::yield();
      for (std::uint64_t& word : payload) word = epoch;
      filled.publish(epoch);
    }
  });
  std::uint64_t wrong = 0;
  for (std::uint64_t epoch = 1; epoch <= kRounds; ++epoch) {
    while (!filled.reached(epoch)) std::this_thread::yield();
    for (const std::uint64_t word : payload) wrong += word != epoch;
    drained.publish(epoch);
  }
  writer.join();
  EXPECT_EQ(wrong, 0u);
}

}  // namespace
}  // namespace deep_ep::protocol
