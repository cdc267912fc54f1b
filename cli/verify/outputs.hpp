#pragma once

#include <string_view>
#include <vector>

#include "verify/case.hpp"
#include "verify/compare.hpp"

namespace deep_ep::verify {

/// The outputs that a rank brings to a dispatch, as its case says.
class BroughtOutputs {
 public:
  /// Collective, since memory that peers can write is what another dispatch gives. Sets the outputs
  /// of `args`, whose result will have `rows` rows and `grouped_rows` grouped ones, and the event
  /// that the dispatch must wait for.
  BroughtOutputs(Buffer& buffer, const Case& c, DispatchArgs& args, std::int64_t rows,
                 std::int64_t grouped_rows);

  /// The result lies where it was to lie, and nothing was written behind it.
  void check(Comparator& compare, const DispatchResult& got) const;

 private:
  struct Output {
    std::string_view name;
    TensorView DispatchArgs::*argument;
    Tensor DispatchResult::*result;
    Tensor memory;
  };
  static std::vector<Output> all();
  void make_private(Device device, const DispatchArgs& args, std::int64_t rows,
                    std::int64_t grouped_rows);

  std::vector<Output> outputs_{};
  bool guarded_ = false;  // there is a row behind each output that must stay as it was
};

}  // namespace deep_ep::verify
