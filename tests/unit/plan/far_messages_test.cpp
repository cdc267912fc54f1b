#include "plan/far_messages.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace deep_ep::plan {
namespace {

std::vector<LowLatencyShape> shapes() {
  std::vector<LowLatencyShape> all;
  for (const int ranks : {2, 3, 16, 72})
    for (const int topk : {1, 8, 40})
      for (const std::int64_t tokens : {1, 5, 128})
        for (const std::int64_t row : {16, 640, 7616, 14336})
          all.push_back({ranks, ranks * 8, topk, tokens, row});
  return all;
}

FarLayout layout_for(std::int64_t bytes, int ranks) {
  // Nobody looks there.
  alignas(128) static std::byte base[128];
  Carver carver(base);
  return FarLayout::carve(carver, LowLatencyLayout::carve(nullptr, bytes, ranks));
}

TEST(FarMessages, WhateverFitsInsideANodeFitsBetweenNodes) {
  int tried = 0;
  for (const LowLatencyShape& shape : shapes()) {
    const std::int64_t most = LowLatencyLayout::bytes(shape, shape);
    // From a size that is far too small: what fits first has nothing to spare.
    for (std::int64_t bytes = most / 8; bytes <= most; bytes += most / 64 + 128) {
      const LowLatencyLayout near = LowLatencyLayout::carve(nullptr, bytes, shape.num_ranks);
      const FarLayout far = layout_for(bytes, shape.num_ranks);
      for (const auto kind : {LowLatencyKind::kDispatch, LowLatencyKind::kCombine}) {
        if (!LowLatencyLayout::fits(shape, kind, bytes)) continue;
        const FarShape needed(near.places(kind, 0, shape));
        EXPECT_LE(needed.bytes, far.stripe_bytes) << shape.num_ranks << " ranks, " << bytes;
        EXPECT_LE(needed.words, far.stripe_words) << shape.num_ranks << " ranks, " << bytes;
        ++tried;
      }
    }
  }
  EXPECT_GT(tried, 1000);
}

TEST(FarMessages, AMessageIsItsHeadAndItsRowAndEachHasAWord) {
  const LowLatencyShape shape{2, 16, 4, 10, 1000};
  const LowLatencyLayout near = LowLatencyLayout::carve(nullptr, 1 << 20, 2);
  const FarShape dispatch(near.places(LowLatencyKind::kDispatch, 0, shape));
  EXPECT_EQ(dispatch.call_bytes, 16 * (kCallPackets + 3));
  EXPECT_EQ(dispatch.messages.head_bytes, 16 * 5);
  EXPECT_EQ(dispatch.messages.bytes, 16 * 5 + 1008);
  EXPECT_EQ(dispatch.messages.at(10), dispatch.bytes);
  EXPECT_EQ(dispatch.words, 11);
  const FarShape combine(near.places(LowLatencyKind::kCombine, 0, shape));
  EXPECT_EQ(combine.messages.bytes, 16 * 5);  // weights
  EXPECT_EQ(combine.returns.begin, combine.messages.at(10));
  EXPECT_EQ(combine.returns.bytes, 16 + 1008);
  EXPECT_EQ(combine.returns.first_word, 11);
  EXPECT_EQ(combine.words, 21);
}

TEST(FarMessages, StripesAndTheirWordsFollowEachOther) {
  const FarLayout far = layout_for(1 << 20, 3);
  EXPECT_EQ(far.stripe_bytes % Carver::kAlignment, 0);
  EXPECT_EQ(far.stripe(1, 0), 3 * far.stripe_bytes);
  EXPECT_EQ(far.stripe(1, 2) - far.stripe(1, 1), far.stripe_bytes);
  EXPECT_EQ(far.words_of(0, 1) - far.words_of(0, 0), far.stripe_words);
}

}  // namespace
}  // namespace deep_ep::plan
