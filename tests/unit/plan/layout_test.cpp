#include "plan/layout.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "deep_ep/error.hpp"
#include "unit/plan/routing.hpp"

namespace deep_ep::plan::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr std::int32_t kMax = std::numeric_limits<std::int32_t>::max();

std::string refusal(const RoutingShape& shape) {
  try {
    validate(shape);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    return error.what();
  }
  return "";
}

TEST(RoutingShape, ExpertsMustBeAMultipleOfRanks) {
  EXPECT_EQ(refusal({.num_tokens = 1, .num_topk = 1, .num_experts = 6, .num_ranks = 3}), "");
  EXPECT_THAT(refusal({.num_tokens = 1, .num_topk = 1, .num_experts = 7, .num_ranks = 3}),
              testing::AllOf(HasSubstr("num_experts is 7"), HasSubstr("3")));
  EXPECT_THAT(refusal({.num_tokens = 1, .num_topk = 1, .num_experts = 0, .num_ranks = 3}),
              HasSubstr("num_experts is 0"));
  EXPECT_THAT(refusal({.num_tokens = 1, .num_topk = 1, .num_experts = -3, .num_ranks = 3}),
              HasSubstr("num_experts is -3"));
}

TEST(RoutingShape, RanksTokensAndTopkAreChecked) {
  EXPECT_THAT(refusal({.num_tokens = 1, .num_topk = 1, .num_experts = 4, .num_ranks = 0}),
              HasSubstr("num_ranks is 0"));
  EXPECT_THAT(refusal({.num_tokens = 1, .num_topk = 0, .num_experts = 4, .num_ranks = 1}),
              HasSubstr("0 entries"));
  EXPECT_THAT(refusal({.num_tokens = -1, .num_topk = 1, .num_experts = 4, .num_ranks = 1}),
              HasSubstr("[-1, 1]"));
  EXPECT_EQ(refusal({.num_tokens = 0, .num_topk = 64, .num_experts = 4, .num_ranks = 1}), "");
}

TEST(RoutingShape, EntriesBelowTwoToThe31AreAllowedAndNoMore) {
  EXPECT_EQ(refusal({.num_tokens = kMax, .num_topk = 1, .num_experts = 4, .num_ranks = 1}), "");
  EXPECT_THAT(
      refusal(
          {.num_tokens = std::int64_t{kMax} + 1, .num_topk = 1, .num_experts = 4, .num_ranks = 1}),
      HasSubstr("[2147483648, 1]"));
  EXPECT_EQ(refusal({.num_tokens = kMax / 8, .num_topk = 8, .num_experts = 4, .num_ranks = 1}), "");
  EXPECT_NE(refusal({.num_tokens = kMax / 8 + 1, .num_topk = 8, .num_experts = 4, .num_ranks = 1}),
            "");
}

TEST(DispatchLayout, ATokenCountsOncePerRankAndOncePerEntryThatNamesAnExpert) {
  const RoutingShape shape{.num_tokens = 4, .num_topk = 3, .num_experts = 6, .num_ranks = 3};
  const std::vector<std::int32_t> topk_idx = {0,  1,  4,    // ranks 0 and 2
                                              5,  5,  5,    // a duplicate: rank 2 once
                                              -1, -1, -1,   // nowhere
                                              -1, 3,  -1};  // rank 1
  Layout layout(shape);
  ASSERT_FALSE(fill(layout, shape, topk_idx));
  EXPECT_THAT(layout.tokens_per_rank, ElementsAre(1, 1, 2));
  EXPECT_THAT(layout.tokens_per_expert, ElementsAre(1, 1, 0, 1, 1, 3));
  EXPECT_THAT(layout.membership(), ElementsAre(1, 0, 1,  //
                                               0, 0, 1,  //
                                               0, 0, 0,  //
                                               0, 1, 0));
}

TEST(DispatchLayout, NoTokensGiveZeroCounts) {
  const RoutingShape shape{.num_tokens = 0, .num_topk = 2, .num_experts = 4, .num_ranks = 2};
  Layout layout(shape);
  ASSERT_FALSE(fill(layout, shape, std::vector<std::int64_t>{}));
  EXPECT_THAT(layout.tokens_per_rank, ElementsAre(0, 0));
  EXPECT_THAT(layout.tokens_per_expert, ElementsAre(0, 0, 0, 0));
}

template <class Id>
void expect_bad(Id id) {
  const RoutingShape shape{.num_tokens = 3, .num_topk = 2, .num_experts = 4, .num_ranks = 2};
  Layout layout(shape);
  const auto bad = fill(layout, shape, std::vector<Id>{0, -1, 3, id, id, 0});
  ASSERT_TRUE(bad) << id;
  EXPECT_EQ(bad->token, 1);
  EXPECT_EQ(bad->k, 1);
  EXPECT_EQ(bad->id, id);
}

TEST(DispatchLayout, TheFirstIdOutOfRangeIsReported) {
  expect_bad<std::int32_t>(4);
  expect_bad<std::int32_t>(-2);
  expect_bad<std::int32_t>(kMax);
  expect_bad<std::int32_t>(std::numeric_limits<std::int32_t>::min());
  // Would name expert 0, expert 3 and "none" if it were cut to 32 bits.
  expect_bad<std::int64_t>(std::int64_t{1} << 32);
  expect_bad<std::int64_t>((std::int64_t{1} << 32) + 3);
  expect_bad<std::int64_t>((std::int64_t{1} << 32) - 1);
  expect_bad<std::int64_t>(std::numeric_limits<std::int64_t>::min());
  expect_bad<std::int64_t>(std::numeric_limits<std::int64_t>::max());
}

TEST(SendSlots, AreStablePositionsAndInclusiveChannelSums) {
  const bool in_rank[] = {true,  false,  //
                          true,  true,   //
                          false, true,   //
                          false, false,  //
                          true,  true};
  std::vector<std::int32_t> head(10, 77);
  std::vector<std::int32_t> prefix(4, 77);
  build_send_slots(in_rank, 5, 2, 2, head.data(), prefix.data());
  EXPECT_THAT(head, ElementsAre(0, -1, 1, 0, -1, 1, -1, -1, 2, 2));
  EXPECT_THAT(prefix, ElementsAre(2, 3, 1, 3));  // channels of 2 and 3 tokens
}

TEST(RankPrefixMatrix, SumsDownEachColumn) {
  std::vector<std::int32_t> matrix = {1, 2, 3,  //
                                      0, 5, 1,  //
                                      4, 0, 0};
  ASSERT_TRUE(build_rank_prefix_matrix(matrix.data(), 3));
  EXPECT_THAT(matrix, ElementsAre(1, 2, 3, 1, 7, 4, 5, 7, 4));
  EXPECT_EQ(rows_from(matrix.data(), 0, 1, 3).begin, 0);
  EXPECT_EQ(rows_from(matrix.data(), 0, 1, 3).end, 2);
  EXPECT_EQ(rows_from(matrix.data(), 2, 0, 3).begin, 1);
  EXPECT_EQ(rows_from(matrix.data(), 2, 0, 3).end, 5);
}

TEST(RankPrefixMatrix, TheLargestSumIsAllowedAndOneMoreIsDetected) {
  std::vector<std::int32_t> matrix = {kMax - 1, 5, 1, 6};
  EXPECT_TRUE(build_rank_prefix_matrix(matrix.data(), 2));
  EXPECT_THAT(matrix, ElementsAre(kMax - 1, 5, kMax, 11));
  matrix = {5, kMax - 1, 6, 2};
  EXPECT_FALSE(build_rank_prefix_matrix(matrix.data(), 2));
  // Sums that come back to a positive int32 after one turn.
  matrix.assign(9, kMax);
  EXPECT_FALSE(build_rank_prefix_matrix(matrix.data(), 3));
}

TEST(RankPrefixMatrix, ANegativeCountIsDetected) {
  std::vector<std::int32_t> matrix = {3, 3, 3, -1};
  EXPECT_FALSE(build_rank_prefix_matrix(matrix.data(), 2));
}

TEST(RecvChannelPrefixMatrix, CountsRowsBeforeEachChannelOfTheSource) {
  // Rank 1 of 2 receives tokens 1, 2, 5 of rank 0 (6 tokens) and token 0 of itself (1 token).
  const std::vector<std::int32_t> matrix = {0, 3, 0, 4};
  const std::vector<std::int32_t> src_idx = {1, 2, 5, 0};
  const std::vector<std::int64_t> num_tokens = {6, 1};
  std::vector<std::int32_t> prefix(6, 77);
  build_recv_channel_prefix_matrix(matrix.data(), 1, 2, src_idx.data(), num_tokens.data(), 3,
                                   prefix.data());
  EXPECT_THAT(prefix, ElementsAre(0, 1, 2, 0, 0, 0));
}

TEST(Channels, PartitionTheTokensIntoSharesThatDifferByOneAtMost) {
  const std::vector<std::int64_t> token_counts = {0, 1, 2, 7, 128, 4096, 1'000'003, kMax};
  const std::vector<int> channel_counts = {1, 2, 3, 10, 127, 4096, 100'000};
  for (const std::int64_t num_tokens : token_counts) {
    for (const int num_channels : channel_counts) {
      SCOPED_TRACE(testing::Message() << num_tokens << " tokens, " << num_channels << " channels");
      EXPECT_EQ(channel_begin(num_tokens, 0, num_channels), 0);
      EXPECT_EQ(channel_begin(num_tokens, num_channels, num_channels), num_tokens);
      for (int c = 0; c < num_channels; ++c) {
        const std::int64_t share = channel_begin(num_tokens, c + 1, num_channels) -
                                   channel_begin(num_tokens, c, num_channels);
        ASSERT_GE(share, num_tokens / num_channels) << c;
        ASSERT_LE(share, (num_tokens + num_channels - 1) / num_channels) << c;
      }
    }
  }
}

TEST(ExpertAlignment, RoundsUpToTheNextMultiple) {
  EXPECT_EQ(aligned_expert_count(0, 128), 0);
  EXPECT_EQ(aligned_expert_count(1, 128), 128);
  EXPECT_EQ(aligned_expert_count(128, 128), 128);
  EXPECT_EQ(aligned_expert_count(129, 128), 256);
  EXPECT_EQ(aligned_expert_count(13, 1), 13);
  EXPECT_EQ(aligned_expert_count(13, 7), 14);
  EXPECT_EQ(aligned_expert_count(kMax, 1), kMax);
  EXPECT_EQ(aligned_expert_count(2, kMax), kMax);
}

TEST(ExpertAlignment, CountsBeyondInt32AreRefused) {
  EXPECT_THROW(aligned_expert_count(std::int64_t{kMax} + 1, 1), Error);
  EXPECT_THROW(aligned_expert_count(kMax, 2), Error);
  EXPECT_THROW(aligned_expert_count(1, 0), Error);
  EXPECT_THROW(aligned_expert_count(1, -128), Error);
  try {
    aligned_expert_count(kMax, 128);
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::AllOf(HasSubstr("2147483647"), HasSubstr("2147483648"),
                                             HasSubstr("expert_alignment 128")));
  }
}

}  // namespace
}  // namespace deep_ep::plan::test
