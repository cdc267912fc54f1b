#include "stats.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>

namespace deep_ep::cli {
namespace {

TEST(Stats, MedianOfAnOddCountIsTheMiddleValue) { EXPECT_EQ(summarize({5, 1, 9}).median, 5); }

TEST(Stats, MedianOfAnEvenCountIsTheMeanOfTheMiddleTwo) {
  EXPECT_EQ(summarize({8, 1, 2, 4}).median, 3);
}

TEST(Stats, P99IsTheSmallestValueThat99PercentDoNotExceed) {
  std::vector<double> values(200);
  std::iota(values.rbegin(), values.rend(), 1.0);
  EXPECT_EQ(summarize(values).p99, 198);
  EXPECT_EQ(summarize({1, 2, 3}).p99, 3) << "fewer than 100 values: the largest";
}

TEST(Stats, MinAndMaxAreTheExtremes) {
  const Summary summary = summarize({4, 2, 16, 8});
  EXPECT_EQ(summary.min, 2);
  EXPECT_EQ(summary.max, 16);
}

TEST(Stats, NothingSummarizesToZero) { EXPECT_EQ(summarize({}).median, 0); }

TEST(Stats, SlowestTakesEachIterationsLargestTime) {
  EXPECT_EQ(slowest({{1, 5, 2}, {4, 1, 3}}), (std::vector<double>{4, 5, 3}));
}

TEST(Stats, SlowestRefusesRanksWithFewerIterations) {
  EXPECT_THROW(slowest({{1, 2}, {1}}), std::out_of_range);
}

}  // namespace
}  // namespace deep_ep::cli
