#include "plan/groups.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "plan/reference.hpp"

namespace deep_ep::plan {
namespace {

using testing::Each;
using testing::ElementsAre;

struct Groups {
  std::vector<std::int32_t> group_offsets, grouped_rows, recv_rows;
  std::vector<float> weights;

  explicit Groups(const GroupShape& shape)
      : group_offsets(shape.num_local_experts + 1, 77),
        grouped_rows(shape.num_rows * shape.num_topk, 77),
        recv_rows(shape.num_grouped_rows, 77),
        weights(shape.num_grouped_rows, 77.0f) {}
  RowGroupArrays arrays() {
    return {group_offsets.data(), grouped_rows.data(), recv_rows.data(), weights.data()};
  }
};

TEST(RowGroups, RowsOfAnExpertAreTogetherInOrderAndPadded) {
  const GroupShape shape{.num_rows = 4,
                         .num_topk = 2,
                         .num_local_experts = 3,
                         .expert_alignment = 2,
                         .num_grouped_rows = 8};
  // The third row names expert 2 twice; the fourth was not received.
  const std::vector<std::int64_t> ids{2, 0, -1, 2, 2, 2, 1, 1};
  const std::vector<float> weights{1, 2, 64, 3, 4, 8, 32, 32};
  Groups groups(shape);
  EXPECT_EQ(build_row_groups(shape, 3, ids.data(), weights.data(), groups.arrays()), 6);
  EXPECT_THAT(groups.group_offsets, ElementsAre(0, 2, 2, 6));
  EXPECT_THAT(groups.grouped_rows, ElementsAre(2, 0, -1, 3, 4, 4, -1, -1));
  EXPECT_THAT(groups.recv_rows, ElementsAre(0, -1, 0, 1, 2, -1, -1, -1));
  EXPECT_THAT(groups.weights, ElementsAre(2, 0, 1, 3, 12, 0, 0, 0));
}

TEST(RowGroups, TooManyRowsAreToldAndWrittenNowhere) {
  const GroupShape shape{
      .num_rows = 3, .num_topk = 1, .num_local_experts = 2, .num_grouped_rows = 2};
  const std::vector<std::int32_t> ids{1, 1, 1};
  Groups groups(shape);
  EXPECT_EQ(build_row_groups(shape, 3, ids.data(), nullptr, groups.arrays()), 3);
  EXPECT_THAT(groups.recv_rows, Each(77));
  EXPECT_THAT(groups.grouped_rows, Each(77));
}

TEST(RowGroups, TheWorstCaseIsEnoughAndIsReached) {
  EXPECT_EQ(worst_grouped_rows(0, 8, 4, 128), 0);
  // One row, one expert of four: padded to 128. Two rows: two groups at most.
  EXPECT_EQ(worst_grouped_rows(1, 1, 4, 128), 128);
  EXPECT_EQ(worst_grouped_rows(2, 1, 4, 128), 256);
  // Each of three groups has one entry more than fits.
  EXPECT_EQ(worst_grouped_rows(15, 1, 3, 4), 15 + 9);
  const std::vector<std::int64_t> entries{5, 5, 5};
  std::int64_t offset = 0;
  for (const std::int64_t count : entries) offset = next_group_offset(offset, count, 4);
  EXPECT_EQ(offset, 24);
}

TEST(RowGroups, RandomRoutingsGiveWhatTheReferenceGives) {
  std::mt19937 random(5);
  for (int round = 0; round < 200; ++round) {
    GroupShape shape;
    shape.num_rows = static_cast<std::int64_t>(random() % 40);
    shape.num_topk = 1 + static_cast<std::int64_t>(random() % 9);
    shape.num_local_experts = 1 + static_cast<int>(random() % 7);
    shape.expert_alignment = 1 + static_cast<int>(random() % 5);
    shape.num_grouped_rows = worst_grouped_rows(shape.num_rows, shape.num_topk,
                                                shape.num_local_experts, shape.expert_alignment);
    reference::DispatchOutput received;
    received.num_rows = shape.num_rows;
    for (std::int64_t i = 0; i < shape.num_rows * shape.num_topk; ++i) {
      received.topk_idx.push_back(static_cast<int>(random() % (shape.num_local_experts + 1)) - 1);
      received.topk_weights.push_back(static_cast<float>(random() % 1000) / 7);
    }
    Groups groups(shape);
    const std::int64_t total = build_row_groups(shape, shape.num_rows, received.topk_idx.data(),
                                                received.topk_weights.data(), groups.arrays());
    auto want = reference::group_rows(received, static_cast<int>(shape.num_topk),
                                      shape.num_local_experts, shape.expert_alignment);
    ASSERT_EQ(total, static_cast<std::int64_t>(want.recv_rows.size())) << "round " << round;
    want.recv_rows.resize(shape.num_grouped_rows, -1);
    want.weights.resize(shape.num_grouped_rows, 0.0f);
    EXPECT_EQ(groups.group_offsets, want.group_offsets) << "round " << round;
    EXPECT_EQ(groups.grouped_rows, want.grouped_rows) << "round " << round;
    EXPECT_EQ(groups.recv_rows, want.recv_rows) << "round " << round;
    EXPECT_EQ(groups.weights, want.weights) << "round " << round;
  }
}

}  // namespace
}  // namespace deep_ep::plan
