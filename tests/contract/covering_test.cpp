#include "contract/covering.hpp"

#include <gtest/gtest.h>

#include <set>
#include <tuple>

namespace deep_ep::test {
namespace {

TEST(Covering, EveryPairOfLevelsOccurs) {
  const std::vector<int> levels{6, 7, 5, 2, 1, 9, 3};
  std::set<std::tuple<std::size_t, int, std::size_t, int>> seen;
  for (const std::vector<int>& row : pairwise_rows(levels, 3)) {
    ASSERT_EQ(row.size(), levels.size());
    for (std::size_t f = 0; f < levels.size(); ++f) {
      ASSERT_GE(row[f], 0);
      ASSERT_LT(row[f], levels[f]);
      for (std::size_t g = f + 1; g < levels.size(); ++g) seen.insert({f, row[f], g, row[g]});
    }
  }
  std::size_t pairs = 0;
  for (std::size_t f = 0; f < levels.size(); ++f) {
    for (std::size_t g = f + 1; g < levels.size(); ++g)
      pairs += static_cast<std::size_t>(levels[f] * levels[g]);
  }
  EXPECT_EQ(seen.size(), pairs);
}

TEST(Covering, TakesFarFewerRowsThanAllCombinations) {
  const std::vector<int> levels{6, 7, 5, 4, 6, 5, 3, 5, 3, 9, 3, 5, 3, 3, 4, 4, 3, 3};
  const std::size_t rows = pairwise_rows(levels, 1).size();
  EXPECT_GE(rows, 63U);  // the two largest factors alone
  EXPECT_LE(rows, 110U);
}

TEST(Covering, TheSameSeedGivesTheSameRows) {
  const std::vector<int> levels{4, 4, 3, 2};
  EXPECT_EQ(pairwise_rows(levels, 7), pairwise_rows(levels, 7));
}

}  // namespace
}  // namespace deep_ep::test
