#pragma once

#include <cstdint>

#include "verify/expected.hpp"

namespace deep_ep::verify {

/// The arguments that one rank passes in a case. `round` 0 is the first dispatch; every later call
/// has its own round, so that stale rows cannot pass for new ones.
class CaseInputs {
 public:
  static constexpr std::int64_t kStatsStart = 7;

  CaseInputs(const Case& c, const Expected& expected);

  std::int64_t tokens() const { return tokens_; }
  /// Rows of a dispatch's results: as many as are received, or num_worst_tokens.
  std::int64_t result_rows() const { return rows_; }
  /// Grouped rows of a dispatch's results.
  std::int64_t grouped_rows() const;

  Tensor topk_idx() const;
  Tensor topk_weights() const;
  Tensor x(int round) const;
  Tensor scales(int round) const;
  Tensor stats() const;
  Tensor combine_x(int round) const;
  Tensor combine_weights(int round) const;
  Tensor bias(int b, int round) const;

 private:
  Tensor token_rows(DType dtype, std::int64_t columns, Rows kind, int round) const;

  const Case& case_;
  const Expected& expected_;
  std::int64_t tokens_;
  std::int64_t rows_;
};

}  // namespace deep_ep::verify
