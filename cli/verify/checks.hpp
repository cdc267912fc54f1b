#pragma once

#include <cstdint>
#include <string>

#include "verify/compare.hpp"
#include "verify/expected.hpp"
#include "verify/inputs.hpp"

namespace deep_ep::verify {

/// What must hold of every output of a case on one rank.
class Checks {
 public:
  Checks(const Case& c, const Expected& expected, const CaseInputs& inputs)
      : case_(c), expected_(expected), inputs_(inputs), compare_(result_) {}

  /// Starts the checks of one call.
  void stage(std::string name, const EventHandle& event);

  void layout(const DispatchLayout& layout);
  void first_dispatch(const DispatchResult& got);
  void cached_dispatch(const DispatchResult& got);
  void payload(const DispatchResult& got, int round);
  void prepared(const PreparedDispatch& got);
  /// Rows by expert: `found` by this dispatch, else of the groups that it was given.
  void groups(const DispatchResult& got, int round, bool found);
  void handle(const IntranodeHandle& handle);
  void handle(const InternodeHandle& handle);
  void combined(const CombineResult& got, int round);
  void unchanged_x(const Tensor& x, int round);
  void stats(const Tensor& stats);

  Comparator& compare() { return compare_; }
  const CaseResult& result() const { return result_; }

 private:
  void counts(std::int64_t rows, const std::vector<std::int32_t>& list, bool worst);
  void grouped_rows(const DispatchResult& got, int round);
  void topk(const DispatchResult& got);
  void channels(const IntranodeHandle& handle);
  void channels(const InternodeHandle& handle);
  std::vector<std::byte> expected_rows(int round) const;

  const Case& case_;
  const Expected& expected_;
  const CaseInputs& inputs_;
  CaseResult result_{};
  Comparator compare_;
};

}  // namespace deep_ep::verify
