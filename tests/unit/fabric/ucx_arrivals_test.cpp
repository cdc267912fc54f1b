#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "fabric/ucx/arrivals.hpp"

namespace deep_ep::fabric::ucx {
namespace {

TEST(Watermark, StandsBelowTheFirstNumberThatIsMissing) {
  Watermark mark;
  EXPECT_EQ(mark.next(), 0u);
  mark.add(0);
  EXPECT_EQ(mark.next(), 1u);
  mark.add(3);
  mark.add(2);
  EXPECT_EQ(mark.next(), 1u);
  mark.add(1);
  EXPECT_EQ(mark.next(), 4u);
}

/// The values of the words in the order in which they were set, when messages come as `order` says;
/// the value of a signal is its number.
std::vector<std::uint64_t> set_by(const std::vector<std::uint64_t>& order,
                                  const std::vector<bool>& signals) {
  Arrivals arrivals;
  std::vector<bool> come(order.size());
  std::vector<std::uint64_t> values;
  const auto set = [&](const Word& word) {
    // All messages before the signal are there, the one that is arriving included.
    for (std::uint64_t i = 0; i < word.value; ++i) EXPECT_TRUE(come[i]) << i << " " << word.value;
    values.push_back(word.value);
  };
  for (const std::uint64_t number : order) {
    come[number] = true;
    if (signals[number]) {
      arrivals.signal(number, {8 * number, number}, set);
    } else {
      arrivals.put(number, set);
    }
  }
  return values;
}

TEST(Arrivals, SignalsThatComeInOrderAreSetAtOnce) {
  Arrivals arrivals;
  std::vector<std::uint64_t> values;
  const auto set = [&](const Word& word) { values.push_back(word.value); };
  arrivals.signal(0, {0, 7}, set);
  EXPECT_THAT(values, ::testing::ElementsAre(7));
  arrivals.put(1, set);
  arrivals.signal(2, {0, 8}, set);
  EXPECT_THAT(values, ::testing::ElementsAre(7, 8));
}

TEST(Arrivals, ASignalWaitsForThePutsBeforeItAndOnlyForThose) {
  Arrivals arrivals;
  std::vector<std::uint64_t> values;
  const auto set = [&](const Word& word) { values.push_back(word.value); };
  arrivals.signal(1, {0, 7}, set);
  arrivals.signal(3, {0, 8}, set);
  EXPECT_THAT(values, ::testing::IsEmpty());
  arrivals.put(0, set);
  EXPECT_THAT(values, ::testing::ElementsAre(7));
  arrivals.put(2, set);
  EXPECT_THAT(values, ::testing::ElementsAre(7, 8));
}

TEST(Arrivals, InAnyOrderOfMessagesSignalsAreSetInTheirsBehindAllBeforeThem) {
  std::mt19937 random(1);
  for (int turn = 0; turn < 2000; ++turn) {
    std::vector<std::uint64_t> order(1 + random() % 12);
    std::vector<bool> signals(order.size());
    std::vector<std::uint64_t> expected;
    for (std::size_t i = 0; i < order.size(); ++i) {
      order[i] = i;
      signals[i] = random() % 2 == 0;
      if (signals[i]) expected.push_back(i);
    }
    std::shuffle(order.begin(), order.end(), random);
    ASSERT_EQ(set_by(order, signals), expected) << "turn " << turn;
  }
}

}  // namespace
}  // namespace deep_ep::fabric::ucx
