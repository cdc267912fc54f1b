#include "protocol/fault.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

namespace deep_ep::protocol {
namespace {

TEST(Fault, FirstWriterWins) {
  FaultRecord record{};
  ASSERT_TRUE(record.claim());
  EXPECT_EQ(record.load(), FaultRecord::kClaimed);
  EXPECT_FALSE(record.claim());
  record.origin = 3;
  record.publish();
  EXPECT_FALSE(record.claim());
  EXPECT_EQ(record.load(), FaultRecord::kWritten);
  EXPECT_EQ(record.origin, 3);
}

TEST(Fault, ManyWritersLeaveOneWholeRecord) {
  constexpr int kWriters = 4;
  for (int round = 0; round < 200; ++round) {
    FaultRecord record{};
    std::atomic<int> winners = 0;
    std::vector<std::thread> writers;
    for (int rank = 0; rank < kWriters; ++rank) {
      writers.emplace_back([&, rank] {
        if (!record.claim()) return;
        ++winners;
        record.origin = rank;
        record.num_ranks = 1;
        record.ranks[0] = rank;
        std::snprintf(record.text, sizeof(record.text), "rank %d", rank);
        record.publish();
      });
    }
    while (record.load() != FaultRecord::kWritten) std::this_thread::yield();
    const std::string expected = "rank " + std::to_string(record.origin);
    EXPECT_EQ(record.text, expected);
    EXPECT_EQ(record.ranks[0], record.origin);
    for (std::thread& writer : writers) writer.join();
    EXPECT_EQ(winners, 1);
    EXPECT_EQ(record.text, expected);
  }
}

}  // namespace
}  // namespace deep_ep::protocol
