#pragma once

#include <cstdint>
#include <vector>

namespace deep_ep::test {

/// Rows of level indices, one level a factor, in which every pair of levels of any two factors
/// occurs at least once. `levels[f]` is the number of levels of factor f, at least 1. Greedy: each
/// row is the best of a few random candidates; the same seed gives the same rows.
std::vector<std::vector<int>> pairwise_rows(const std::vector<int>& levels, std::uint64_t seed);

constexpr int kSpreads = 4;
/// How a number of tokens is spread over the ranks: equal, ragged, every other rank empty, all on
/// the last rank.
std::vector<std::int64_t> spread_tokens(std::int64_t tokens, int ranks, int level);

}  // namespace deep_ep::test
