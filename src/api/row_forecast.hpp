#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace deep_ep {

/// How many rows a dispatch may receive, by what earlier ones received: room for results that have
/// to be placed before the counts are known. A forecast, not a bound.
class RowForecast {
 public:
  /// Rows to make room for when this rank has `num_tokens` tokens, of `num_ranks` ranks; 0: nothing
  /// is known.
  std::int64_t room(std::int64_t num_tokens, int num_ranks) const {
    // A rank that had few tokens where others had many knows little of a token of its own: not more
    // than ever, but for ranks that have as many tokens now.
    const double most =
        std::max(most_rows_, static_cast<double>(num_tokens) * static_cast<double>(num_ranks));
    const double rows = std::min(rows_a_token_ * static_cast<double>(num_tokens), most);
    if (rows <= 0) return 0;
    return static_cast<std::int64_t>(std::ceil(rows * kMargin)) + kSpareRows;
  }

  void learn(std::int64_t num_tokens, std::int64_t num_rows) {
    if (num_tokens <= 0) return;
    const double now = static_cast<double>(num_rows) / static_cast<double>(num_tokens);
    rows_a_token_ = wear_off(rows_a_token_, now);
    most_rows_ = wear_off(most_rows_, static_cast<double>(num_rows));
  }

 private:
  // Counts of tokens that choose at random differ by less than a hundredth from 4096 tokens on, by
  // less than the spare rows below.
  static constexpr double kMargin = 1 + 1.0 / 32;
  static constexpr std::int64_t kSpareRows = 64;

  // Layers that take turns receive more or less each: the most, which calls with less wear off.
  static double wear_off(double most, double now) { return std::max(now, (most + now) / 2); }

  double rows_a_token_ = 0;
  double most_rows_ = 0;
};

}  // namespace deep_ep
