#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace deep_ep {

/// How many rows a dispatch may receive, by what earlier ones received: room for results that have
/// to be placed before the counts are known. A forecast, not a bound.
class RowForecast {
 public:
  /// Rows to make room for when this rank has `num_tokens` tokens; 0: nothing is known.
  std::int64_t room(std::int64_t num_tokens) const {
    const double rows = rows_a_token_ * static_cast<double>(num_tokens);
    if (rows <= 0) return 0;
    return static_cast<std::int64_t>(std::ceil(rows * kMargin)) + kSpareRows;
  }

  void learn(std::int64_t num_tokens, std::int64_t num_rows) {
    if (num_tokens <= 0) return;
    const double now = static_cast<double>(num_rows) / static_cast<double>(num_tokens);
    // Layers that take turns receive more or less each: the most, which calls with less wear off.
    rows_a_token_ = std::max(now, (rows_a_token_ + now) / 2);
  }

 private:
  // Counts of tokens that choose at random differ by less than a hundredth from 4096 tokens on, by
  // less than the spare rows below.
  static constexpr double kMargin = 1 + 1.0 / 32;
  static constexpr std::int64_t kSpareRows = 64;

  double rows_a_token_ = 0;
};

}  // namespace deep_ep
