#include "contract/covering.hpp"

#include <algorithm>
#include <numeric>
#include <random>

namespace deep_ep::test {
namespace {

/// Which pairs of (factor, level) have not occurred in a row yet.
class OpenPairs {
 public:
  explicit OpenPairs(const std::vector<int>& levels) : levels_(levels) {
    int at = 0;
    for (int count : levels) {
      first_.push_back(at);
      at += count;
    }
    width_ = at;
    open_.assign(static_cast<std::size_t>(width_) * width_, false);
    for (std::size_t f = 0; f < levels.size(); ++f) {
      for (std::size_t g = 0; g < levels.size(); ++g) {
        if (f == g) continue;
        for (int a = 0; a < levels[f]; ++a) {
          for (int b = 0; b < levels[g]; ++b) open(f, a, g, b) = true;
        }
        if (f < g) count_ += static_cast<std::int64_t>(levels[f]) * levels[g];
      }
    }
  }

  std::int64_t count() const { return count_; }

  /// Open pairs that level `a` of factor `f` makes with the levels that `row` has fixed (>= 0).
  int gain(const std::vector<int>& row, std::size_t f, int a) {
    int sum = 0;
    for (std::size_t g = 0; g < row.size(); ++g) {
      if (g != f && row[g] >= 0) sum += open(f, a, g, row[g]) ? 1 : 0;
    }
    return sum;
  }

  int total(const std::vector<int>& row) {
    int sum = 0;
    for (std::size_t f = 0; f < row.size(); ++f) sum += gain(row, f, row[f]);
    return sum / 2;
  }

  void close(const std::vector<int>& row) {
    count_ -= total(row);
    for (std::size_t f = 0; f < row.size(); ++f) {
      for (std::size_t g = 0; g < row.size(); ++g) {
        if (f != g) open(f, row[f], g, row[g]) = false;
      }
    }
  }

  /// Some open pair, as a row with only these two levels fixed. Needs count() > 0.
  std::vector<int> first_open() {
    std::vector<int> row(levels_.size(), -1);
    for (std::size_t f = 0; f < levels_.size(); ++f) {
      for (std::size_t g = f + 1; g < levels_.size(); ++g) {
        for (int a = 0; a < levels_[f]; ++a) {
          for (int b = 0; b < levels_[g]; ++b) {
            if (!open(f, a, g, b)) continue;
            row[f] = a;
            row[g] = b;
            return row;
          }
        }
      }
    }
    return row;
  }

 private:
  std::vector<bool>::reference open(std::size_t f, int a, std::size_t g, int b) {
    return open_[static_cast<std::size_t>(first_[f] + a) * width_ + first_[g] + b];
  }

  std::vector<int> levels_;
  std::vector<int> first_;
  int width_ = 0;
  std::vector<bool> open_;
  std::int64_t count_ = 0;
};

/// Fixes the factors of `row` that are still open, in random order, each at the level that makes
/// most new pairs; ties are broken at random.
void complete(std::vector<int>& row, const std::vector<int>& levels, OpenPairs& pairs,
              std::mt19937_64& random) {
  std::vector<std::size_t> order(levels.size());
  std::iota(order.begin(), order.end(), 0);
  // Not std::shuffle, whose result the standard leaves to the implementation.
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  for (std::size_t f : order) {
    if (row[f] >= 0) continue;
    int best = -1;
    const int start = static_cast<int>(random() % levels[f]);
    for (int i = 0; i < levels[f]; ++i) {
      const int level = (start + i) % levels[f];
      const int gain = pairs.gain(row, f, level);
      if (gain > best) {
        best = gain;
        row[f] = level;
      }
    }
  }
}

}  // namespace

std::vector<std::vector<int>> pairwise_rows(const std::vector<int>& levels, std::uint64_t seed) {
  constexpr int kCandidates = 24;
  std::mt19937_64 random(seed);
  OpenPairs pairs(levels);
  std::vector<std::vector<int>> rows;
  while (pairs.count() > 0) {
    std::vector<int> best;
    for (int i = 0; i < kCandidates; ++i) {
      std::vector<int> row = pairs.first_open();
      complete(row, levels, pairs, random);
      if (best.empty() || pairs.total(row) > pairs.total(best)) best = std::move(row);
    }
    pairs.close(best);
    rows.push_back(std::move(best));
  }
  return rows;
}

std::vector<std::int64_t> spread_tokens(std::int64_t tokens, int ranks, int level) {
  std::vector<std::int64_t> spread(static_cast<std::size_t>(ranks), tokens);
  for (int rank = 0; rank < ranks; ++rank) {
    std::int64_t& mine = spread[static_cast<std::size_t>(rank)];
    if (level == 1) mine = tokens * (rank + 1) / ranks;
    if (level == 2 && rank % 2 == 0) mine = 0;
    if (level == 3 && rank != ranks - 1) mine = 0;
  }
  return spread;
}

}  // namespace deep_ep::test
