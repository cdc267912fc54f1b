#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "plan/layout.hpp"

namespace deep_ep::plan::test {

/// A seed that a failing test prints.
#define WITH_SEED(seed) SCOPED_TRACE("seed " + std::to_string(seed))

inline std::int64_t pick(std::mt19937_64& random, std::int64_t least, std::int64_t most) {
  return std::uniform_int_distribution<std::int64_t>(least, most)(random);
}

/// Ids of [N, K]: uniform, or few experts only so that duplicates and empty ranks are common, with
/// some -1.
template <class Id>
std::vector<Id> random_topk(std::mt19937_64& random, const RoutingShape& shape) {
  const std::int64_t used_experts =
      pick(random, 0, 1) == 0 ? shape.num_experts : pick(random, 1, shape.num_experts);
  const std::int64_t one_in = pick(random, 1, 10);
  std::vector<Id> topk_idx;
  for (std::int64_t i = 0; i < shape.num_tokens * shape.num_topk; ++i) {
    const bool none = pick(random, 1, 10) <= one_in - 1;
    topk_idx.push_back(static_cast<Id>(none ? -1 : pick(random, 0, used_experts - 1)));
  }
  return topk_idx;
}

inline RoutingShape random_shape(std::mt19937_64& random) {
  RoutingShape shape;
  shape.num_ranks = static_cast<int>(pick(random, 1, 9));
  shape.num_experts = shape.num_ranks * static_cast<int>(pick(random, 1, 9));
  shape.num_topk = static_cast<int>(pick(random, 1, 33));
  shape.num_tokens = pick(random, 0, 3) == 0 ? pick(random, 0, 2) : pick(random, 0, 150);
  return shape;
}

/// What get_dispatch_layout writes. Filled with garbage, since it must not rely on zeros.
struct Layout {
  explicit Layout(const RoutingShape& shape)
      : tokens_per_rank(shape.num_ranks, 77),
        tokens_per_expert(shape.num_experts, 77),
        num_flags(shape.num_tokens * shape.num_ranks),
        is_token_in_rank(new bool[num_flags + 1]) {
    std::fill_n(is_token_in_rank.get(), num_flags + 1, true);
  }

  std::vector<int> membership() const {
    return {is_token_in_rank.get(), is_token_in_rank.get() + num_flags};
  }

  std::vector<std::int32_t> tokens_per_rank;
  std::vector<std::int32_t> tokens_per_expert;
  std::int64_t num_flags;
  std::unique_ptr<bool[]> is_token_in_rank;  // and one flag behind the end
};

template <class Id>
std::optional<BadExpert> fill(Layout& layout, const RoutingShape& shape,
                              const std::vector<Id>& topk_idx) {
  return get_dispatch_layout(shape, topk_idx.data(), layout.tokens_per_rank.data(),
                             layout.tokens_per_expert.data(), layout.is_token_in_rank.get());
}

}  // namespace deep_ep::plan::test
