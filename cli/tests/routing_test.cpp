#include "verify/routing.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "deep_ep/error.hpp"

namespace deep_ep::verify {
namespace {

RoutingSpec make_spec(Routing routing) {
  RoutingSpec spec;
  spec.routing = routing;
  spec.tokens = 500;
  spec.topk = 6;
  spec.experts = 32;
  spec.ranks = 4;
  spec.rank = 1;
  spec.seed = 7;
  return spec;
}

std::set<std::int64_t> ranks_of(const RoutingSpec& spec, const std::int64_t* token) {
  std::set<std::int64_t> ranks;
  for (int k = 0; k < spec.topk; ++k)
    if (token[k] >= 0) ranks.insert(token[k] / (spec.experts / spec.ranks));
  return ranks;
}

template <class Check>
void for_each_token(const RoutingSpec& spec, const Check& check) {
  const auto ids = make_routing(spec);
  ASSERT_EQ(ids.size(), static_cast<std::size_t>(spec.tokens * spec.topk));
  for (std::int64_t token = 0; token < spec.tokens; ++token) check(ids.data() + token * spec.topk);
}

bool is_distinct(const RoutingSpec& spec, const std::int64_t* token) {
  return std::set<std::int64_t>(token, token + spec.topk).size() ==
         static_cast<std::size_t>(spec.topk);
}

class EveryRouting : public testing::TestWithParam<Routing> {};

TEST_P(EveryRouting, IdsLieBetweenMinusOneAndTheNumberOfExperts) {
  for_each_token(make_spec(GetParam()), [](const std::int64_t* token) {
    for (int k = 0; k < 6; ++k) ASSERT_TRUE(token[k] >= -1 && token[k] < 32) << token[k];
  });
}

TEST_P(EveryRouting, FollowsFromSeedAndRankAlone) {
  const RoutingSpec spec = make_spec(GetParam());
  EXPECT_EQ(make_routing(spec), make_routing(spec));
}

TEST_P(EveryRouting, HasANameThatIsReadBack) {
  EXPECT_EQ(routing_from(to_string(GetParam())), GetParam());
}

INSTANTIATE_TEST_SUITE_P(Routing, EveryRouting,
                         testing::Values(Routing::kUniform, Routing::kZipf, Routing::kGrouped,
                                         Routing::kAllToAll, Routing::kToRankZero, Routing::kToSelf,
                                         Routing::kNone, Routing::kHoles, Routing::kDuplicates));

TEST(Routing, SeedsAndRanksGiveDifferentTables) {
  RoutingSpec spec = make_spec(Routing::kUniform);
  const auto first = make_routing(spec);
  spec.rank = 2;
  EXPECT_NE(make_routing(spec), first);
  spec = make_spec(Routing::kUniform);
  spec.seed = 8;
  EXPECT_NE(make_routing(spec), first);
}

TEST(Routing, UniformDrawsDistinctExpertsEvenly) {
  RoutingSpec spec = make_spec(Routing::kUniform);
  spec.tokens = 8000;
  std::vector<int> counts(32, 0);
  for_each_token(spec, [&](const std::int64_t* token) {
    ASSERT_TRUE(is_distinct(spec, token));
    for (int k = 0; k < spec.topk; ++k) ++counts[static_cast<std::size_t>(token[k])];
  });
  // 1500 expected with a deviation of 35.
  EXPECT_GT(*std::min_element(counts.begin(), counts.end()), 1300);
  EXPECT_LT(*std::max_element(counts.begin(), counts.end()), 1700);
}

TEST(Routing, ZipfIsHotterTowardsTheFirstExpertTheMoreSkewItHas) {
  RoutingSpec spec = make_spec(Routing::kZipf);
  spec.topk = 2;
  const auto share_of_first = [&] {
    const auto ids = make_routing(spec);
    return std::count(ids.begin(), ids.end(), 0);
  };
  const auto mild = share_of_first();
  EXPECT_GT(mild, 500 * 2 / 32 * 3);
  spec.skew = 3;
  EXPECT_GT(share_of_first(), mild);
  for_each_token(spec, [&](const std::int64_t* token) { ASSERT_TRUE(is_distinct(spec, token)); });
}

TEST(Routing, GroupedTokensGoToAtMostTwoRanks) {
  const RoutingSpec spec = make_spec(Routing::kGrouped);
  std::set<std::int64_t> all;
  for_each_token(spec, [&](const std::int64_t* token) {
    const auto ranks = ranks_of(spec, token);
    ASSERT_LE(ranks.size(), 2u);
    ASSERT_TRUE(is_distinct(spec, token));
    all.insert(ranks.begin(), ranks.end());
  });
  EXPECT_EQ(all.size(), 4u);
}

TEST(Routing, AllToAllReachesEveryRank) {
  const RoutingSpec spec = make_spec(Routing::kAllToAll);
  for_each_token(spec, [&](const std::int64_t* token) {
    ASSERT_EQ(ranks_of(spec, token).size(), 4u);
    ASSERT_TRUE(is_distinct(spec, token));
  });
}

TEST(Routing, ToSelfAndToRankZeroStayOnOneRank) {
  for (const auto& [routing, rank] :
       {std::pair(Routing::kToSelf, 1), std::pair(Routing::kToRankZero, 0)}) {
    const RoutingSpec spec = make_spec(routing);
    for_each_token(spec, [&, rank = rank](const std::int64_t* token) {
      ASSERT_EQ(ranks_of(spec, token), std::set<std::int64_t>{rank});
    });
  }
}

TEST(Routing, HolesLeaveSomeTokensWithoutExperts) {
  const RoutingSpec spec = make_spec(Routing::kHoles);
  int empty = 0, partial = 0;
  for_each_token(spec, [&](const std::int64_t* token) {
    const auto holes = std::count(token, token + spec.topk, -1);
    empty += holes == spec.topk ? 1 : 0;
    partial += holes > 0 && holes < spec.topk ? 1 : 0;
  });
  EXPECT_GE(empty, 500 / 8);
  EXPECT_GT(partial, 300);
}

TEST(Routing, DuplicatesNameAnExpertTwice) {
  const RoutingSpec spec = make_spec(Routing::kDuplicates);
  for_each_token(spec, [&](const std::int64_t* token) { ASSERT_EQ(token[0], token[1]); });
}

TEST(Routing, MoreEntriesThanExpertsRepeat) {
  RoutingSpec spec = make_spec(Routing::kToRankZero);
  spec.topk = 20;
  for_each_token(spec, [&](const std::int64_t* token) {
    ASSERT_EQ(std::set<std::int64_t>(token, token + 20).size(), 8u);
  });
}

TEST(Routing, UnknownNamesAreRefusedWithTheKnownOnes) {
  try {
    routing_from("unifrom");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("'unifrom'"));
    EXPECT_THAT(error.what(), testing::HasSubstr("uniform, zipf"));
  }
}

}  // namespace
}  // namespace deep_ep::verify
