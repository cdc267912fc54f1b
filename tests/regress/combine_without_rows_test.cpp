#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "deep_ep/deep_ep.hpp"

// A rank that received no rows has no memory to point to. It took that for "no weights", so its
// rings held other records than its peers wrote; the sums were wrong and the next call hung.

namespace deep_ep {
namespace {

constexpr int kRanks = 2;
constexpr std::int64_t kTokens = 3;
constexpr std::int64_t kHidden = 8;

void play(const std::shared_ptr<Bootstrap>& bootstrap) {
  Buffer buffer(bootstrap, {.timeout = std::chrono::seconds(20)});
  const float value = 1.0F + static_cast<float>(buffer.rank());
  std::vector<float> x(kTokens * kHidden, value);
  std::vector<std::int64_t> ids(kTokens, 0);  // the only expert chosen is one of rank 0
  std::vector<float> weights(kTokens, 0.5F);
  const TensorView topk_idx(ids.data(), DType::kInt64, {kTokens, 1});
  for (int round = 0; round < 2; ++round) {
    const DispatchResult got =
        buffer.dispatch({.x = {x.data(), DType::kFloat32, {kTokens, kHidden}},
                         .layout = buffer.get_dispatch_layout(topk_idx, kRanks),
                         .topk_idx = topk_idx,
                         .topk_weights = {weights.data(), DType::kFloat32, {kTokens, 1}}});
    ASSERT_EQ(got.num_recv_tokens, buffer.rank() == 0 ? kRanks * kTokens : 0);
    TensorView recv_weights = got.recv_topk_weights;
    if (got.num_recv_tokens == 0) recv_weights.data = nullptr;
    const CombineResult out =
        buffer.combine({.x = got.recv_x, .handle = got.handle, .topk_weights = recv_weights});
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
      EXPECT_EQ(out.combined_x.as<float>()[i], value);
    }
    for (std::int64_t i = 0; i < kTokens; ++i) {
      EXPECT_EQ(out.combined_topk_weights.as<float>()[i], 0.5F);
    }
  }
}

TEST(Combine, RankWithoutRowsStillCountsItsWeights) {
  std::vector<std::thread> ranks;
  for (const auto& bootstrap : bootstrap_threads(kRanks)) ranks.emplace_back(play, bootstrap);
  for (std::thread& rank : ranks) rank.join();
}

}  // namespace
}  // namespace deep_ep
