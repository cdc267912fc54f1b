#include "api/row_forecast.hpp"

#include <gtest/gtest.h>

#include <random>

namespace deep_ep {
namespace {

constexpr int kRanks = 8;

TEST(RowForecast, KnowsNothingAtFirstAndWithoutTokens) {
  RowForecast forecast;
  EXPECT_EQ(forecast.room(4096, kRanks), 0);
  forecast.learn(0, 100);
  EXPECT_EQ(forecast.room(4096, kRanks), 0);
  forecast.learn(4096, 8170);
  EXPECT_EQ(forecast.room(0, kRanks), 0);
}

TEST(RowForecast, HasRoomForTheSameAgainAndLittleMore) {
  RowForecast forecast;
  forecast.learn(4096, 8170);
  EXPECT_GE(forecast.room(4096, kRanks), 8170);
  EXPECT_LE(forecast.room(4096, kRanks), 8170 * 1.04 + 64);
  EXPECT_GE(forecast.room(128, kRanks), 256);
}

TEST(RowForecast, HasRoomForTokensThatChooseAtRandom) {
  std::mt19937_64 random(3);
  for (const std::int64_t tokens : {1, 16, 128, 4096, 65536}) {
    // Seven other ranks, whose tokens come with probability 0.66 each, 200 times.
    std::binomial_distribution<std::int64_t> rows(8 * tokens, 0.66);
    RowForecast forecast;
    forecast.learn(tokens, rows(random));
    for (int i = 0; i < 200; ++i) {
      const std::int64_t come = rows(random);
      EXPECT_LE(come, forecast.room(tokens, kRanks)) << tokens;
      forecast.learn(tokens, come);
    }
  }
}

TEST(RowForecast, RemembersTheMostOfLayersThatTakeTurnsAndForgetsIt) {
  RowForecast forecast;
  for (int i = 0; i < 4; ++i) {
    forecast.learn(1000, 3000);
    EXPECT_GE(forecast.room(1000, kRanks), 3000);
    forecast.learn(1000, 2800);
    EXPECT_GE(forecast.room(1000, kRanks), 2900);
  }
  for (int i = 0; i < 10; ++i) forecast.learn(1000, 100);
  EXPECT_LT(forecast.room(1000, kRanks), 200);
  forecast.learn(1000, 0);
  EXPECT_LT(forecast.room(1000, kRanks), 150);
}

TEST(RowForecast, KnowsLittleOfFewTokensBesideManyOfOtherRanks) {
  RowForecast forecast;
  forecast.learn(1, 18900);  // the others had 4096
  EXPECT_GE(forecast.room(1, 8), 18900);
  EXPECT_GE(forecast.room(4096, 8), 18900);
  EXPECT_LE(forecast.room(4096, 8), 8 * 4096 * 1.04 + 64);
  EXPECT_LE(forecast.room(64, 8), 18900 * 1.04 + 64);
  for (int i = 0; i < 10; ++i) forecast.learn(64, 300);
  EXPECT_LE(forecast.room(64, 8), 64 * 8 * 1.04 + 64);
}

}  // namespace
}  // namespace deep_ep
