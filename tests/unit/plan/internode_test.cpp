#include "plan/internode.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

namespace deep_ep::plan {
namespace {

constexpr Topology kTopology{6, 2};

/// is_token_in_rank [N, R].
struct Table {
  std::int64_t num_tokens;
  std::unique_ptr<bool[]> in;

  Table(std::int64_t tokens, std::uint64_t seed)
      : num_tokens(tokens), in(new bool[tokens * kTopology.num_ranks + 1]) {
    std::mt19937_64 random(seed);
    for (std::int64_t i = 0; i < tokens * kTopology.num_ranks; ++i) in[i] = random() % 3 == 0;
  }
  bool at(std::int64_t token, int rank) const { return in[token * kTopology.num_ranks + rank]; }
  bool goes_to_node(std::int64_t token, int node) const {
    return at(token, kTopology.rank_of(node, 0)) || at(token, kTopology.rank_of(node, 1));
  }
};

TEST(Internode, ATokenHasOneRecordForEachNodeNumberedInAscendingToken) {
  for (const std::int64_t tokens : {0, 1, 5, 64}) {
    for (const int channels : {1, 3, 10}) {
      const Table table(tokens, 7 + tokens);
      std::vector<std::int32_t> heads(tokens * 3, 77);
      std::vector<std::int32_t> prefix(3 * channels, 77);
      build_record_numbers(table.in.get(), tokens, kTopology, channels, heads.data(),
                           prefix.data());
      std::vector<std::int32_t> counts(3, 77);
      count_tokens_per_node(table.in.get(), tokens, kTopology, counts.data());
      for (int node = 0; node < 3; ++node) {
        std::int32_t next = 0;
        for (std::int64_t token = 0; token < tokens; ++token)
          EXPECT_EQ(heads[token * 3 + node], table.goes_to_node(token, node) ? next++ : -1);
        EXPECT_EQ(counts[node], next);
        EXPECT_EQ(prefix[node * channels + channels - 1], next);
        for (int channel = 0; channel < channels; ++channel) {
          const std::int64_t end = channel_begin(tokens, channel + 1, channels);
          std::int32_t before = 0;
          for (std::int64_t token = 0; token < end; ++token)
            before += table.goes_to_node(token, node) ? 1 : 0;
          EXPECT_EQ(prefix[node * channels + channel], before);
        }
      }
    }
  }
}

TEST(Internode, RecordsArePartedAsTokensAre) {
  const Table table(40, 3);
  std::vector<std::int32_t> heads(40 * 3);
  std::vector<std::int32_t> prefix(3);
  build_record_numbers(table.in.get(), 40, kTopology, 1, heads.data(), prefix.data());
  for (int node = 0; node < 3; ++node) {
    for (std::int64_t token = 0; token <= 40; ++token) {
      std::int32_t before = 0;
      for (std::int64_t t = 0; t < token; ++t) before += table.goes_to_node(t, node) ? 1 : 0;
      EXPECT_EQ(first_record(heads.data(), 40, token, kTopology, node), before);
    }
  }
  const std::vector<std::int32_t> none(40 * 3, -1);
  EXPECT_EQ(first_record(none.data(), 40, 40, kTopology, 1), 0);
  EXPECT_EQ(first_record(nullptr, 0, 0, kTopology, 1), 0);
}

TEST(Internode, PartsOfARecordDoNotOverlapAndAreAligned) {
  for (const RowFormat& row :
       {RowFormat{.x_bytes = 16}, RowFormat{.x_bytes = 14336, .topk_idx_bytes = 36},
        RowFormat{
            .x_bytes = 48, .scale_bytes = 12, .topk_idx_bytes = 8, .topk_weights_bytes = 20}}) {
    for (const int ranks_per_node : {1, 3, 64}) {
      const RecordFormat record(row, ranks_per_node);
      EXPECT_GE(record.topk_idx,
                static_cast<std::int64_t>(sizeof(RecordHead)) + 4 * ranks_per_node);
      EXPECT_GE(record.topk_weights, record.topk_idx + row.topk_idx_bytes);
      EXPECT_GE(record.scales, record.topk_weights + row.topk_weights_bytes);
      EXPECT_GE(record.x, record.scales + row.scale_bytes);
      EXPECT_GE(record.bytes, record.x + row.x_bytes);
      for (const std::int64_t offset :
           {record.topk_idx, record.topk_weights, record.scales, record.x})
        EXPECT_EQ(offset % 16, 0);
      EXPECT_EQ(record.bytes % RecordFormat::kAlignment, 0);
    }
  }
}

TEST(Internode, PartsOfASumDoNotOverlapAndAreAligned) {
  for (const std::int64_t weights_bytes : {0, 4, 32, 36}) {
    for (const std::int64_t x_bytes : {16, 48, 14336}) {
      const SumFormat sum(weights_bytes, x_bytes);
      EXPECT_GE(sum.x, weights_bytes);
      EXPECT_LT(sum.x, weights_bytes + 16);
      EXPECT_EQ(sum.x % 16, 0);
      EXPECT_GE(sum.bytes, sum.x + x_bytes);
      EXPECT_LT(sum.bytes, sum.x + x_bytes + RecordFormat::kAlignment);
      EXPECT_EQ(sum.bytes % RecordFormat::kAlignment, 0);
    }
  }
}

TEST(Internode, PrefixSumsNameTheirParts) {
  std::vector<std::int32_t> sums{3, 0, 4};
  ASSERT_TRUE(build_prefix_sum(sums.data(), 3));
  EXPECT_EQ(sums, (std::vector<std::int32_t>{3, 3, 7}));
  EXPECT_EQ(part_of(sums.data(), 0).begin, 0);
  EXPECT_EQ(part_of(sums.data(), 1).begin, part_of(sums.data(), 1).end);
  EXPECT_EQ(part_of(sums.data(), 2).end, 7);
  std::vector<std::int32_t> negative{1, -1};
  EXPECT_FALSE(build_prefix_sum(negative.data(), 2));
  std::vector<std::int32_t> large{INT32_MAX, 1};
  EXPECT_FALSE(build_prefix_sum(large.data(), 2));
}

}  // namespace
}  // namespace deep_ep::plan
