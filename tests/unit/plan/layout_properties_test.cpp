#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <vector>

#include "plan/layout.hpp"
#include "plan/reference.hpp"
#include "unit/plan/routing.hpp"

namespace deep_ep::plan::test {
namespace {

constexpr int kSeeds = 300;

TEST(LayoutProperty, CountsAndMembershipFollowFromTheSetsOfRanks) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    WITH_SEED(seed);
    std::mt19937_64 random(seed);
    const RoutingShape shape = random_shape(random);
    const auto topk_idx = random_topk<std::int64_t>(random, shape);
    Layout layout(shape);
    ASSERT_FALSE(fill(layout, shape, topk_idx));
    EXPECT_TRUE(layout.is_token_in_rank[layout.num_flags]) << "written behind the end";

    std::map<int, int> rank_counts;
    std::map<std::int64_t, int> expert_counts;
    for (std::int64_t token = 0; token < shape.num_tokens; ++token) {
      std::set<int> ranks;
      for (int k = 0; k < shape.num_topk; ++k) {
        const std::int64_t id = topk_idx[token * shape.num_topk + k];
        if (id < 0) continue;
        ranks.insert(static_cast<int>(id * shape.num_ranks / shape.num_experts));
        ++expert_counts[id];
      }
      for (int rank = 0; rank < shape.num_ranks; ++rank)
        ASSERT_EQ(layout.is_token_in_rank[token * shape.num_ranks + rank], ranks.count(rank) == 1);
      for (const int rank : ranks) ++rank_counts[rank];
    }
    for (int rank = 0; rank < shape.num_ranks; ++rank)
      ASSERT_EQ(layout.tokens_per_rank[rank], rank_counts[rank]);
    for (int expert = 0; expert < shape.num_experts; ++expert)
      ASSERT_EQ(layout.tokens_per_expert[expert], expert_counts[expert]);
  }
}

TEST(LayoutProperty, BothIdTypesGiveTheSameLayout) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    WITH_SEED(seed);
    std::mt19937_64 random(seed);
    const RoutingShape shape = random_shape(random);
    const auto narrow_ids = random_topk<std::int32_t>(random, shape);
    Layout narrow(shape);
    Layout wide(shape);
    ASSERT_FALSE(fill(narrow, shape, narrow_ids));
    ASSERT_FALSE(
        fill(wide, shape, std::vector<std::int64_t>(narrow_ids.begin(), narrow_ids.end())));
    EXPECT_EQ(narrow.tokens_per_rank, wide.tokens_per_rank);
    EXPECT_EQ(narrow.tokens_per_expert, wide.tokens_per_expert);
    EXPECT_EQ(narrow.membership(), wide.membership());
  }
}

/// All ranks of one exchange: layouts, slots and matrices on one side, the reference's dispatch of
/// payloads that name (source, token) on the other.
struct Exchange {
  explicit Exchange(std::uint64_t seed) : random(seed), shape(random_shape(random)) {
    dispatch_shape.num_topk = shape.num_topk;
    dispatch_shape.num_experts = shape.num_experts;
    dispatch_shape.num_ranks = shape.num_ranks;
    dispatch_shape.x_bytes = 8;
    dispatch_shape.expert_alignment = static_cast<int>(pick(random, 1, 40));
    num_channels = static_cast<int>(pick(random, 1, 12));
    matrix.resize(shape.num_ranks * shape.num_ranks);
    for (int rank = 0; rank < shape.num_ranks; ++rank) add_rank(rank);
    fits = build_rank_prefix_matrix(matrix.data(), shape.num_ranks);
    outputs = reference::dispatch(dispatch_shape, inputs);
  }

  void add_rank(int rank) {
    RoutingShape own = shape;
    own.num_tokens = pick(random, 0, 4) == 0 ? 0 : pick(random, 0, 100);
    shapes.push_back(own);
    num_tokens.push_back(own.num_tokens);
    reference::DispatchInput input;
    input.num_tokens = own.num_tokens;
    input.topk_idx = random_topk<std::int64_t>(random, own);
    for (std::int64_t token = 0; token < own.num_tokens; ++token) {
      const std::int64_t name = (std::int64_t{rank} + 1) << 32 | token;
      const auto* bytes = reinterpret_cast<const std::byte*>(&name);
      input.x.insert(input.x.end(), bytes, bytes + 8);
    }
    layouts.emplace_back(own);
    EXPECT_FALSE(fill(layouts.back(), own, input.topk_idx));
    inputs.push_back(std::move(input));

    heads.emplace_back(own.num_tokens * shape.num_ranks, 77);
    channel_prefixes.emplace_back(shape.num_ranks * num_channels, 77);
    build_send_slots(layouts.back().is_token_in_rank.get(), own.num_tokens, shape.num_ranks,
                     num_channels, heads.back().data(), channel_prefixes.back().data());
    std::copy(layouts.back().tokens_per_rank.begin(), layouts.back().tokens_per_rank.end(),
              matrix.begin() + std::int64_t{rank} * shape.num_ranks);
  }

  std::mt19937_64 random;
  RoutingShape shape;
  reference::DispatchShape dispatch_shape;
  int num_channels = 1;
  std::vector<RoutingShape> shapes;
  std::vector<std::int64_t> num_tokens;
  std::vector<reference::DispatchInput> inputs;
  std::vector<Layout> layouts;
  std::vector<std::vector<std::int32_t>> heads;
  std::vector<std::vector<std::int32_t>> channel_prefixes;
  std::vector<std::int32_t> matrix;
  bool fits = false;
  std::vector<reference::DispatchOutput> outputs;
};

TEST(LayoutProperty, BaseAndSlotPlaceEveryRowWhereTheReferenceHasIt) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    WITH_SEED(seed);
    const Exchange exchange(seed);
    const int num_ranks = exchange.shape.num_ranks;
    ASSERT_TRUE(exchange.fits);
    for (int rank = 0; rank < num_ranks; ++rank) {
      const reference::DispatchOutput& out = exchange.outputs[rank];
      ASSERT_EQ(out.rank_prefix_matrix, exchange.matrix);
      std::int64_t placed = 0;
      for (int source = 0; source < num_ranks; ++source) {
        const RowRange rows = rows_from(exchange.matrix.data(), source, rank, num_ranks);
        for (std::int64_t token = 0; token < exchange.num_tokens[source]; ++token) {
          const std::int32_t slot = exchange.heads[source][token * num_ranks + rank];
          if (slot < 0) continue;
          const std::int64_t row = rows.begin + slot;
          ASSERT_LT(row, rows.end);
          ASSERT_EQ(out.src_rank[row], source);
          ASSERT_EQ(out.src_idx[row], token);
          ++placed;
        }
      }
      EXPECT_EQ(placed, out.num_rows);
    }
  }
}

TEST(LayoutProperty, ExpertCountsAddUpToTheReferences) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    WITH_SEED(seed);
    const Exchange exchange(seed);
    const int num_local = exchange.shape.num_local_experts();
    for (int expert = 0; expert < exchange.shape.num_experts; ++expert) {
      std::int64_t count = 0;
      for (const Layout& layout : exchange.layouts) count += layout.tokens_per_expert[expert];
      ASSERT_EQ(
          aligned_expert_count(count, exchange.dispatch_shape.expert_alignment),
          exchange.outputs[expert / num_local].num_tokens_per_local_expert[expert % num_local]);
    }
  }
}

TEST(LayoutProperty, TheLastChannelHoldsAllRowsOfARank) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    WITH_SEED(seed);
    const Exchange exchange(seed);
    for (int rank = 0; rank < exchange.shape.num_ranks; ++rank)
      for (int peer = 0; peer < exchange.shape.num_ranks; ++peer)
        ASSERT_EQ(exchange.channel_prefixes[rank][(peer + 1) * exchange.num_channels - 1],
                  exchange.layouts[rank].tokens_per_rank[peer]);
  }
}

TEST(LayoutProperty, TheReceiversChannelSumsAreTheSendersShiftedByOne) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    WITH_SEED(seed);
    const Exchange exchange(seed);
    const int num_ranks = exchange.shape.num_ranks;
    const int num_channels = exchange.num_channels;
    for (int rank = 0; rank < num_ranks; ++rank) {
      std::vector<std::int32_t> received(num_ranks * num_channels, 77);
      build_recv_channel_prefix_matrix(exchange.matrix.data(), rank, num_ranks,
                                       exchange.outputs[rank].src_idx.data(),
                                       exchange.num_tokens.data(), num_channels, received.data());
      for (int source = 0; source < num_ranks; ++source) {
        ASSERT_EQ(received[source * num_channels], 0);
        for (int c = 1; c < num_channels; ++c)
          ASSERT_EQ(received[source * num_channels + c],
                    exchange.channel_prefixes[source][rank * num_channels + c - 1]);
      }
    }
  }
}

}  // namespace
}  // namespace deep_ep::plan::test
